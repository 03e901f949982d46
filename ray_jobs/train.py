"""One training run through Ray Train.

    python -m ray_jobs.train configs/train/tiny.yaml [key=value …]

Everything of a run is in `STORAGE/train/NAME`; run again, it goes on from its newest checkpoint there.
"""

import contextlib
import dataclasses
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from types import FrameType

from ray.train import TrainingFailedError
from rich.console import Console

from gsa import spool
from gsa.background import apart, every
from gsa.config import TrainConfig, load_config
from gsa.errors import InfrastructureError, RunError, one_line
from gsa.tracking import connect, git_tags
from gsa.training import checkpoint
from gsa.training.loop import total_steps
from gsa.training.steps import PREFIX, steps
from ray_jobs import stop
from ray_jobs.cluster import concurrent_runs, fleet, running
from ray_jobs.job import Job
from ray_jobs.mlflow_writer import MlflowWriter
from ray_jobs.record import COMPLETE, FAIL, Entry, Record
from ray_jobs.runs import TrainContext
from ray_jobs.signals import Saved, interrupt, stops_go_to
from ray_jobs.storage import Hold, locked, settle
from ray_jobs.text import prepare_same
from ray_jobs.watchdog import at_the_last
from ray_jobs.worker import RESOURCES, fit, release, root_cause

logger = logging.getLogger(__name__)

