"""The one place that talks to MLflow.

- `connection`: opens a store; to read makes nothing, to write makes the experiment.
- `store`: what belongs to a run's id alone: artifacts and registered models.
- `runs`: one experiment's runs. One parent run a sweep, one child a trial. A run is found again by its key (sweep and
  trial), so whoever continues a trial continues its run.
- `limits`: what MLflow bounds, bounded before it is sent.

Trials do not talk to MLflow: they write to their spool (`gsa.spool`), from which one background process a sweep logs.
"""

from gsa.tracking.code_version import git_tags
from gsa.tracking.connection import connect, open_experiment, open_run, open_store, remember
from gsa.tracking.runs import (
    KEY,
    OBJECTIVES,
    PARENT,
    REASON,
    STATE,
    STATUS,
    TOLD,
    Tracking,
    is_deleted,
    read_json,
    tags_of,
)
from gsa.tracking.store import ArtifactError, Store, every_page

__all__ = [
    "KEY",
    "OBJECTIVES",
    "PARENT",
    "REASON",
    "STATE",
    "STATUS",
    "TOLD",
    "ArtifactError",
    "Store",
    "Tracking",
    "connect",
    "every_page",
    "git_tags",
    "is_deleted",
    "open_experiment",
    "open_run",
    "open_store",
    "read_json",
    "remember",
    "tags_of",
]
