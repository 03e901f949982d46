"""A sweep: Optuna proposes, Ray Tune runs, MLflow holds the results.

    python -m ray_jobs.sweep configs/sweep/quickstart.yaml [key=value …]

Everything of a sweep is in `STORAGE/sweeps/NAME`: its configuration, its record and its trials' checkpoints. Whatever
ended it, it is continued from there.
"""

import dataclasses
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import requests
from mlflow.exceptions import MlflowException
from rich.console import Console

from gsa.config import (
    TrainConfig,
    build,
    check_name,
    flatten,
    lookup,
    parse_override,
    read_yaml,
    refuse_other_kind,
    to_yaml,
)
from gsa.data.packing import Prepared
from gsa.errors import ConfigError, InfrastructureError, RequestError, RunError, one_line
from gsa.evaluation.floors import bigram_bits_per_byte
from gsa.evaluation.gate import check_trainable
from gsa.settings import setting
from gsa.tracking import OBJECTIVES, Tracking, connect, git_tags
from gsa.training.loop import total_steps
from ray_jobs import stop
from ray_jobs.budget import Budget, BudgetConfig
from ray_jobs.capacity import worker_resources
from ray_jobs.cluster import concurrent_runs, fleet, running, worker_memory
from ray_jobs.commands import at_storage, gsa
from ray_jobs.confirm import ConfirmConfig, confirmations
from ray_jobs.dimensions import read_space
from ray_jobs.halving import Halving, SchedulerConfig
from ray_jobs.mlflow_writer import MlflowWriter
from ray_jobs.nested import begin, release_all, release_dead
from ray_jobs.objectives import DENSE as BASELINE
from ray_jobs.objectives import TIMED, Aims, ConstraintConfig, ObjectiveConfig
from ray_jobs.progress import SweepProgress
from ray_jobs.record import COMPLETE, Entry, Record
from ray_jobs.report import Report, read_report
from ray_jobs.reporting.page import to_html
from ray_jobs.reporting.recorded import CONSTRAINTS, RATES
from ray_jobs.runs import TrialContext, run_key
from ray_jobs.saved import EXTENSIBLE, check_record, follow_move, frozen, is_below, is_free, read_settings
from ray_jobs.searcher import GsaSearcher
from ray_jobs.signals import Saved, interrupt, stops_go_to
from ray_jobs.space import Space
from ray_jobs.storage import Hold, locked, refuse_unwritable, settle
from ray_jobs.studies import SearcherConfig, Studies
from ray_jobs.text import prepare_same
from ray_jobs.trial import make_trainable
from ray_jobs.tuning import run_trials
from ray_jobs.warm_start import matching
from ray_jobs.watchdog import at_the_last, cluster_faults

logger = logging.getLogger(__name__)

PATIENCE = 300.0  # seconds that the end of a sweep waits for an MLflow that does not answer
ORDERLY = 30.0  # the same where it was interrupted, and its trials have saved
BRIEF = 5.0  # the same where it is broken off

CONFIG, RECORD = "sweep.yaml", "record.jsonl"  # files of a sweep's folder
UNFINISHED = ".sweep.yaml"  # its configuration before MLflow has taken it

# the same width, depth and steps, without selection and gates
DENSE = {"model.attention.sparse": False, "model.attention.gates.places": [], "model.layers": []}


