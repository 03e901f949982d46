"""A sweep: Optuna proposes, Ray Tune runs, MLflow holds the results.

    python -m ray_jobs.sweep configs/sweep/quickstart.yaml [key=value …]

Everything of a sweep is in `STORAGE/sweeps/NAME`: its configuration, its record and its trials' checkpoints. Whatever
ended it, it is continued from there.
"""

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from gsa.config import TrainConfig, build, check_name, flatten, lookup, parse_override, read_yaml, to_yaml
from gsa.data.packing import Prepared, prepare
from gsa.errors import ConfigError, RequestError, RunError
from gsa.evaluation.floors import bigram_bits_per_byte
from gsa.evaluation.gate import check_trainable
from gsa.settings import setting
from gsa.tracking import OBJECTIVES, Tracking, connect, git_tags
from gsa.training.loop import total_steps
from ray_jobs.budget import Budget, BudgetConfig
from ray_jobs.capacity import worker_resources
from ray_jobs.cluster import concurrent_runs, fleet, running, worker_memory
from ray_jobs.commands import at_storage, gsa
from ray_jobs.confirm import ConfirmConfig, confirmations
from ray_jobs.halving import Halving, SchedulerConfig
from ray_jobs.mlflow_writer import MlflowWriter
from ray_jobs.nested import begin, release_all, release_dead
from ray_jobs.objectives import DENSE as BASELINE
from ray_jobs.objectives import TIMED, Aims, ConstraintConfig, ObjectiveConfig
from ray_jobs.progress import SweepProgress
from ray_jobs.record import COMPLETE, Entry, Record
from ray_jobs.report import CONSTRAINTS, RATES, Report, read_report
from ray_jobs.reporting.page import to_html
from ray_jobs.runs import TrialContext, run_key
from ray_jobs.searcher import GsaSearcher
from ray_jobs.signals import stops_go_to
from ray_jobs.space import Space
from ray_jobs.storage import locked, settle
from ray_jobs.studies import SearcherConfig, Studies
from ray_jobs.trial import make_trainable
from ray_jobs.tuning import run_trials
from ray_jobs.warm_start import matching

logger = logging.getLogger(__name__)

# what may be set anew when a sweep goes on
EXTENSIBLE = ("num_samples", "max_concurrent_trials", "max_failures", "confirm", "budget")
PATIENCE = 300.0  # seconds that the end of a sweep waits for an MLflow that does not answer

# the same width, depth and steps, without selection and gates
DENSE = {"model.attention.sparse": False, "model.attention.gates.places": [], "model.layers": []}


@dataclasses.dataclass
class SweepConfig:
    name: str = setting("sweep", "name of the sweep and of its folder; the default is the file's stem")
    train: TrainConfig = setting(TrainConfig, "the training run that each trial varies")
    space: dict[str, Any] = setting(dict, "what is searched: a setting's key to its dimension")
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
    if (folder / "sweep.yaml").exists():
        raise RequestError(f"sweep {config.name!r} exists in {folder}: continue it with --resume, or set another name")
    return Sweep(config, folder, console).run()


def resume_sweep(name: str, storage: str, console: Console, overrides: list[str] | None = None) -> Report:
    """Continue a sweep to its end, or beyond it with more trials or more to spend (`EXTENSIBLE`).

    Raises:
        As `run_sweep`; RequestError where there is no such sweep.
    """
    check_name("name", name)
    folder = sweep_folder(storage, name)
    if not (folder / "sweep.yaml").exists():
        known = sorted(p.parent.name for p in folder.parent.glob("*/sweep.yaml"))
        raise RequestError(f"sweep {name!r}: is not in {folder.parent}; known: {', '.join(known) or 'none'}")
    for key, value in map(parse_override, overrides or []):
        if key.split(".")[0] not in EXTENSIBLE:
            raise ConfigError(key, value, f"cannot change in a sweep that has begun; {', '.join(EXTENSIBLE)} can")
    return Sweep(build(SweepConfig, read_yaml(folder / "sweep.yaml"), overrides), folder, console).run()


def sweep_folder(storage: str, name: str) -> Path:
    return Path(storage).absolute() / "sweeps" / name


