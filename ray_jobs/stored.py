"""The configuration that a sweep's run in MLflow holds: anyone who may write to the store may have written it."""

from typing import Any, NamedTuple

from gsa import plain
from gsa.errors import RequestError
from gsa.tracking import Tracking


class StoredSweep(NamedTuple):
    """Plain data of a sweep's `config.yaml`, `gsa.scalars.Unquoted` among it."""

    space: dict[str, Any]
    train: dict[str, Any]


def stored_sweep(tracking: Tracking, run_id: str) -> StoredSweep:
    """The search space and the training configuration of a sweep's run.

    Raises:
        RequestError: the run has no configuration, or none of a sweep; it names the run and what was found.
    """
    try:
        config = plain.parse(tracking.read_text(run_id, "config.yaml"), unquoted=True)
    except plain.PlainError as error:
        raise RequestError(f"run {run_id}: its config.yaml cannot be read as settings ({error})") from error
    if not isinstance(config, dict):
        raise _wrong(run_id, f"it holds {_kind(config)}, not settings")
    for key, absent in (("train", None), ("space", {})):
        found = config.setdefault(key, absent)
        if not isinstance(found, dict):
            raise _wrong(run_id, f"its {key!r} is {_kind(found)}, not a mapping")
    return StoredSweep(config["space"], config["train"])


def _wrong(run_id: str, why: str) -> RequestError:
    return RequestError(f"run {run_id}: its config.yaml is not that of a sweep: {why}")


def _kind(data: Any) -> str:
    return {list: "a list", type(None): "nothing"}.get(type(data), repr(data)[:40])
