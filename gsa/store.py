"""Which MLflow store runs are in. `gsa.tracking` talks to it; this imports no MLflow, which takes half a second that
workers do not need."""

import dataclasses
import os
from pathlib import Path

from gsa.errors import RequestError
from gsa.reach import unreachable
from gsa.settings import setting

# MLflow reads these when it is imported.
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# who logs tries again by itself; its own minutes of retries would hide an outage
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@dataclasses.dataclass
class TrackingConfig:
    uri: str | None = setting(None, "MLflow tracking URI; null is SQLite in the storage folder")
    experiment: str = setting("gsa", "MLflow experiment")
    system_metrics: bool = setting(True, "log CPU, memory, network and GPU use of each run")


def store_uri(config: TrackingConfig, storage: str | Path) -> str:
    """The tracking URI: the configured one, `MLFLOW_TRACKING_URI`, or SQLite in the storage folder."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(storage).resolve() / 'mlflow.db'}"


def refuse_unreachable(uri: str) -> None:
    """MLflow's own client retries for minutes; ask once, briefly, before anything is started."""
    if not uri.startswith(("http://", "https://")):
        raise RequestError(f"tracking.uri = {uri!r}: must be sqlite:///PATH, http://HOST or https://HOST")
    if reason := unreachable(f"{uri.rstrip('/')}/health"):
        raise RequestError(f"tracking.uri = {uri!r}: no MLflow server answers there ({reason})")
