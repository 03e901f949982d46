"""Which MLflow store runs are in. `gsa.tracking` talks to it; this imports no MLflow, which takes half a second that
workers do not need."""

import dataclasses
import os
from pathlib import Path

from gsa import paths
from gsa.errors import ConfigError, RequestError
from gsa.reach import unreachable
from gsa.settings import join, setting

# MLflow reads these when it is imported.
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# who logs tries again by itself; its own minutes of retries would hide an outage
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

MAX_EXPERIMENT = 256  # characters of a name in MLflow's tables; MLflow itself only looks at 500


@dataclasses.dataclass
class TrackingConfig:
    uri: str | None = setting(None, "MLflow tracking URI; null is SQLite in the storage folder")
    experiment: str = setting("gsa", "MLflow experiment")
    system_metrics: bool = setting(True, "log CPU, memory, network and GPU use of each run")

    def check(self, prefix: str) -> None:
        if not 1 <= len(self.experiment) <= MAX_EXPERIMENT or not self.experiment.isprintable():
            allowed = f"must be 1 to {MAX_EXPERIMENT} printable characters"
            raise ConfigError(join(prefix, "experiment"), self.experiment, allowed)


def store_uri(config: TrackingConfig, storage: str | Path) -> str:
    """The tracking URI: the configured one, `MLFLOW_TRACKING_URI`, or SQLite in the storage folder.

    Raises:
        RequestError: it names SQLite without a file.
    """
    given = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return absolute_uri(given) if given else paths.sqlite_uri(Path(storage).resolve() / "mlflow.db")


def absolute_uri(uri: str) -> str:
    """A tracking URI that means the same in every folder: SQLite's path from the current folder, `~` a home.

    Raises:
        RequestError: it names SQLite without a file.
    """
    if uri.startswith("sqlite:") and paths.database_of(uri) is None:
        raise RequestError(f"tracking.uri = {uri!r}: must name a file, as sqlite:///mlflow.db does")
    return paths.absolute_uri(uri)


def refuse_unreachable(uri: str) -> None:
    """MLflow's own client retries for minutes; ask once, briefly, before anything is started."""
    if not uri.startswith(("http://", "https://")):
        raise RequestError(f"tracking.uri = {uri!r}: must be sqlite:///PATH, http://HOST or https://HOST")
    if reason := unreachable(f"{uri.rstrip('/')}/health"):
        raise RequestError(f"tracking.uri = {uri!r}: no MLflow server answers there ({reason})")