@dataclasses.dataclass
class SweepConfig:
    name: str = setting("sweep", "name of the sweep and of its folder; the default is the file's stem")
    train: TrainConfig = setting(TrainConfig, "the training run that each trial varies")
    space: dict[str, Any] = setting(dict, "what is searched: a setting's key to its dimension", read=read_space)
    objectives: list[ObjectiveConfig] = setting(lambda: [ObjectiveConfig()], "what is aimed at; the first ranks")
    constraints: list[ConstraintConfig] = setting(list, "bounds on metrics; a trial beyond one is never the best")
    num_samples: int = setting(20, "trials", ge=1)
    max_concurrent_trials: int | None = setting(None, "trials at once; null is as many as the cluster holds", ge=1)
    max_failures: int = setting(2, "times a trial whose process died is started again, from its checkpoint", ge=0)
    dense_baseline: bool = setting(True, "also train a dense model of the same width, depth and steps")
    seed: int = setting(0, "seed of the proposals", ge=0)
    searcher: SearcherConfig = setting(SearcherConfig, "what proposes")
    scheduler: SchedulerConfig = setting(SchedulerConfig, "who goes on")
    confirm: ConfirmConfig = setting(ConfirmConfig, "repeats of the best with other seeds, after the search")
    budget: BudgetConfig = setting(BudgetConfig, "what may be spent; null is without bound")
    gate: bool = setting(True, "check each proposal on tiny shapes, in the driver, before it may train")
    warm_start: str | None = setting(None, "an earlier sweep in the same store whose matching trials are learnt from")

    def check(self, prefix: str) -> None:
        check_name("name", self.name)
        if not self.objectives:
            raise ConfigError("objectives", [], "must name at least one metric")
        metrics = [objective.metric for objective in self.objectives]
        for metric in metrics:
            if metrics.count(metric) > 1:
                raise ConfigError("objectives", metric, "is named twice")
        largest = self.train.seed + (self.confirm.seeds if self.confirm.best else 0)
        if largest >= 2**64:
            allowed = f"must be < 2**64 - {self.confirm.seeds}: confirm adds up to {self.confirm.seeds} to it"
            raise ConfigError("train.seed", self.train.seed, allowed)
        timed = [m for m in Aims(self.objectives, self.constraints).metrics if m in TIMED]
        if timed and self.train.evaluation.latency_length is None:
            raise ConfigError("train.evaluation.latency_length", None, f"must be set: {timed[0]} is measured there")
        for i, constraint in enumerate(self.constraints):
            if constraint.relative_to == "dense" and not self.dense_baseline:
                raise ConfigError(f"constraints[{i}].relative_to", "dense", "needs dense_baseline = true")


def load_sweep(path: str | Path, overrides: list[str] | None = None, storage: str | None = None) -> SweepConfig:
    """Read the configuration of a sweep that is to run here.

    Args:
        path: a YAML file.
        overrides: `key=value` strings.
        storage: the folder of runs, in place of `train.storage`.

    Raises:
        RequestError: as `gsa.config.load_config`; or an override sets another folder than `storage`.
    """
    config = read_sweep(path, overrides, storage)
    settle(config.train, "train.storage")
    return config


def read_sweep(path: str | Path, overrides: list[str] | None = None, storage: str | None = None) -> SweepConfig:
    """Read a sweep's configuration; its paths may be those of another machine."""
    data = read_yaml(Path(path))
    refuse_other_kind(Path(path), data, "sweep")
    data.setdefault("name", Path(path).stem)
    config = build(SweepConfig, data, overrides)
    if storage is not None:
        for key, value in map(parse_override, overrides or []):
            given = value if key == "train.storage" else lookup({key: value}, "train.storage")
            if given is not None and os.path.abspath(str(given)) != os.path.abspath(storage):
                raise ConfigError("train.storage", given, f"is not what --storage {storage} says; give one of them")
        config.train.storage = storage
    return config


def run_sweep(config: SweepConfig, console: Console) -> Report:
    """Run a new sweep to its end.

    Raises:
        RequestError: the request is wrong, or a sweep of this name exists; nothing was started.
        RunError: no trial came to its end.
        KeyboardInterrupt: it was interrupted; all is saved.
    """
    folder = sweep_folder(config.train.storage, config.name)
    if (folder / CONFIG).exists():
        raise RequestError(f"sweep {config.name!r} exists in {folder}: continue it with --resume, or set another name")
    return Sweep(config, folder, console).run()


