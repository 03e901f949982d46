"""Faults that are no trial's, a cluster that dies or a full disk: they end the sweep, which goes on afterwards."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow.entities import Run

from gsa import spool
from gsa.store import TrackingConfig
from gsa.tracking import connect
from ray_jobs.record import COMPLETE, RUNNING, Record
from ray_jobs.sweep import Sweep, resume_sweep
from tests.draw import Draw
from tests.ray_jobs.commands import command, wait_for
from tests.ray_jobs.head import running_head
from tests.ray_jobs.small import QUIET, write_sweep
from tests.ray_jobs.store import Store
from tests.text import tiny

LONG = [{"kind": "dense", "steps": 20}, {"kind": "sparse", "steps": 3000}]


def long_sweep(folder: Path, seed: int) -> Path:
    """A sweep of one trial that trains for longer than the test waits."""
    train = tiny(folder, seed, training__stages=LONG, evaluation__every=5000, training__checkpoint_every=10)
    return write_sweep(folder, seed, train=train, num_samples=1, dense_baseline=False)


def start(arguments: list[str], **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def wait_for_rows(folder: Path, rows: int) -> None:
    wait_for(lambda: any(spool.size(f.parent) and len(list(spool.rows(f.parent))) >= rows for f in _spools(folder)))


def _spools(folder: Path) -> Iterator[Path]:
    return folder.rglob("metrics.jsonl")


def kill_child(process: "subprocess.Popen[str]", name: str) -> None:
    (child,) = [c for c in psutil.Process(process.pid).children() if c.name() == name]
    child.kill()


def test_a_sweep_whose_raylet_is_killed_ends_with_a_word_and_goes_on(draw: Draw, tmp_path: Path) -> None:
    path = long_sweep(tmp_path, draw.random.randrange(1000))
    process = start(["sweep", str(path)])
    wait_for_rows(tmp_path, 10)
    kill_child(process, "raylet")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "the Ray cluster is gone: its process on this machine (raylet" in line
    assert f"To go on: gsa sweep --resume small --storage {tmp_path / 'runs'}" in errors
    record = Record(tmp_path / "runs/sweeps/small/record.jsonl")
    assert [entry.state for entry in record.trials()] == [RUNNING]
    parent = Store(tmp_path / "runs").parent()
    assert (parent.info.status, parent.data.tags["gsa.state"]) == ("FAILED", "failed")
    assert "the Ray cluster is gone" in parent.data.tags["gsa.reason"]


STUCK = """
import signal, threading, time
from ray_jobs import watchdog
watchdog.LAST, watchdog.WORDS = 0.5, 0.5
watch = watchdog._current = watchdog._Watch.__new__(watchdog._Watch)
watch.__dict__.update(again="gsa sweep", reason="it has ended", done=threading.Event(), words=[])
signal.pthread_sigmask(signal.SIG_BLOCK, [watchdog.TELLS])
threading.Thread(target=watch.run).start()
with watchdog.at_the_last(lambda reason: print("said:", reason, flush=True)):
    with watchdog.at_the_last(lambda reason: time.sleep(60)), watchdog.at_the_last(lambda reason: 1 / 0):
        time.sleep(60)
"""


def test_a_process_that_ray_holds_ends_with_its_last_words() -> None:
    """Whatever they do: the one that fails and the one that hangs keep neither the next nor the end."""
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 1
    assert done.stderr == "error: the Ray cluster is gone: it has ended\nno trial is lost. To go on: gsa sweep\n"
    assert done.stdout == "said: the Ray cluster is gone: it has ended\n"


def test_a_run_whose_joined_cluster_dies_ends_with_a_word(draw: Draw, tmp_path: Path) -> None:
    data = tiny(tmp_path, draw.random.randrange(1000), training__stages=LONG, evaluation__every=5000)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(data))
    with running_head(tmp_path) as head:
        environment = head.environment | {"RAY_ADDRESS": head.gcs_address}
        process = start(["train", str(tmp_path / "train.yaml")], **environment)
        wait_for_rows(tmp_path, 10)
        for one in psutil.process_iter(["name", "cmdline"]):
            if one.info["name"] == "gcs_server" and any(str(head.folder) in word for word in one.info["cmdline"]):
                one.kill()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "the Ray cluster is gone: " in line  # its raylet ends when the head does
    assert f"gsa train {tmp_path / 'train.yaml'}" in errors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_ends_the_sweep_and_no_trial(draw: Draw, tmp_path: Path, small_disk: Path, cluster: None) -> None:
    train = tiny(tmp_path, draw.random.randrange(1000), storage=str(small_disk / "runs"))
    train["training"] |= {"stages": [{"kind": "sparse", "steps": 60}], "checkpoint_every": 5}
    path = write_sweep(tmp_path, 0, train=train, num_samples=2, dense_baseline=False, max_failures=0)
    process = start(["sweep", str(path)])
    wait_for_rows(small_disk, 3)
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"\0" * 4096)
        except OSError:
            pass
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line
    assert errors.count("Traceback") == 0, errors
    assert len(errors.splitlines()) < 20
    (small_disk / "filler").unlink()
    resume_sweep("small", str(small_disk / "runs"), QUIET)
    record = Record(small_disk / "runs/sweeps/small/record.jsonl")
    assert [entry.state for entry in record.trials()] == [COMPLETE] * 2
    assert Store(small_disk / "runs").parent().info.status == "FINISHED"


def parent_after(tmp_path: Path, error: BaseException) -> Run:
    """The sweep's run after a driver that ended with an error."""
    from ray_jobs.sweep import load_sweep

    tracking = connect(TrackingConfig(), tmp_path / "runs")
    run_id = tracking.start_run("small/", "small", tags={"gsa.objectives": "[]"})
    sweep = Sweep(load_sweep(write_sweep(tmp_path, 0)), tmp_path / "runs/sweeps/small", QUIET)
    with pytest.raises(type(error)), sweep._state_told(tracking, run_id):
        raise error
    return tracking.client.get_run(run_id)


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (KeyboardInterrupt(), "killed", "interrupted"),
        (SystemExit(3), "failed", "3"),
        (ZeroDivisionError("at the report"), "failed", "at the report"),
        (BrokenPipeError(32, "Broken pipe"), "failed", "[Errno 32] Broken pipe"),
    ],
)
def test_a_sweep_s_run_has_its_true_state_however_the_driver_ends(
    tmp_path: Path, error: BaseException, state: str, reason: str
) -> None:
    run = parent_after(tmp_path, error)
    assert run.info.status == {"killed": "KILLED", "failed": "FAILED"}[state]
    assert (run.data.tags["gsa.state"], run.data.tags["gsa.reason"]) == (state, reason)
