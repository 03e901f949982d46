"""The one place that talks to MLflow.

- One parent run a sweep, one child a trial. A run is found again by its key (sweep and trial), so
  whoever continues a trial continues its run.
- Nothing here is global: the store's address travels in `TrackingConfig`, to workers too.
- A step that the store holds already is not logged again: a trial that goes on from a checkpoint repeats
  some steps, and their metrics must not be doubled.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gsa.data.packing import DataConfig

# MLflow reads these when it is imported.
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from gsa.errors import RequestError
from gsa.settings import setting

os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes

KEY, STATE, REASON, PARENT = "gsa.key", "gsa.state", "gsa.reason", "mlflow.parentRunId"
OBJECTIVES = "gsa.objectives"  # of a sweep's run, and of no other
# how each state of a run of ours is told to MLflow
STATUS = {"finished": "FINISHED", "stopped_early": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
PARAM_LIMIT = 6000  # characters of a parameter's value that MLflow stores


@dataclasses.dataclass
class TrackingConfig:
    uri: str | None = setting(None, "MLflow tracking URI; null is SQLite in the storage folder")
    experiment: str = setting("gsa", "MLflow experiment")
    system_metrics: bool = setting(True, "log CPU, memory, network and GPU use of each run")


class Tracking:
    """One experiment of one store. Made by `connect`."""

    def __init__(self, uri: str, experiment_id: str) -> None:
        self.uri, self.experiment_id = uri, experiment_id
        self.client = MlflowClient(uri)

    def find_run(self, key: str) -> Run | None:
        """The run that was started with this key."""
        quoted = key.replace("'", "")
        runs = self.client.search_runs([self.experiment_id], f"tags.`{KEY}` = '{quoted}'", max_results=1)
        return runs[0] if runs else None

    @staticmethod
    def state(run: Run) -> str:
        """The state of a run of ours: one that `finish` takes once it has done all of it, until then `running`."""
        state = str(run.data.tags.get(STATE, "running"))
        return state if run.info.status == STATUS.get(state) else "running"

    def start_run(self, key: str, name: str, parent: str | None = None, tags: dict[str, str] | None = None) -> str:
        """The id of the run with this key, set to RUNNING; made where there is none yet."""
        run = self.find_run(key)
        if run is None:
            own = {KEY: key, STATE: "running", "mlflow.source.name": "gsa", **(tags or {})}
            if parent is not None:
                own[PARENT] = parent
            run = self.client.create_run(self.experiment_id, run_name=name, tags=own)
        else:
            self.client.update_run(run.info.run_id, status="RUNNING")
            self.client.set_tag(run.info.run_id, STATE, "running")
        return str(run.info.run_id)

    def describe(self, run_id: str, params: dict[str, Any], config_yaml: str) -> None:
        """Record the resolved configuration: flat parameters, and the whole as an artifact. Once a run, as parameters
        cannot change; what an interruption left out is added."""
        known = self.client.get_run(run_id).data.params
        entries = [Param(_mlflow_name(k), str(v)[:PARAM_LIMIT]) for k, v in params.items()]
        entries = [entry for entry in entries if entry.key not in known]
        if not entries:
            return
        self.client.log_text(run_id, config_yaml, "config.yaml")
        for first in range(0, len(entries), 100):
            self.client.log_batch(run_id, params=entries[first : first + 100])

    def describe_data(self, run_id: str, config: "DataConfig", fingerprint: str) -> None:
        """Record the dataset a run trains on."""
        source = json.dumps(dataclasses.asdict(config.corpus))
        dataset = Dataset(name=config.corpus.source, digest=fingerprint[:36], source_type="gsa", source=source)
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def metrics(self, run_id: str) -> dict[str, float]:
        """The last value of every metric."""
        return dict(self.client.get_run(run_id).data.metrics)

    def last_step(self, run_id: str) -> int:
        """The last step that was logged, 0 where there is none."""
        return int(self.metrics(run_id).get("step", 0))

    def log(self, run_id: str, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of one step in one request. Values that are not finite are left out."""
        now = int(time.time() * 1000)
        kept = {name: value for name, value in metrics.items() if math.isfinite(value)} | {"step": float(step)}
        self.client.log_batch(run_id, [Metric(_mlflow_name(name), value, now, step) for name, value in kept.items()])

    def tag(self, run_id: str, tags: dict[str, str]) -> None:
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def finish(self, run_id: str, state: str, reason: str = "") -> None:
        """End a run as `finished`, `stopped_early`, `failed` or `killed`."""
        self.tag(run_id, {STATE: state} | ({REASON: reason[:PARAM_LIMIT]} if reason else {}))
        self.client.set_terminated(run_id, STATUS[state])

    def upload(self, run_id: str, path: Path, place: str) -> None:
        """Store a file in, or a folder as, the artifact folder `place`."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), place)
        else:
            self.client.log_artifact(run_id, str(path), place or None)

    def download(self, run_id: str, place: str) -> Path:
        """A local copy of an artifact folder.

        Raises:
            RequestError: there is no such run, or it has no such artifact.
        """
        try:
            if not self.client.list_artifacts(run_id, place):
                raise RequestError(f"run {run_id} has no artifact {place!r} in {self.uri}")
            return Path(self.client.download_artifacts(run_id, place))
        except MlflowException as error:
            raise RequestError(f"run {run_id}: {error.message.splitlines()[0]} (store: {self.uri})") from error

    def children(self, parent: str) -> list[Run]:
        """The runs below a sweep's run, oldest first."""
        query, runs, token = f"tags.`{PARENT}` = '{parent}'", [], None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], query, max_results=1000, order_by=["start_time ASC"], page_token=token
            )
            runs += list(page)
            token = page.token
            if not token:
                return runs

    def sweeps(self) -> set[str]:
        """The names of all sweeps in the store."""
        runs = self.client.search_runs([self.experiment_id], f"tags.`{OBJECTIVES}` != ''", max_results=1000)
        return {str(run.info.run_name) for run in runs}

    def register(self, run_id: str, name: str) -> str:
        """Make a run's checkpoint the newest version of a registered model; returns the version."""
        with contextlib.suppress(MlflowException):  # registered before
            self.client.create_registered_model(name)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/checkpoint"
        return str(self.client.create_model_version(name, source, run_id).version)

    @contextlib.contextmanager
    def system_metrics(self, run_id: str) -> Iterator[None]:
        """Log this machine's use while the block runs."""
        monitor = SystemMetricsMonitor(run_id, sampling_interval=2, resume_logging=True, tracking_uri=self.uri)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()