def resume_sweep(name: str, storage: str, console: Console, overrides: list[str] | None = None) -> Report:
    """Continue a sweep to its end, or beyond it with more trials or more to spend (`EXTENSIBLE`).

    Raises:
        As `run_sweep`; RequestError where there is no such sweep.
    """
    check_name("name", name)
    folder = sweep_folder(storage, name)
    if not (folder / CONFIG).exists():
        known = sorted(p.parent.name for p in folder.parent.glob(f"*/{CONFIG}"))
        raise RequestError(f"sweep {name!r}: is not in {folder.parent}; known: {', '.join(known) or 'none'}")
    for key, value in map(parse_override, overrides or []):
        if not is_below(key, EXTENSIBLE):
            raise ConfigError(key, value, f"cannot change in a sweep that has begun; {', '.join(EXTENSIBLE)} can")
    config = build(SweepConfig, dataclasses.asdict(read_settings(SweepConfig, folder)), overrides)
    moved_from = follow_move(config.train, storage)
    settle(config.train, "train.storage")
    try:
        sweep = Sweep(config, folder, console)
    except RequestError as error:
        raise RequestError(f"{folder / 'sweep.yaml'}: {error}") from error
    check_record(config, sweep.space, folder)
    if moved_from is not None:
        said = f"sweep {name!r} was moved: it goes on in {config.train.storage} (was in {moved_from})"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    return sweep.run()


def sweep_folder(storage: str, name: str) -> Path:
    return Path(storage).absolute() / "sweeps" / name