PATIENCE = 300.0  # seconds that the end of a run waits for an MLflow that does not answer
ORDERLY = 30.0  # the same where it was interrupted, and has saved
BRIEF = 5.0  # the same where it is broken off
GRACE = 60.0  # seconds that the workers have to save and stop
RELEASE = 30.0  # seconds that the trainer has to end without its workers
STOP = ".stop"  # file in the run's folder by which workers are asked to stop


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that came to its end."""

    run_id: str
    folder: Path  # of its checkpoints
    metrics: dict[str, float]


def load_train(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """A training configuration with absolute paths: workers stand in other folders.

    Raises:
        RequestError: as `gsa.config.load_config`.
    """
    config = load_config(path, overrides)
    settle(config)
    return config


def run_train(config: TrainConfig, console: Console, command: Sequence[str] = ("gsa", "train")) -> Finished:
    """Train a run to its end, from its newest checkpoint if it has one.

    Args:
        config: of the run.
        console: where progress is printed.
        command: that goes on with the run, for errors.

    Raises:
        RequestError: the request is wrong; nothing was started.
        RunError: a worker failed; earlier checkpoints are intact.
        KeyboardInterrupt: it was interrupted; the same call goes on from its last checkpoint. `Saved` where that is of
            the last step.
    """
    with stops_go_to(interrupt):
        return _run(config, console, command)


def _run(config: TrainConfig, console: Console, command: Sequence[str]) -> Finished:
    folder = Path(config.storage) / "train" / config.name
    asked = dataclasses.asdict(config)
    data = prepare_same(config, [folder], command)
    total = total_steps(config, data)
    newest = checkpoint.latest(folder)
    if newest is not None:
        newest.refuse_other(config)
        console.print(f"continuing from step {newest.step} of {total}", highlight=False)
    tracking = connect(config.tracking, config.storage, folder)
    context = TrainContext(config.name, str(folder), git_tags())
    with locked(folder, f"run {config.name!r}") as hold, running(shlex.join(command)):
        concurrent_runs(fleet(), config.workers, asked=1)
        stop_file = folder / STOP
        stop.reset(stop_file)
        record = Record(folder / "record.jsonl")
        entry = Entry(config.name, {}, {})
        record.propose(entry)  # again where it goes on: MLflow is then told so
        writer = MlflowWriter(tracking, record.path, context)
        writer.start()
        patience = BRIEF
        try:
            with _progress(folder, total, console), at_the_last(lambda reason: writer.finish(BRIEF)):
                _fit(Job(asked, str(folder), str(record.path), str(stop_file)), total, hold)
            record.end(config.name, COMPLETE)
            patience = PATIENCE
        except Saved:
            patience = ORDERLY
            raise
        except (RunError, TrainingFailedError) as error:
            if hold.lost:
                raise  # the record is another's now
            cause = root_cause(error)
            reason = one_line(cause) if isinstance(cause, RunError) else f"{type(cause).__name__}: {one_line(cause)}"
            with contextlib.suppress(OSError):  # of the same full disk, perhaps
                record.end(config.name, FAIL, reason=reason)
            raise RunError(reason) from error
        except OSError as error:
            raise InfrastructureError(f"{folder}: {one_line(error)}") from error
        finally:
            late = writer.finish(patience)
            if late:
                logger.error("%s; every metric is in %s, and the same command logs what is missing", late, folder)
    run = tracking.find_run(context.run(entry).key)
    if late or run is None:
        raise RunError(f"the run is trained, but not all of it is in MLflow: {late or 'its run is not there'}")
    return Finished(str(run.info.run_id), folder, dict(run.data.metrics))


def _fit(job: Job, total_steps: int, hold: Hold) -> None:
    """`fit` in a thread of its own: in the main thread Ray Train would take Ctrl-C over, and end with exit code 1.

    Raises:
        KeyboardInterrupt: a signal asked for an end; `Saved` where the run has saved its last step.
        RunError: another process has taken over the run's folder.
    """
    signals: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) > 1:
            raise KeyboardInterrupt
        stop.request(Path(job.stop))
        with contextlib.suppress(OSError):  # of a terminal that is gone
            logger.warning("interrupted: the run saves and stops; once more ends at once")

    outcome = apart(partial(fit, job))
    note = Path(job.folder) / RESOURCES
    asked_at: float | None = None
    try:
        with stops_go_to(end):
            while not outcome.done():
                wait([outcome], timeout=0.2)
                if hold.lost:
                    raise RunError(f"{hold.lost}: this one stops")
                if signals and asked_at is None:
                    asked_at = time.monotonic()
                if asked_at is not None and not note.exists():
                    raise Saved  # the workers have not begun
                if asked_at is not None and time.monotonic() - asked_at > GRACE:
                    raise KeyboardInterrupt
        outcome.result()
    except BaseException:
        _release(outcome, note)
        raise
    if signals and _last_step(Path(job.folder)) < total_steps:
        raise Saved


def _release(outcome: "Future[None]", note: Path) -> None:
    """Free what the workers hold, which ends the trainer: Ray must not be shut down under a thread that uses it."""
    deadline = time.monotonic() + RELEASE
    while not outcome.done() and time.monotonic() < deadline:
        release(note)
        wait([outcome], timeout=0.2)


def _last_step(folder: Path) -> int:
    """The number of steps that the newest checkpoint has."""
    found = steps(folder)
    return int(found[-1].name.removeprefix(PREFIX)) if found else 0


@contextlib.contextmanager
def _progress(folder: Path, total_steps: int, console: Console) -> Iterator[None]:
    """Print what the run puts into its spool until the block ends."""
    offset = spool.size(folder)

    def show() -> None:
        nonlocal offset
        rows, offset = spool.read(folder, offset)
        for row in rows:
            if not spool.of_system(row):
                _print_row(row, total_steps, console)

    try:
        with every(1, show, f"reading the metrics in {folder}"):
            yield
    finally:
        show()


def _print_row(row: spool.Row, total_steps: int, console: Console) -> None:
    metrics, named = row.metrics, ("loss", "held_out_loss", "held_out_bits_per_byte", "indexer_kl", "selected_fraction")
    values = ", ".join(f"{name} {metrics[name]:.4f}" for name in named if name in metrics)
    speed = f", {metrics['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in metrics else ""
    line = f"{time.strftime('%H:%M:%S')} step {row.step}/{total_steps}: {values}{speed}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    from ray_jobs.cli import main

    main(["train", *sys.argv[1:]])
