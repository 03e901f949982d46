"""What a run has to say to MLflow, on disk before it counts: the run itself never waits for a server.

`metrics.jsonl` in the run's folder holds one line a row, `{"sequence", "time", "step", "metrics"}`, and `run.json` what
it is: settings and data. Whoever logs reads them from there (`ray_jobs.mlflow_writer`), as late and as often as it
must: a row keeps the time at which it was made, so that a store that holds it already recognises it.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from gsa.background import every
from gsa.errors import RunError

SYSTEM = "system/"  # how MLflow's names of a machine's use begin


class Row(NamedTuple):
    """Metrics of one step."""

    sequence: int  # of the row in its run, from 0
    time: int  # milliseconds since 1970
    step: int
    metrics: dict[str, float]


class Spool:
    """Takes a run's rows. One process at a time writes a run's.

    A row of a step that is there already, by a run that went back to a checkpoint, is dropped; a last line that a crash
    cut short is too.

    Args:
        folder: of the run, on storage that whoever logs sees too; made where there is none.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = threading.Lock()
        self._file = open_whole(folder / "metrics.jsonl")
        self.count, self.last_step, self._samples = 0, -1, 0
        for row in rows(folder):
            self.count = row.sequence + 1
            if of_system(row):
                self._samples = row.step + 1
            else:
                self.last_step = row.step

    def describe(self, description: dict[str, Any]) -> None:
        """Say what the run is; once, as what MLflow calls parameters cannot change."""
        path = self.folder / "run.json"
        if not path.exists():
            unfinished = path.with_name(".run.json")
            unfinished.write_text(json.dumps(description), encoding="utf-8")
            unfinished.rename(path)

    def append(self, step: int, metrics: dict[str, float]) -> None:
        """A row of a training step, on disk when this returns."""
        with self._lock:
            if step > self.last_step:
                self.last_step = step
                self._write(step, metrics)
                os.fsync(self._file.fileno())

    def sample(self, metrics: dict[str, float]) -> None:
        """A row of the machine's use; its step counts samples."""
        with self._lock:
            self._write(self._samples, {SYSTEM + name: value for name, value in metrics.items()})
            self._samples += 1

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        row = Row(self.count, int(time.time() * 1000), step, metrics)
        self._file.write(json.dumps(row._asdict()).encode() + b"\n")
        self._file.flush()
        self.count += 1


@contextlib.contextmanager
def system_metrics(spool: Spool, interval: float = 2.0) -> Iterator[None]:
    """Put this machine's use in the spool every `interval` seconds while the block runs, as MLflow measures it."""
    monitors: list[Any] = []

    def watch() -> None:
        if not monitors:
            monitors.extend(_monitors())
        found: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        spool.sample(found)

    with every(interval, watch):
        yield


def _monitors() -> list[Any]:
    """MLflow's; imported beside the first steps, which need not wait for it."""
    import torch
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    return [*monitors, GPUMonitor()] if torch.cuda.is_available() else monitors


def read(folder: Path, offset: int, limit: int = 1 << 22) -> tuple[list[Row], int]:
    """The rows of a run from a byte offset on, of about `limit` bytes at most, and the offset after them.

    Raises:
        RunError: a line is not a row.
    """
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(offset)
            content = file.read(limit)
    except FileNotFoundError:
        return [], offset
    whole = content.rfind(b"\n") + 1
    found = []
    for line in content[:whole].splitlines():
        try:
            found.append(Row(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{folder / 'metrics.jsonl'}: a line from byte {offset} on is not a row: {line[:80]!r}"
            ) from error
    return found, offset + whole


def rows(folder: Path) -> Iterator[Row]:
    """All rows of a run."""
    offset, found = 0, True
    while found:
        part, offset = read(folder, offset)
        found = bool(part)
        yield from part


def of_system(row: Row) -> bool:
    """Whether a row holds the machine's use, not the training's."""
    return any(name.startswith(SYSTEM) for name in row.metrics)


def size(folder: Path) -> int:
    """Bytes of a run's rows."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "metrics.jsonl").stat().st_size
    return 0


def description(folder: Path) -> dict[str, Any] | None:
    """What a run said it is; `None` before it did."""
    try:
        found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return found


def open_whole(path: Path) -> BinaryIO:
    """Open for appending, without the last line where a crash cut it short."""
    file = path.open("r+b" if path.exists() else "w+b")
    content = file.read()
    whole = content.rfind(b"\n") + 1
    file.truncate(whole)
    file.seek(whole)
    return file