class Sweep:
    """One sweep, new or continued."""

    def __init__(self, config: SweepConfig, folder: Path, console: Console) -> None:
        self.config, self.folder, self.console = config, folder, console
        self.base = dataclasses.asdict(config.train)
        self.space = Space(config.space, self.base)
        self.aims = Aims(config.objectives, config.constraints)
        if not (folder / CONFIG).exists():
            self.space.refuse_empty()
        if config.dense_baseline:
            try:
                self.space.compose(DENSE)
            except ConfigError as error:
                allowed = f"{error.allowed}; this is the dense baseline, which dense_baseline = false leaves out"
                raise ConfigError(f"train.{error.key}", error.value, allowed) from error

    def run(self) -> Report:
        """Run what is left of the sweep.

        Raises:
            As `run_sweep`.
        """
        with stops_go_to(interrupt):
            return self._run()

    def _run(self) -> Report:
        config = self.config
        again = gsa("sweep", options={"--resume": config.name, **at_storage(config.train.storage)})
        data = prepare_same(config.train, sorted((self.folder / "trials").glob("[!.]*")), shlex.split(again), "train.")
        steps = total_steps(self.space.compose({}), data)
        config.scheduler.refuse_short(steps)
        tracking = connect(config.train.tracking, config.train.storage, self.folder)
        self._refuse_namesake(tracking)
        earlier = self._earlier(tracking)
        with locked(self.folder, f"sweep {config.name!r}") as hold, running(again):
            nodes, workers = fleet(), config.train.workers
            concurrent = concurrent_runs(nodes, workers, "train.workers", config.max_concurrent_trials)
            budget = Budget(config.budget, workers, nodes.types)
            if config.gate and not (self.folder / CONFIG).exists():
                self.space.refuse_empty(self._gate(data))  # before its name is taken
            self._write(UNFINISHED)
            with _answers(tracking):
                parent = self._start_parent(tracking, data, budget)
            with self._state_told(tracking, parent), _answers(tracking), cluster_faults():
                self._describe_parent(tracking, parent, data)
                self._write(CONFIG)
                self._train(tracking, parent, data, steps, concurrent, budget, earlier, hold)
                return self._conclude(tracking, parent)

    def _train(
        self,
        tracking: Tracking,
        parent: str,
        data: Prepared,
        steps: int,
        concurrent: int,
        budget: Budget,
        earlier: list[Entry],
        hold: Hold,
    ) -> None:
        """Run what is left of the sweep, and log it.

        Raises:
            KeyboardInterrupt: it was interrupted; `Saved` where every running trial has saved its last step.
            InfrastructureError: the storage, a node or the cluster failed.
            RunError: MLflow did not take all of it, or another process has taken over the sweep.
        """
        config = self.config
        context = TrialContext(config.name, self.base, str(self.folder), parent, git_tags())
        stop.reset(Path(context.stop))
        record = Record(self.folder / RECORD)
        writer = MlflowWriter(tracking, record.path, context)
        writer.start()
        patience = BRIEF
        try:
            for entry in earlier:
                if entry.trial_id not in record.entries:
                    record.propose(entry)
            if config.dense_baseline and BASELINE not in record.entries:
                record.propose(Entry(BASELINE, {}, dict(DENSE), baseline=True))
            searcher = self._searcher(record, steps, budget, data, Path(context.stop), hold)
            with at_the_last(lambda reason: writer.finish(BRIEF)):
                self._search(searcher, record, context, steps, concurrent)
            if hold.lost:
                raise RunError(f"{hold.lost}: this one stops")
            patience = PATIENCE
        except Saved:
            patience = ORDERLY
            raise
        except OSError as error:
            raise InfrastructureError(f"{self.folder}: {one_line(error)}") from error
        finally:
            late = writer.finish(patience)
        if late:
            again = gsa("sweep", options={"--resume": config.name, **at_storage(config.train.storage)})
            raise RunError(f"{late}; every result is in {self.folder}, and {again} logs what is missing")

    def _searcher(
        self, record: Record, steps: int, budget: Budget, data: Prepared, stop_file: Path, hold: Hold
    ) -> GsaSearcher:
        config = self.config
        halving = Halving(config.scheduler, steps, self.aims)
        studies = Studies(self.space, self.aims, config.searcher, halving.rungs, config.seed, record)
        return GsaSearcher(
            studies,
            halving,
            record,
            config.num_samples,
            config.max_failures,
            gate=self._gate(data) if config.gate else lambda _: None,
            confirmations=lambda: confirmations(config.confirm, self.aims, record.entries, config.train.seed),
            spent=lambda: hold.lost or budget.spent(record.events, record.entries.values(), time.time()),
            # once another driver holds the folder, its trials are those that watch the file
            stop_trials=lambda: None if hold.lost else stop.request(stop_file),
            check_storage=lambda: refuse_unwritable(self.folder),
        )

    def _search(
        self, searcher: GsaSearcher, record: Record, context: TrialContext, steps: int, concurrent: int
    ) -> None:
        """Run trials until there is none left or the sweep ends early."""
        if searcher.finished:
            return
        record.begin(frozen(self.config))
        config, workers = self.config, self.config.train.workers
        resources = worker_resources(workers)
        if workers.num_workers > 1:
            # it only waits for its workers, which ask for theirs; `concurrent` keeps room for them
            resources = {"CPU": 0, "memory": 2**20}  # bytes; Tune wants something to ask for
        total = config.num_samples + config.dense_baseline + config.confirm.best * config.confirm.seeds
        progress = SweepProgress(
            record, config.objectives, total, config.num_samples, steps, searcher.halving, self.console
        )
        begin(self.folder / "trials")
        release_dead(self.folder / "trials")
        try:
            with progress.shown(), _signals(searcher):
                run_trials(make_trainable(context), searcher, self.folder, concurrent, resources)
        finally:
            release_all(self.folder / "trials")
        if searcher.broken:
            raise InfrastructureError(searcher.broken)
        if searcher.interrupted:
            raise KeyboardInterrupt if searcher.overdue else Saved
        if spent := searcher.spent():
            self.console.print(f"{spent}: the sweep ends; with more of it, --resume goes on", markup=False)

    def _gate(self, data: Prepared) -> Callable[[TrainConfig], None]:
        memory = worker_memory(self.config.train.workers)

        def check(config: TrainConfig) -> None:
            check_trainable(config, data.tokenizer.vocab_size, memory_bytes=memory)

        return check

    def _earlier(self, tracking: Tracking) -> list[Entry]:
        """Trials of an earlier sweep to learn from."""
        if self.config.warm_start is None:
            return []
        found = matching(tracking, self.config.warm_start, self.space, self.aims)
        self.console.print(found.summary(self.config.warm_start), markup=False, highlight=False, soft_wrap=True)
        return found.entries

    def _refuse_namesake(self, tracking: Tracking) -> None:
        if (self.folder / CONFIG).exists():
            return
        found = tracking.find_run(run_key(self.config.name))
        if found is None:
            return
        if (self.folder / UNFINISHED).exists() and not tracking.children(found.info.run_id):
            tracking.client.delete_run(found.info.run_id)  # of a start from this folder that did not get further
            return
        raise ConfigError("name", self.config.name, f"another sweep of this name is in {tracking.uri}; choose another")

    def _write(self, name: str) -> None:
        """Write the configuration to a file of the folder: whole, or not at all."""
        unfinished = self.folder / f"{UNFINISHED}.new"
        unfinished.write_text(to_yaml(self.config), encoding="utf-8")
        unfinished.rename(self.folder / name)
        if name == CONFIG:
            (self.folder / UNFINISHED).unlink(missing_ok=True)

    def _start_parent(self, tracking: Tracking, data: Prepared, budget: Budget) -> str:
        """The sweep's run, which is running now."""
        config = self.config
        objectives = json.dumps([dataclasses.asdict(o) for o in config.objectives])
        constraints = json.dumps([dataclasses.asdict(c) for c in config.constraints])
        tags = {"gsa.sweep": config.name, OBJECTIVES: objectives, CONSTRAINTS: constraints, **git_tags()}
        tags[RATES] = json.dumps(budget.rates)
        resumed = (self.folder / CONFIG).exists()
        return tracking.start_run(run_key(config.name), config.name, tags=tags, restore=resumed)

    def _describe_parent(self, tracking: Tracking, parent: str, data: Prepared) -> None:
        """Log the configuration: as params what can never change, as tags what may."""
        settings = flatten(self.config)
        changing = {key for key in settings if is_free(key)}
        tracking.set_tags(parent, {f"gsa.setting.{key}": str(settings[key]) for key in sorted(changing)})
        tracking.describe(parent, {k: v for k, v in settings.items() if k not in changing}, to_yaml(self.config))
        tracking.describe_data(parent, dataclasses.asdict(self.config.train.data.corpus), data.fingerprint)
        floor = bigram_bits_per_byte(data, self.config.train.evaluation)
        tracking.log(parent, 0, {"floor_bigram_bits_per_byte": floor})

    @contextmanager
    def _state_told(self, tracking: Tracking, parent: str) -> Iterator[None]:
        """Tell MLflow how the sweep has ended, however the block ends."""
        try:
            with at_the_last(partial(_finish, tracking, parent, "failed")):
                yield
        except KeyboardInterrupt:
            _finish(tracking, parent, "killed", "interrupted")
            raise
        except BaseException as error:
            _finish(tracking, parent, "failed", one_line(error))
            raise

    def _conclude(self, tracking: Tracking, parent: str) -> Report:
        record = Record(self.folder / RECORD)
        if not any(entry.state == COMPLETE and entry.searched for entry in record.trials()):
            reasons = [entry.reason for entry in record.trials() if entry.reason]
            raise RunError(
                f"no trial came to its end; the last failed because: {reasons[-1] if reasons else 'unknown'}"
            )
        report = read_report(tracking, self.config.name)
        if report.best is not None:
            best = next(trial for trial in report.trials if trial["trial_id"] == report.best)
            tracking.log(parent, 1, {f"best_{o['metric']}": best["metrics"][o["metric"]] for o in report.objectives})
            tracking.register(best["run_id"], self.config.name)
        tracking.log_text(parent, to_html(report), "report.html")
        tracking.finish(parent, "finished")
        return report


@contextmanager
def _answers(tracking: Tracking) -> Iterator[None]:
    """One line where MLflow does not answer, or refuses what the driver itself tells it."""
    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        again = "what was trained is kept, and --resume logs what is missing"
        raise RunError(f"{tracking.uri} did not take it ({one_line(error)[:300]}); {again}") from error


def _finish(tracking: Tracking, parent: str, state: str, reason: str) -> None:
    try:
        tracking.finish(parent, state, reason)
    except (MlflowException, requests.RequestException, OSError) as error:
        logger.warning("MLflow shows the sweep as running until it is resumed (%s)", one_line(error)[:200])


@contextmanager
def _signals(searcher: GsaSearcher) -> Iterator[None]:
    """Signals end the sweep in order: its trials save and stop. A second one ends it at once."""

    def end(number: int, frame: FrameType | None) -> None:
        if searcher.interrupted:
            raise KeyboardInterrupt
        searcher.interrupted = True
        with suppress(OSError):  # of a terminal that is gone
            logger.warning("interrupted: the trials that run save and stop; once more ends at once")

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    with stops_go_to(end):
        yield


if __name__ == "__main__":
    from ray_jobs.cli import main

    main(["sweep", *sys.argv[1:]])
