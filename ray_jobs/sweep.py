"""A sweep: Optuna proposes, Ray Tune runs, MLflow holds the results.

    python -m ray_jobs.sweep configs/sweep/quickstart.yaml [key=value …]

Everything of a sweep is in `STORAGE/sweeps/NAME`: its configuration, its record and its trials' checkpoints. Whatever
ended it, it is continued from there.
"""

import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune
from rich.console import Console

from gsa.config import TrainConfig, build, check_name, flatten, read_yaml, to_yaml
from gsa.data.packing import Prepared, prepare
from gsa.errors import ConfigError, RequestError, RunError
from gsa.evaluation.floors import bigram_bits_per_byte
from gsa.settings import setting
from gsa.tracking import OBJECTIVES, Tracking, connect, git_tags
from gsa.training.loop import total_steps
from ray_jobs.cluster import concurrent_runs, running
from ray_jobs.mlflow_callback import TrialRuns
from ray_jobs.progress import SweepProgress
from ray_jobs.record import COMPLETE, Entry, Event, Record
from ray_jobs.report import Report, read_report
from ray_jobs.scheduler import SchedulerConfig, make_scheduler
from ray_jobs.searcher import ObjectiveConfig, OptunaSearcher, SearcherConfig
from ray_jobs.space import Space
from ray_jobs.storage import locked, settle
from ray_jobs.trial import TrialContext, make_trainable, run_key
from ray_jobs.worker import release_workers

logger = logging.getLogger(__name__)

# the same width, depth and steps, without selection and gates
DENSE = {"model.attention.sparse": False, "model.attention.gates.places": [], "model.layers": []}


@dataclasses.dataclass
class SweepConfig:
    name: str = setting("sweep", "name of the sweep and of its folder; the default is the file's stem")
    train: TrainConfig = setting(TrainConfig, "the training run that each trial varies")
    space: dict[str, Any] = setting(dict, "what is searched: a setting's key to its dimension")
    objectives: list[ObjectiveConfig] = setting(lambda: [ObjectiveConfig()], "what is aimed at; the first ranks")
    num_samples: int = setting(20, "trials", ge=1)
    max_concurrent_trials: int | None = setting(None, "trials at once; null is as many as the cluster holds", ge=1)
    max_failures: int = setting(2, "times a trial whose process died is started again, from its checkpoint", ge=0)
    dense_baseline: bool = setting(True, "also train a dense model of the same width, depth and steps")
    seed: int = setting(0, "seed of the proposals", ge=0)
    searcher: SearcherConfig = setting(SearcherConfig, "what proposes")
    scheduler: SchedulerConfig = setting(SchedulerConfig, "what stops")

    def check(self, prefix: str) -> None:
        check_name("name", self.name)
        if not self.objectives:
            raise ConfigError("objectives", [], "must name at least one metric")
        metrics = [objective.metric for objective in self.objectives]
        for metric in metrics:
            if metrics.count(metric) > 1:
                raise ConfigError("objectives", metric, "is named twice")


def load_sweep(path: str | Path, overrides: list[str] | None = None) -> SweepConfig:
    """Read a sweep's configuration.

    Raises:
        RequestError: as `gsa.config.load_config`.
    """
    data = read_yaml(Path(path))
    data.setdefault("name", Path(path).stem)
    config = build(SweepConfig, data, overrides)
    settle(config.train, "train.storage")
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


def resume_sweep(name: str, storage: str, console: Console) -> Report:
    """Continue a sweep to its end.

    Raises:
        As `run_sweep`; RequestError where there is no such sweep.
    """
    check_name("name", name)
    folder = sweep_folder(storage, name)
    if not (folder / "sweep.yaml").exists():
        known = sorted(p.parent.name for p in folder.parent.glob("*/sweep.yaml"))
        raise RequestError(f"sweep {name!r}: is not in {folder.parent}; known: {', '.join(known) or 'none'}")
    return Sweep(build(SweepConfig, read_yaml(folder / "sweep.yaml")), folder, console).run()


def sweep_folder(storage: str, name: str) -> Path:
    return Path(storage).absolute() / "sweeps" / name


