"""The runs of one experiment: made, described, logged to, found again and read."""

import json
import math
import time
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, Run, RunTag, ViewType
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request, verify_rest_response
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

from gsa.errors import RequestError
from gsa.spool import Row, of_system
from gsa.tracking.limits import (
    batches,
    bounded_params,
    dataset_fields,
    entity_name,
    join_tags,
    same_param,
    shown,
    split_tags,
)
from gsa.tracking.store import Store, every_page

T = TypeVar("T")

KEY, STATE, REASON, PARENT = "gsa.key", "gsa.state", "gsa.reason", "mlflow.parentRunId"
TOLD = "gsa.told"  # bytes of a run's spool that were logged when it ended
OBJECTIVES = "gsa.objectives"  # of a sweep's run, and of no other
# how each state of a run of ours is told to MLflow
STATUS = {"finished": "FINISHED", "stopped_early": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
RUNS_AT_ONCE = 100  # whose histories MLflow gives in one request
HISTORY_POINTS = 500  # of one run that are read
PAGE = 1000  # runs that MLflow is asked for at once


class Tracking(Store):
    """One experiment of one store. Made by `connect`, or to read by `open_experiment` and `open_run`."""

    def __init__(self, uri: str, experiment_id: str) -> None:
        super().__init__(uri)
        self.experiment_id = experiment_id

    def find_run(self, key: str, deleted: bool = False) -> Run | None:
        """The run that was started with this key, the newest if there are several; `deleted`: one that was deleted in
        MLflow, too, if there is no other."""
        if "'" in key:
            return None  # no name has one, and MLflow's queries cannot quote it
        for view in (ViewType.ACTIVE_ONLY, ViewType.DELETED_ONLY)[: 1 + deleted]:
            query = f"tags.`{KEY}` = '{key}'"
            runs = self.client.search_runs(
                [self.experiment_id], query, view, max_results=1, order_by=["start_time DESC"]
            )
            if runs:
                return runs[0]
        return None

    @staticmethod
    def state(run: Run) -> str:
        """The state of a run of ours: one that `finish` takes once it has done all of it, until then `running`."""
        state = str(run.data.tags.get(STATE, "running"))
        return state if run.info.status == STATUS.get(state) else "running"

    def start_run(
        self,
        key: str,
        name: str,
        parent: str | None = None,
        tags: dict[str, str] | None = None,
        restore: bool = False,
    ) -> str:
        """The id of the run with this key, set to RUNNING; made where there is none yet.

        Args:
            key: by which it is found again.
            name: that is shown.
            parent: the id of the run that it belongs to.
            tags: of a new run.
            restore: restore the run where it was deleted in MLflow; otherwise a new one takes its place.
        """
        run = self.find_run(key, deleted=restore)
        if run is None:
            return self.create_run(key, name, parent, tags or {})
        if is_deleted(run):
            self.client.restore_run(run.info.run_id)
        self.restart(run.info.run_id)
        return str(run.info.run_id)

    def create_run(self, key: str, name: str, parent: str | None, tags: dict[str, str]) -> str:
        """The id of a new run."""
        own = {KEY: key, STATE: "running", "mlflow.source.name": "gsa", **tags}
        if parent is not None:
            own[PARENT] = parent
        return str(self.client.create_run(self.experiment_id, run_name=name, tags=split_tags(own)).info.run_id)

    def restart(self, run_id: str) -> None:
        """A run that had ended goes on."""
        self.client.update_run(run_id, status="RUNNING")
        self.client.set_tag(run_id, STATE, "running")

    def set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        """Set tags of a run, in place of what they were."""
        held = self.client.get_run(run_id).data.tags
        shorter = {f"{key}.parts": "1" for key in tags if f"{key}.parts" in held}
        for batch in batches(tags=[RunTag(k, v) for k, v in (shorter | split_tags(tags)).items()]):
            self.client.log_batch(run_id, tags=batch.tags)

    def describe(self, run_id: str, params: dict[str, Any], config_yaml: str) -> None:
        """Record the resolved configuration: flat parameters, and the whole as an artifact. The same again changes
        nothing.

        Raises:
            RequestError: the run holds another value of a parameter, which MLflow cannot change; nothing was recorded.
        """
        run = self.client.get_run(run_id)
        for key, value in params.items():
            held = run.data.params.get(entity_name(key))
            if held is not None and not same_param(held, str(value)):
                old, new = shown(held, 100), shown(str(value), 100)
                name = f"run {run.info.run_name!r} of {self.uri}"
                raise RequestError(f"{key} = {new!r}: {name} was begun with {old!r}, and MLflow cannot change that")
        self.client.log_text(run_id, config_yaml, "config.yaml")
        missing = {key: value for key, value in bounded_params(params).items() if key not in run.data.params}
        self.log_params(run_id, [Param(key, value) for key, value in missing.items()])

    def log_params(self, run_id: str, params: list[Param]) -> None:
        """Log many parameters in few requests."""
        for batch in batches(params=params):
            self.client.log_batch(run_id, params=batch.params)

    def describe_data(self, run_id: str, corpus: dict[str, Any], fingerprint: str) -> None:
        """Record the dataset a run trains on."""
        dataset = Dataset(source_type="gsa", **dataset_fields(corpus, fingerprint))
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
            finite = {name: float(value) for name, value in row.metrics.items() if math.isfinite(value)}
            entries += [Metric(entity_name(name), value, row.time, row.step) for name, value in finite.items()]
            last = last if of_system(row) else row
        if last is not None:  # how far the run is; its history is that of any other metric
            entries.append(Metric("step", float(last.step), last.time, last.step))
        added = [RunTag(key, value) for key, value in split_tags(tags or {}).items()]
        for batch in batches(entries, tags=added):
            self.client.log_batch(run_id, batch.metrics, tags=batch.tags)

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
        tags = {STATE: state} | ({REASON: shown(reason, MAX_PARAM_VAL_LENGTH)} if reason else {})
        self.log_rows(run_id, rows, tags | ({TOLD: str(told)} if told is not None else {}))
        self.client.set_terminated(run_id, STATUS[state])

    def children(self, parent: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
        """The runs below a sweep's run, oldest first."""
        return self.runs(f"tags.`{PARENT}` = '{parent}'", view)

    def runs(self, query: str = "", view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
        """The runs of the experiment that a query names, all without one; oldest first."""
        ask = partial(self.client.search_runs, [self.experiment_id], query, view, order_by=["start_time ASC"])
        return every_page(partial(ask, max_results=PAGE))

    def sweeps(self) -> set[str]:
        """The names of all sweeps in the experiment."""
        return {str(run.info.run_name) for run in self.runs(f"tags.`{OBJECTIVES}` != ''")}


def is_deleted(run: Run) -> bool:
    """Whether somebody deleted a run in MLflow; until MLflow is told to forget it, it can be restored."""
    return bool(run.info.lifecycle_stage == LifecycleStage.DELETED)


def tags_of(run: Run) -> dict[str, str]:
    """The tags of a run of ours as they were given, however long."""
    return join_tags(run.data.tags)


def read_json(run: Run, key: str, kind: type[T]) -> T:
    """A tag of a run that holds JSON.

    Raises:
        RequestError: the run has no such tag, or it was edited to something else.
    """
    text = tags_of(run).get(key)
    try:
        found = json.loads(text) if text is not None else None
    except ValueError:
        found = None
    if not isinstance(found, kind):
        held = "is missing" if text is None else f"is {shown(text, 100)!r}, which is not what was recorded"
        raise RequestError(f"run {run.info.run_name!r} ({run.info.run_id}): its tag {key} {held}")
    return found
