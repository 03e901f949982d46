"""One training run through Ray Train.

    python -m ray_jobs.train configs/train/tiny.yaml [key=value …]

Everything of a run is in `STORAGE/train/NAME`; run again, it goes on from its newest checkpoint there.
"""

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import FrameType

from ray.train import TrainingFailedError
from rich.console import Console

from gsa.config import TrainConfig, load_config
from gsa.data.packing import prepare
from gsa.errors import RunError
from gsa.tracking import Tracking, connect, git_tags
from gsa.training import checkpoint
from gsa.training.loop import total_steps
from ray_jobs.cluster import concurrent_runs, running
from ray_jobs.storage import locked, settle
from ray_jobs.worker import Job, fit, one_line, release_workers, root_cause


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
    job = Job(asked, str(folder), f"train/{config.name}", config.name, tags=git_tags())
    with locked(folder, f"run {config.name!r}"), running():
        concurrent_runs(config.workers)
        run_id = tracking.start_run(job.run_key, job.run_name, tags=job.tags)
        try:
            with _terminable(), _progress(tracking, run_id, steps, console):
                _fit_apart(job)
        except KeyboardInterrupt:
            tracking.finish(run_id, "killed", "interrupted")
            raise
        except (RunError, TrainingFailedError) as error:
            cause = root_cause(error)
            reason = one_line(cause) if isinstance(cause, RunError) else f"{type(cause).__name__}: {one_line(cause)}"
            tracking.finish(run_id, "failed", reason)
            raise RunError(reason) from error
        tracking.finish(run_id, "finished")
    return Finished(run_id, folder, tracking.metrics(run_id))


def _fit_apart(job: Job) -> None:
    """`fit` in a thread of its own: in the main thread Ray Train would take Ctrl-C over, and end with exit code 1."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            fit(job, [])
            outcome.set_result(None)
        except Exception as error:  # noqa: BLE001 - raised again below, in the main thread
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        outcome.result()
    except KeyboardInterrupt:
        # without its workers the trainer ends; Ray must not be shut down under a thread that still uses it
        deadline = time.monotonic() + 30
        while thread.is_alive() and time.monotonic() < deadline:
            release_workers(Path(job.folder))
            thread.join(0.2)
        raise


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """A job's stop (SIGTERM) is an interruption like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _progress(tracking: Tracking, run_id: str, total_steps: int, console: Console) -> Iterator[None]:
    """Print what the run logs, as MLflow has it, until the block ends."""
    done = threading.Event()

    def follow() -> None:
        shown = tracking.last_step(run_id)
        last: dict[str, float] = {}
        while not done.is_set():
            done.wait(1)
            metrics = tracking.metrics(run_id)
            step = int(metrics.get("step", 0))
            if step > shown:
                shown = step
                named = ("loss", "held_out_loss", "held_out_bits_per_byte", "indexer_kl", "selected_fraction")
                new = [name for name in named if name in metrics and metrics[name] != last.get(name)]
                values, last = ", ".join(f"{name} {metrics[name]:.4f}" for name in new), metrics
                speed = f", {metrics['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in metrics else ""
                line = f"{time.strftime('%H:%M:%S')} step {step}/{total_steps}: {values}{speed}"
                console.print(line, highlight=False, markup=False, soft_wrap=True)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)


if __name__ == "__main__":
    from ray_jobs.cli import main

    main(["train", *sys.argv[1:]])