class Sweep:
    """One sweep, new or continued."""

    def __init__(self, config: SweepConfig, folder: Path, console: Console) -> None:
        self.config, self.folder, self.console = config, folder, console
        self.base = dataclasses.asdict(config.train)
        self.space = Space(config.space, self.base)
        self.aims = Aims(config.objectives, config.constraints)
        if config.dense_baseline:
            self.space.compose(DENSE)

    def run(self) -> Report:
        config = self.config
        data = prepare(config.train.data, Path(config.train.storage) / "data")
        steps = total_steps(self.space.compose({}), data)
        config.scheduler.refuse_short(steps)
        tracking = connect(config.train.tracking, config.train.storage)
        self._refuse_namesake(tracking)
        earlier = self._earlier(tracking)
        with locked(self.folder, f"sweep {config.name!r}"), running():
            nodes, workers = fleet(), config.train.workers
            concurrent = concurrent_runs(nodes, workers, "train.workers", config.max_concurrent_trials)
            budget = Budget(config.budget, workers, nodes.types)
            self._save()
            parent = self._start_parent(tracking, data, budget)
            context = TrialContext(config.name, self.base, str(self.folder), parent, git_tags())
            record = Record(self.folder / "record.jsonl")
            writer = MlflowWriter(tracking, record.path, context)
            writer.start()
            try:
                for entry in earlier:
                    if entry.trial_id not in record.entries:
                        record.propose(entry)
                if config.dense_baseline and BASELINE not in record.entries:
                    record.propose(Entry(BASELINE, {}, dict(DENSE), baseline=True))
                searcher = self._searcher(record, steps, budget, data)
                self._search(searcher, record, context, steps, concurrent)
            finally:
                late = writer.finish(PATIENCE)
            if searcher.interrupted:
                tracking.finish(parent, "killed", "interrupted")
                raise KeyboardInterrupt
            if late:
                options = {"--resume": config.name, **at_storage(config.train.storage)}
                again = gsa("sweep", options=options)
                raise RunError(f"{late}; every result is in {self.folder}, and {again} logs what is missing")
            return self._conclude(tracking, parent, record)

    def _searcher(self, record: Record, steps: int, budget: Budget, data: Prepared) -> GsaSearcher:
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
            spent=lambda: budget.spent(record.events, record.entries.values(), time.time()),
        )

    def _search(
        self, searcher: GsaSearcher, record: Record, context: TrialContext, steps: int, concurrent: int
    ) -> None:
        """Run what is left of the sweep."""
        if searcher.finished:
            return
        record.begin()
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
        if searcher.refused:
            raise RunError(searcher.refused)
        if not searcher.interrupted and (spent := searcher.spent()):
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
        if not (self.folder / "sweep.yaml").exists() and tracking.find_run(run_key(self.config.name)) is not None:
            allowed = f"another sweep of this name is in {tracking.uri}; choose another"
            raise ConfigError("name", self.config.name, allowed)

    def _save(self) -> None:
        unfinished = self.folder / ".sweep.yaml"
        unfinished.write_text(to_yaml(self.config), encoding="utf-8")
        unfinished.rename(self.folder / "sweep.yaml")

    def _start_parent(self, tracking: Tracking, data: Prepared, budget: Budget) -> str:
        config = self.config
        objectives = json.dumps([dataclasses.asdict(o) for o in config.objectives])
        constraints = json.dumps([dataclasses.asdict(c) for c in config.constraints])
        tags = {"gsa.sweep": config.name, OBJECTIVES: objectives, CONSTRAINTS: constraints, **git_tags()}
        tags[RATES] = json.dumps(budget.rates)
        parent = tracking.start_run(run_key(config.name), config.name, tags=tags)
        tracking.describe(parent, flatten(config), to_yaml(config))
        tracking.describe_data(parent, dataclasses.asdict(config.train.data.corpus), data.fingerprint)
        floor = bigram_bits_per_byte(data, config.train.evaluation)
        tracking.log(parent, 0, {"floor_bigram_bits_per_byte": floor})
        return parent

    def _conclude(self, tracking: Tracking, parent: str, record: Record) -> Report:
        if not any(entry.state == COMPLETE and entry.searched for entry in record.trials()):
            reasons = [entry.reason for entry in record.trials() if entry.reason]
            tracking.finish(parent, "failed", "no trial came to its end")
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
def _signals(searcher: GsaSearcher) -> Iterator[None]:
    """Ctrl-C and a job's stop end the sweep in order; a second one ends it at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if searcher.interrupted:
            raise KeyboardInterrupt
        searcher.interrupted = True
        logger.warning("interrupted: ending the trials that run; once more ends at once")

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    with stops_go_to(interrupt):
        yield


if __name__ == "__main__":
    from ray_jobs.cli import main

    main(["sweep", *sys.argv[1:]])
