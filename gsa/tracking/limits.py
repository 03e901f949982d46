"""What MLflow bounds (`mlflow.utils.validation`), bounded before it is sent.

MLflow cuts some values in silence and refuses the whole request for others, and a database behind a server refuses what
SQLite takes. So every name and value passes through here:

- what is only shown (parameters, reasons) is cut, with a mark that tells how long it was and its digest;
- what a report reads back (tags that hold JSON) is split over several tags, and joined again;
- a request holds no more entries, and no more bytes, than MLflow takes.
"""

import hashlib
import json
import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.validation import (
    MAX_BATCH_LOG_REQUEST_SIZE,
    MAX_DATASET_DIGEST_SIZE,
    MAX_DATASET_NAME_SIZE,
    MAX_DATASET_SOURCE_SIZE,
    MAX_ENTITIES_PER_BATCH,
    MAX_ENTITY_KEY_LENGTH,
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
    MAX_TAG_VAL_LENGTH,
)

OWN = "gsa."  # tags with this prefix are read back
PARTS = ".parts"  # suffix of the tag that says over how many tags a value is split
FIRST_FILES = 5  # of a dataset that are named where not all can be


def shown(text: str, limit: int) -> str:
    """A text of at most `limit` characters that every database stores; a longer one is cut, with a mark."""
    text = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    if len(text) <= limit:
        return text
    mark = f"… ({len(text)} characters, SHA-256 {_digest(text)})"
    return text[: limit - len(mark)] + mark


def same_param(held: str, value: str) -> bool:
    """Whether a run's parameter, as MLflow holds it, stands for this value; earlier versions cut without a mark."""
    return held in (shown(value, MAX_PARAM_VAL_LENGTH), value[:MAX_PARAM_VAL_LENGTH])


def entity_name(key: str) -> str:
    """A setting's or metric's key as a name that MLflow takes: `layers[2].k` is `layers.2.k` there."""
    name = re.sub(r"[^/\w.\- :]", "_", key.replace("[", ".").replace("]", ""))
    if posixpath.normpath(name) != name or name.startswith((".", "/")):
        name = "_" + name.replace("/", "_")
    if len(name) > MAX_ENTITY_KEY_LENGTH:
        name = f"{name[: MAX_ENTITY_KEY_LENGTH - 13]}-{_digest(name)}"
    return name


def bounded_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Parameters by the names and with the values that MLflow holds."""
    return {entity_name(key): shown(str(value), MAX_PARAM_VAL_LENGTH) for key, value in params.items()}


def split_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags that MLflow takes whole: our own long ones go on in `KEY.2`, `KEY.3` …, others are cut with a mark."""
    found: dict[str, str] = {}
    for given, value in tags.items():
        key = entity_name(given)
        if not key.startswith(OWN) or len(value) <= MAX_TAG_VAL_LENGTH:
            found[key] = shown(value, MAX_TAG_VAL_LENGTH)
            continue
        parts = [value[i : i + MAX_TAG_VAL_LENGTH] for i in range(0, len(value), MAX_TAG_VAL_LENGTH)]
        found[key + PARTS] = str(len(parts))
        found |= {key if i == 1 else f"{key}.{i}": part for i, part in enumerate(parts, start=1)}
    return found


def join_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags that `split_tags` was given. A part that somebody removed is missing from its value."""
    found = dict(tags)
    for key, count in tags.items():
        if key.startswith(OWN) and key.endswith(PARTS) and count.isdecimal():
            name = key.removesuffix(PARTS)
            found.pop(key)
            parts = [found.pop(part, "") for part in [name, *(f"{name}.{i}" for i in range(2, int(count) + 1))]]
            found[name] = "".join(parts)
    return found


class Batch(NamedTuple):
    """What one request logs."""

    metrics: list[Metric]
    params: list[Param]
    tags: list[RunTag]

    def takes(self, entry: Metric | Param | RunTag) -> bool:
        """Whether another entry is within MLflow's numbers."""
        if len(self.metrics) + len(self.params) + len(self.tags) == MAX_ENTITIES_PER_BATCH:
            return False
        if isinstance(entry, Metric):
            return len(self.metrics) < MAX_METRICS_PER_BATCH
        return len(self.params if isinstance(entry, Param) else self.tags) < MAX_PARAMS_TAGS_PER_BATCH

    def add(self, entry: Metric | Param | RunTag) -> None:
        if isinstance(entry, Metric):
            self.metrics.append(entry)
        elif isinstance(entry, Param):
            self.params.append(entry)
        else:
            self.tags.append(entry)


def batches(metrics: Iterable[Metric] = (), params: Iterable[Param] = (), tags: Iterable[RunTag] = ()) -> list[Batch]:
    """Entries in as few requests as MLflow takes them in, in this order: tags come with or after all metrics."""
    found: list[Batch] = []
    size = 0
    entries: list[Metric | Param | RunTag] = [*metrics, *params, *tags]
    for entry in entries:
        # as MLflow writes it: indented, everything beyond ASCII escaped
        entry_size = len(json.dumps(dict(entry), indent=2)) + 64
        if not found or not found[-1].takes(entry) or size + entry_size > MAX_BATCH_LOG_REQUEST_SIZE:
            found.append(Batch([], [], []))
            size = 256  # the run's id and the brackets
        size += entry_size
        found[-1].add(entry)
    return found


def dataset_fields(corpus: Mapping[str, Any], fingerprint: str) -> dict[str, str]:
    """Name, digest and source of a dataset; a source that names too many files says how many, the first, and a digest
    of all."""
    source = json.dumps(corpus)
    if len(source) > MAX_DATASET_SOURCE_SIZE:
        source = json.dumps({key: _summary(value) for key, value in corpus.items()})
    if len(source) > MAX_DATASET_SOURCE_SIZE:
        source = json.dumps({"length": len(source), "sha256": _digest(source)})
    return {
        "name": shown(str(corpus["source"]), MAX_DATASET_NAME_SIZE),
        "digest": fingerprint[:MAX_DATASET_DIGEST_SIZE],
        "source": source,
    }


def _summary(value: Any) -> Any:
    if isinstance(value, list):
        first = [shown(str(item), 1000) for item in value[:FIRST_FILES]]
        return {"count": len(value), "first": first, "sha256": _digest(json.dumps(value))}
    return shown(value, 1000) if isinstance(value, str) else value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]
