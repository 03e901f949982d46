"""The one place that talks to MLflow.

- One parent run a sweep, one child a trial. A run is found again by its key (sweep and trial), so
  whoever continues a trial continues its run.
- Runs do not talk to it: they write to their spool (`gsa.spool`), and one background writer a sweep logs from there.
"""

import contextlib
import json
import logging
import math
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request, verify_rest_response
from sqlalchemy.exc import SQLAlchemyError

from gsa.errors import RequestError, one_line
from gsa.spool import Row, of_system
from gsa.store import TrackingConfig, refuse_unreachable, store_uri

logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of every table that it makes

T = TypeVar("T")

KEY, STATE, REASON, PARENT = "gsa.key", "gsa.state", "gsa.reason", "mlflow.parentRunId"
TOLD = "gsa.told"  # bytes of a run's spool that were logged when it ended
OBJECTIVES = "gsa.objectives"  # of a sweep's run, and of no other
# how each state of a run of ours is told to MLflow
STATUS = {"finished": "FINISHED", "stopped_early": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
METRICS_AT_ONCE, PARAMS_AT_ONCE = 1000, 100  # that MLflow takes in one request
RUNS_AT_ONCE = 100  # whose histories MLflow gives in one request
HISTORY_POINTS = 500  # of one run that are read
PARAM_LIMIT = 6000  # characters of a parameter's value that MLflow stores


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
            return self.create_run(key, name, parent, tags or {})
        self.restart(run.info.run_id)
        return str(run.info.run_id)

    def create_run(self, key: str, name: str, parent: str | None, tags: dict[str, str]) -> str:
        """The id of a new run."""
        own = {KEY: key, STATE: "running", "mlflow.source.name": "gsa", **tags}
        if parent is not None:
            own[PARENT] = parent
        return str(self.client.create_run(self.experiment_id, run_name=name, tags=own).info.run_id)

    def restart(self, run_id: str) -> None:
        """A run that had ended goes on."""
        self.client.update_run(run_id, status="RUNNING")
        self.client.set_tag(run_id, STATE, "running")

    def describe(self, run_id: str, params: dict[str, Any], config_yaml: str) -> None:
        """Record the resolved configuration: flat parameters, and the whole as an artifact. They cannot change; the
        same again changes nothing."""
        self.client.log_text(run_id, config_yaml, "config.yaml")
        entries = [Param(_mlflow_name(k), str(v)[:PARAM_LIMIT]) for k, v in params.items()]
        self.log_params(run_id, entries)

    def log_params(self, run_id: str, params: list[Param]) -> None:
        """Log many parameters in few requests."""
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self.client.log_batch(run_id, params=params[first : first + PARAMS_AT_ONCE])

    def describe_data(self, run_id: str, corpus: dict[str, Any], fingerprint: str) -> None:
        """Record the dataset a run trains on."""
        digest = fingerprint[:36]
        dataset = Dataset(name=corpus["source"], digest=digest, source_type="gsa", source=json.dumps(corpus))
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def metrics(self, run_id: str) -> dict[str, float]:
        """The last value of every metric."""
        return dict(self.client.get_run(run_id).data.metrics)

    def history(self, run_id: str, metrics: Iterable[str]) -> dict[int, dict[str, float]]:
        """Every value of some metrics, by step."""
        found: dict[int, dict[str, float]] = {}
        for metric in metrics:
            for logged in self.client.get_metric_history(run_id, metric):
                found.setdefault(logged.step, {})[metric] = logged.value
        return found

    def histories(self, run_ids: list[str], metric: str) -> dict[str, list[tuple[int, float]]]:
        """The values of one metric by step, by run; evenly sampled where there are more than `HISTORY_POINTS`. One
        request for each hundred runs; a database is asked run by run."""
        found: dict[str, dict[int, float]] = {run_id: {} for run_id in run_ids}
        if self.uri.startswith("sqlite:"):
            for run_id in run_ids:
                history = self.client.get_metric_history(run_id, metric)
                stride = max(1, math.ceil(len(history) / HISTORY_POINTS))
                found[run_id] = {m.step: m.value for m in [*history[::stride], *history[-1:]]}
        else:
            for first in range(0, len(run_ids), RUNS_AT_ONCE):
                query = {"run_ids": run_ids[first : first + RUNS_AT_ONCE], "metric_key": metric}
                path = "/ajax-api/2.0/mlflow/metrics/get-history-bulk-interval"
                answer = http_request(
                    get_default_host_creds(self.uri), path, "GET", params=query | {"max_results": HISTORY_POINTS}
                )
                for m in verify_rest_response(answer, path).json().get("metrics", []):
                    found[m["run_id"]][int(m.get("step", 0))] = float(m.get("value", 0.0))
        return {run_id: sorted(steps.items()) for run_id, steps in found.items()}

    def log(self, run_id: str, step: int, metrics: dict[str, float]) -> None:
        """Log metrics of one step that no spool holds. Values that are not finite are left out."""
        self.log_rows(run_id, [Row(0, int(time.time() * 1000), step, metrics)])

    def log_rows(self, run_id: str, rows: Iterable[Row], tags: dict[str, str] | None = None) -> None:
        """Log many rows, and tags after them, in few requests. What the store holds already, with its time, is not
        doubled."""
        entries, last = [], None
        for row in rows:
            finite = {name: value for name, value in row.metrics.items() if math.isfinite(value)}
            entries += [Metric(_mlflow_name(name), value, row.time, row.step) for name, value in finite.items()]
            last = last if of_system(row) else row
        if last is not None:  # how far the run is; its history is that of any other metric
            entries.append(Metric("step", float(last.step), last.time, last.step))
        added = [RunTag(key, value) for key, value in (tags or {}).items()]
        for first in range(0, max(len(entries), 1), METRICS_AT_ONCE):
            part, more = entries[first : first + METRICS_AT_ONCE], first + METRICS_AT_ONCE < len(entries)
            if part or added:
                self.client.log_batch(run_id, part, tags=[] if more else added)

    def finish(
        self, run_id: str, state: str, reason: str = "", told: int | None = None, rows: Iterable[Row] = ()
    ) -> None:
        """End a run as `finished`, `stopped_early`, `failed` or `killed`.

        Args:
            run_id: of the run.
            state: how it ended.
            reason: why it failed.
            told: bytes of its spool that are logged then.
            rows: the last of them, which are logged first.
        """
        tags = {STATE: state} | ({REASON: reason[:PARAM_LIMIT]} if reason else {})
        self.log_rows(run_id, rows, tags | ({TOLD: str(told)} if told is not None else {}))
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

    def read_text(self, run_id: str, place: str) -> str:
        """The text of an artifact.

        Raises:
            RequestError: there is no such run, or it has no such artifact.
        """
        try:
            with tempfile.TemporaryDirectory() as folder:
                return Path(self.client.download_artifacts(run_id, place, folder)).read_text(encoding="utf-8")
        except (MlflowException, OSError) as error:
            message = error.message if isinstance(error, MlflowException) else str(error)
            raise RequestError(
                f"run {run_id}: artifact {place!r} cannot be read: {message.splitlines()[0]} (store: {self.uri})"
            ) from error

    def log_text(self, run_id: str, text: str, place: str) -> None:
        """Store a text as the artifact file `place`; one that is there is replaced."""
        self.client.log_text(run_id, text, place)

    def children(self, parent: str) -> list[Run]:
        """The runs below a sweep's run, oldest first."""
        return self.runs(f"tags.`{PARENT}` = '{parent}'")

    def runs(self, query: str = "") -> list[Run]:
        """The runs of the experiment that a query names, all without one; oldest first."""
        ask = partial(self.client.search_runs, [self.experiment_id], query, order_by=["start_time ASC"])
        return every_page(partial(ask, max_results=1000))

    def sweeps(self) -> set[str]:
        """The names of all sweeps in the store."""
        runs = self.client.search_runs([self.experiment_id], f"tags.`{OBJECTIVES}` != ''", max_results=1000)
        return {str(run.info.run_name) for run in runs}

    def register(self, run_id: str, name: str, tags: dict[str, str] | None = None) -> str:
        """Make a run's checkpoint the newest version of a registered model; returns the version."""
        with contextlib.suppress(MlflowException):  # registered before
            self.client.create_registered_model(name)
        source = f"{self.client.get_run(run_id).info.artifact_uri}/checkpoint"
        return str(self.client.create_model_version(name, source, run_id, tags).version)


def every_page(ask: Callable[..., PagedList[T]]) -> list[T]:
    """All that a search of MLflow's client finds; it gives a page at a time."""
    found, token = [], None
    while True:
        page = ask(page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return found


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
        refuse_unreachable(uri)
    try:
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(config.experiment)
        if found is None:
            return Tracking(uri, client.create_experiment(config.experiment, artifact_location=artifacts))
    except MlflowException as error:
        reason = _other_schema(error.message, uri) or error.message.splitlines()[0]
        raise RequestError(f"tracking.uri = {uri!r}: {reason}") from error
    except (SQLAlchemyError, ValueError) as error:
        raise RequestError(f"tracking.uri = {uri!r}: is not a store of MLflow's ({one_line(error)[:200]})") from error
    return Tracking(uri, found.experiment_id)


def _other_schema(message: str, uri: str) -> str:
    """What to do with a database that another version of MLflow has made, where MLflow's error says so."""
    found = re.search(r"found version (\w+), but expected", message)
    if found is None:
        return ""
    migrations = Path(mlflow.__file__).parent / "store/db_migrations/versions"
    if not list(migrations.glob(f"{found[1]}_*.py")):
        return f"was made by a later MLflow than {mlflow.__version__}, which is installed here: install that one"
    upgrade = shlex.join(["mlflow", "db", "upgrade", uri])
    return f"was made by an earlier MLflow; after a backup, bring it up to date: {upgrade}"


def _mlflow_name(key: str) -> str:
    """MLflow's names have no brackets: layers[2].k is layers.2.k there."""
    return key.replace("[", ".").replace("]", "")


def git_tags() -> dict[str, str]:
    """The commit of the code in the current folder, as MLflow's own tag; nothing where there is no git."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {"mlflow.source.git.commit": found.stdout.strip()} if found.returncode == 0 else {}