def open_store(config: TrackingConfig, storage: str | Path) -> Tracking:
    """Open a store that is there already; to read it makes nothing.

    Raises:
        RequestError: there is no store, or it cannot be reached.
    """
    uri = store_uri(config, storage)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise RequestError(f"{uri}: no runs are stored there; --storage or --tracking-uri name another place")
    return connect(config, storage)


def connect(config: TrackingConfig, storage: str | Path) -> Tracking:
    """Open the store, and make the experiment where it does not exist.

    Raises:
        RequestError: the store cannot be reached.
    """
    uri, artifacts = store_uri(config, storage), None
    if uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///"))
        artifacts = (database.parent / "artifacts").as_uri()
        try:
            database.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"tracking.uri = {uri!r}: its folder cannot be made ({error})") from error
    else:
        _refuse_unreachable(uri)
    client = MlflowClient(uri)
    try:
        found = client.get_experiment_by_name(config.experiment)
        if found is None:
            return Tracking(uri, client.create_experiment(config.experiment, artifact_location=artifacts))
    except MlflowException as error:
        raise RequestError(f"tracking.uri = {uri!r}: {error.message.splitlines()[0]}") from error
    return Tracking(uri, found.experiment_id)


def store_uri(config: TrackingConfig, storage: str | Path) -> str:
    """The tracking URI: the configured one, `MLFLOW_TRACKING_URI`, or SQLite in the storage folder."""
    return config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(storage).resolve() / 'mlflow.db'}"


def _refuse_unreachable(uri: str) -> None:
    """MLflow's own client retries for minutes; ask once, briefly, before anything is started."""
    if not uri.startswith(("http://", "https://")):
        raise RequestError(f"tracking.uri = {uri!r}: must be sqlite:///PATH, http://HOST or https://HOST")
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5):
            pass
    except urllib.error.HTTPError:
        return  # it answers; what it thinks of us, the first real request tells
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise RequestError(f"tracking.uri = {uri!r}: no MLflow server answers there ({reason})") from error


def _mlflow_name(key: str) -> str:
    """MLflow's names have no brackets: layers[2].k is layers.2.k there."""
    return key.replace("[", ".").replace("]", "")


def git_tags() -> dict[str, str]:
    """The commit of the code in the current folder, as MLflow's own tag; nothing where there is no git."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {"mlflow.source.git.commit": found.stdout.strip()} if found.returncode == 0 else {}
