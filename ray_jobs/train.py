"""One training run through Ray Train.

    python -m ray_jobs.train configs/train/tiny.yaml [key=value …]

Everything of a run is in `STORAGE/train/NAME`; run again, it goes on from its newest checkpoint there.
"""

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Iterator
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from types import FrameType

from ray.train import TrainingFailedError
from rich.console import Console

from gsa import spool
from gsa.background import apart, every
from gsa.config import TrainConfig, load_config
from gsa.data.packing import prepare
from gsa.errors import RunError, one_line
from gsa.tracking import connect, git_tags
from gsa.training import checkpoint
from gsa.training.loop import total_steps
from ray_jobs.cluster import concurrent_runs, fleet, running
from ray_jobs.job import Job
from ray_jobs.mlflow_writer import MlflowWriter
from ray_jobs.record import COMPLETE, FAIL, Entry, Record
from ray_jobs.runs import TrainContext
from ray_jobs.signals import stops_go_to
from ray_jobs.storage import Hold, locked, settle
from ray_jobs.worker import RESOURCES, fit, release, root_cause

logger = logging.getLogger(__name__)

PATIENCE = 300.0  # seconds that the end of a run waits for an MLflow that does not answer


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


def run_train(config: TrainConfig, console: Console) -> Finished:
    """Train a run to its end, from its newest checkpoint if it has one.

    Raises:
        RequestError: the request is wrong; nothing was started.
        RunError: a worker failed; earlier checkpoints are intact.
        KeyboardInterrupt: it was interrupted; the same call goes on from its last checkpoint.
    """
    folder = Path(config.storage) / "train" / config.name
    asked = dataclasses.asdict(config)
    steps = total_steps(config, prepare(config.data, Path(config.storage) / "data"))
    newest = checkpoint.latest(folder)
    if newest is not None:
        newest.refuse_other(config)
        console.print(f"continuing from step {newest.step} of {steps}", highlight=False)
    tracking = connect(config.tracking, config.storage)
    context = TrainContext(config.name, str(folder), git_tags())
    with locked(folder, f"run {config.name!r}") as hold, running():
        concurrent_runs(fleet(), config.workers, asked=1)
        record = Record(folder / "record.jsonl")
        entry = Entry(config.name, {}, {})
        record.propose(entry)  # again where it goes on: MLflow is then told so
        writer = MlflowWriter(tracking, record.path, context)
        writer.start()
        try:
            with stops_go_to(_interrupt), _progress(folder, steps, console):
                _fit_apart(Job(asked, str(folder), str(record.path)), hold)
            record.end(config.name, COMPLETE)
        except (RunError, TrainingFailedError) as error:
            if hold.lost:
                raise  # the record is another's now
            cause = root_cause(error)
            reason = one_line(cause) if isinstance(cause, RunError) else f"{type(cause).__name__}: {one_line(cause)}"
            record.end(config.name, FAIL, reason=reason)
            raise RunError(reason) from error
        finally:
            late = writer.finish(PATIENCE)
            if late:
                logger.error("%s; every metric is in %s, and the same command logs what is missing", late, folder)
    run = tracking.find_run(context.run(entry).key)
    if late or run is None:
        raise RunError(f"the run is trained, but {tracking.uri} was not told all of it")
    return Finished(str(run.info.run_id), folder, dict(run.data.metrics))


def _fit_apart(job: Job, hold: Hold) -> None:
    """`fit` in a thread of its own: in the main thread Ray Train would take Ctrl-C over, and end with exit code 1.

    Raises:
        RunError: another process has taken over the run's folder.
    """
    outcome = apart(partial(fit, job))
    try:
        while not wait([outcome], timeout=1).done:
            if hold.lost:
                raise RunError(f"{hold.lost}: this one stops")
        outcome.result()
    except BaseException:
        # without its workers the trainer ends; Ray must not be shut down under a thread that still uses it
        deadline = time.monotonic() + 30
        while not outcome.done() and time.monotonic() < deadline:
            release(Path(job.folder) / RESOURCES)
            wait([outcome], timeout=0.2)
        raise


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Also where a shell began this with SIGINT ignored."""
    raise KeyboardInterrupt


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
