"""New MLflow stores, quickly."""

import functools
import shutil
import tempfile
from pathlib import Path

from mlflow import MlflowClient

from gsa.store import TrackingConfig
from gsa.tracking import Tracking, connect


def new_store(folder: Path) -> Path:
    """The SQLite file of an empty store in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(_empty(), folder / "mlflow.db"))


def new_tracking(folder: Path) -> Tracking:
    """The experiment `gsa` of a new store."""
    new_store(folder)
    return connect(TrackingConfig(), folder)


@functools.cache
def _empty() -> Path:
    """Made once: MLflow takes seconds to make its tables."""
    path = Path(tempfile.mkdtemp()) / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path