class Sweep:
    """One sweep, new or continued."""

    def __init__(self, config: SweepConfig, folder: Path, console: Console) -> None:
        self.config, self.folder, self.console = config, folder, console
        self.base = dataclasses.asdict(config.train)
        self.space = Space(config.space, self.base)
        if config.dense_baseline:
            self.space.compose(DENSE)

    def run(self) -> Report:
        config = self.config
        data = prepare(config.train.data, Path(config.train.storage) / "data")
        steps = total_steps(self.space.compose({}), data)
        config.scheduler.refuse_short(steps)
        tracking = connect(config.train.tracking, config.train.storage)
        self._refuse_namesake(tracking)
        with locked(self.folder, f"sweep {config.name!r}"), running():
            room = concurrent_runs(config.train.workers, "train.workers")
            self._save()
            parent = self._start_parent(tracking, data)
            context = TrialContext(config.name, self.base, str(self.folder), parent, git_tags())
            record = Record(self.folder / "record.jsonl")
            runs = TrialRuns(tracking, context)
            runs.reconcile(record)
            record.subscribe(runs)
            record.subscribe(self._release)
            if config.dense_baseline and "baseline-dense" not in record.entries:
                record.propose(Entry("baseline-dense", {}, dict(DENSE), baseline=True))
            concurrent = min(room, config.max_concurrent_trials or room)
            interrupted = self._search(record, context, steps, concurrent)
            runs.reconcile(record)
            return self._conclude(tracking, parent, record, interrupted)

    def _search(self, record: Record, context: TrialContext, steps: int, concurrent: int) -> bool:
        """Run what is left of the sweep; whether it was interrupted."""
        config = self.config
        scheduler = make_scheduler(config.scheduler, config.objectives[0], steps, record)
        searcher = OptunaSearcher(
            self.space,
            config.objectives,
            config.searcher,
            config.seed,
            config.num_samples,
            record,
            config.max_failures,
        )
        if not searcher.remaining:
            return False
        workers = config.train.workers
        resources = {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}
        if workers.num_workers > 1:
            # it only waits for its workers, which ask for theirs; `concurrent` keeps room for them
            resources = {"CPU": 0, "memory": 2**20}  # bytes; Tune wants something to ask for
        total = config.num_samples + config.dense_baseline
        progress = SweepProgress(record, config.objectives, total, steps, self.console)
        with progress.shown(), _signals(searcher):
            # not `Tuner`, which would pickle the searcher: the record is the only memory of a sweep
            tune.run(
                make_trainable(context),
                name="tune",
                storage_path=str(self.folder),
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=-1,  # until the searcher has no more
                max_concurrent_trials=concurrent,
                resources_per_trial=resources,
                # a trial that trains with workers of its own must end with its process: they end with it
                reuse_actors=workers.num_workers == 1,
                raise_on_failed_trial=False,
                stop=_Interrupt(searcher),
                trial_name_creator=_own_name,
                trial_dirname_creator=_own_name,
                verbose=0,
            )
        return searcher.interrupted

    def _release(self, event: Event, entry: Entry) -> None:
        """Observe the record: a trial that has ended holds no workers."""
        if event["event"] == "end":
            release_workers(self.folder / "trials" / entry.trial_id)

    def _refuse_namesake(self, tracking: Tracking) -> None:
        if not (self.folder / "sweep.yaml").exists() and tracking.find_run(run_key(self.config.name)) is not None:
            allowed = f"another sweep of this name is in {tracking.uri}; choose another"
            raise ConfigError("name", self.config.name, allowed)

    def _save(self) -> None:
        unfinished = self.folder / ".sweep.yaml"
        unfinished.write_text(to_yaml(self.config), encoding="utf-8")
        unfinished.rename(self.folder / "sweep.yaml")

    def _start_parent(self, tracking: Tracking, data: Prepared) -> str:
        config = self.config
        objectives = json.dumps([dataclasses.asdict(o) for o in config.objectives])
        tags = {"gsa.sweep": config.name, OBJECTIVES: objectives, **git_tags()}
        parent = tracking.start_run(run_key(config.name), config.name, tags=tags)
        tracking.describe(parent, flatten(config), to_yaml(config))
        tracking.describe_data(parent, config.train.data, data.fingerprint)
        floor = bigram_bits_per_byte(data, config.train.evaluation)
        tracking.log(parent, 0, {"floor_bigram_bits_per_byte": floor})
        return parent

    def _conclude(self, tracking: Tracking, parent: str, record: Record, interrupted: bool) -> Report:
        if interrupted:
            tracking.finish(parent, "killed", "interrupted")
            raise KeyboardInterrupt
        if not any(entry.state == COMPLETE and not entry.baseline for entry in record.trials()):
            reasons = [entry.reason for entry in record.trials() if entry.reason]
            tracking.finish(parent, "failed", "no trial came to its end")
            raise RunError(
                f"no trial came to its end; the last failed because: {reasons[-1] if reasons else 'unknown'}"
            )
        report = read_report(tracking, self.config.name)
        best = next(trial for trial in report.trials if trial["trial_id"] == report.best)
        tracking.log(parent, 1, {f"best_{o['metric']}": best["metrics"][o["metric"]] for o in report.objectives})
        tracking.register(best["run_id"], self.config.name)
        tracking.finish(parent, "finished")
        return report


class _Interrupt(tune.Stopper):
    """Ends the experiment once the searcher knows that it was interrupted."""

    def __init__(self, searcher: OptunaSearcher) -> None:
        self.searcher = searcher

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.searcher.interrupted


@contextmanager
def _signals(searcher: OptunaSearcher) -> Iterator[None]:
    """Ctrl-C and a job's stop end the sweep in order; a second one ends it at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if searcher.interrupted:
            raise KeyboardInterrupt
        searcher.interrupted = True
        logger.warning("interrupted: ending the trials that run; once more ends at once")

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _own_name(trial: Any) -> str:
    return str(trial.config["trial_id"])


if __name__ == "__main__":
    from ray_jobs.cli import main

    main(["sweep", *sys.argv[1:]])
