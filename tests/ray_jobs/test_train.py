"""One run through Ray Train: workers, interruption, failure, and what MLflow holds of it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from torch.testing import assert_close

from gsa import load_checkpoint, spool
from gsa.training.steps import PREFIX, steps
from ray_jobs.train import load_train, run_train
from tests.bench.outage import Server
from tests.draw import Draw
from tests.ray_jobs.commands import call, refused
from tests.ray_jobs.small import QUIET
from tests.ray_jobs.store import Store
from tests.seeds import seed_of
from tests.shared import SharedCluster
from tests.text import tiny
from tests.unnamed import UNNAMED, can_be_unnamed

pytestmark = pytest.mark.ray


def written(folder: Path, seed: int, **changes: Any) -> str:
    """The file of a small run's configuration."""
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(tiny(folder, seed, **changes)))
    return str(path)


def start(folder: Path, seed: int, *overrides: str, anywhere: bool = False, **changes: Any) -> "subprocess.Popen[str]":
    """Start `gsa train`.

    Args:
        folder: of the configuration, its text and its runs.
        seed: of the text and the run.
        overrides: of the configuration.
        anywhere: as in a container of somebody else's: a user id without an account, no home, and a TMPDIR that is too
            long for sockets.
        changes: to the configuration.
    """
    command = [sys.executable, "-m", "ray_jobs.train", written(folder, seed, **changes), *overrides]
    environment = dict(os.environ)
    if anywhere:
        temporary = folder / ("t" * 150)
        temporary.mkdir()
        account = ("HOME", "USER", "LOGNAME")
        environment = {name: value for name, value in environment.items() if name not in account}
        environment |= {"TMPDIR": str(temporary)}
        command = [*UNNAMED, *command]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=180)
    assert "Traceback" not in errors or process.returncode == 1
    return process.returncode, output, errors


def wait_for_step(folder: Path, step: int) -> None:
    last = time.monotonic() + 120
    while not any(int(p.name[5:]) >= step for p in steps(folder)):
        assert time.monotonic() < last, "no checkpoint came"
        time.sleep(0.02)


def wait_for_training(folder: Path, step: int) -> None:
    """Wait until a run has logged a step, saved or not."""
    last = time.monotonic() + 120
    while not any(row.step >= step for row in spool.rows(folder)):
        assert time.monotonic() < last, "no step came"
        time.sleep(0.02)


@can_be_unnamed
def test_a_user_without_an_account_trains_where_the_temporary_folder_has_a_long_path(
    draw: Draw, tmp_path: Path
) -> None:
    code, output, errors = end(start(tmp_path, draw.random.randrange(1000), anywhere=True))
    assert code == 0, errors
    assert "step 12/12" in output
    said = " ".join(errors.split())  # lines are wrapped
    assert said.count("is too long a path for Ray's sockets; it keeps its sessions in /tmp/gsa-ray-12345/ray") == 1
    assert Store(tmp_path / "runs").runs()[0].info.status == "FINISHED"


STEPS = 80
LONG: dict[str, Any] = {"training__stages": [{"kind": "sparse", "steps": STEPS}], "evaluation__every": 20}
EVALUATED = list(range(20, STEPS + 1, 20))


def interrupt(process: "subprocess.Popen[str]", number: signal.Signals, folder: Path) -> int:
    """Send a signal to a run in mid-training, and see that it saves; the step at which it did."""
    os.killpg(process.pid, number)  # as `timeout` and Slurm do: Ray's processes are of the group too
    code, _, errors = end(process)
    assert code == 130, errors
    assert f"everything is saved. To go on: gsa train {folder / 'train.yaml'}" in errors
    assert Store(folder / "runs").runs()[0].info.status == "KILLED"
    (saved,) = steps(folder / "runs/train/tiny")
    step = int(saved.name.removeprefix(PREFIX))
    assert step >= max(row.step for row in spool.rows(folder / "runs/train/tiny"))  # none is lost
    return step


def test_two_workers_train_one_model_and_mlflow_has_all_of_it(
    draw: Draw, tmp_path: Path, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    seed, folder, two = draw.random.randrange(1000), tmp_path / "runs/train/tiny", "workers.num_workers=2"
    changes = LONG | {"training__checkpoint_every": 1000}
    process = start(tmp_path, seed, two, **changes)
    wait_for_training(folder, draw.random.randint(3, 40))
    saved = interrupt(process, signal.SIGTERM, tmp_path)
    code, output, errors = call(capsys, "train", written(tmp_path, seed, **changes), two)
    assert code == 0, errors
    assert f"continuing from step {saved} of {STEPS}" in output
    (run,) = Store(tmp_path / "runs").runs()
    store = Store(tmp_path / "runs")
    assert (run.info.status, run.data.tags["gsa.state"]) == ("FINISHED", "finished")
    assert store.steps(run, "loss") == list(range(2, STEPS + 1, 2))
    assert store.steps(run, "held_out_loss") == EVALUATED
    assert run.data.params["workers.num_workers"] == "2"
    assert "model.safetensors" in store.artifacts(run, "checkpoint")
    assert f"gsa eval {run.info.run_id} --storage {tmp_path / 'runs'}" in output
    assert f"step {STEPS}/{STEPS}" in output
    assert load_checkpoint(folder).config.num_layers == 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shared_cluster: SharedCluster) -> tuple[int, Path]:
    """A seed, and the folder of a run of it that nothing interrupted: the same for every way to interrupt one."""
    seed, folder = seed_of("whole") % 1000, tmp_path_factory.mktemp("whole")
    shared_cluster.start()
    run_train(load_train(written(folder, seed, **LONG)), QUIET)
    return seed, folder


def test_an_interrupted_run_goes_on_by_itself_to_the_same_model(
    draw: Draw, tmp_path: Path, whole: tuple[int, Path], cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C, then `kill -9` of what goes on, then a folder of runs that was moved."""
    seed, uninterrupted = whole
    folder, changes = tmp_path / "runs/train/tiny", LONG | {"training__checkpoint_every": 50}
    process = start(tmp_path, seed, **changes)
    wait_for_training(folder, draw.random.randint(3, 20))
    saved = interrupt(process, signal.SIGINT, tmp_path)
    process = start(tmp_path, seed, **changes)
    wait_for_step(folder, 50)
    process.send_signal(signal.SIGKILL)
    code, output, _ = end(process)
    assert code == -signal.SIGKILL
    assert f"continuing from step {saved} of {STEPS}" in output
    home = (tmp_path / "runs").rename(tmp_path / "moved")
    folder, store = home / "train/tiny", Store(home)
    saved = int(steps(folder)[-1].name[5:])
    code, output, errors = call(capsys, "train", written(tmp_path, seed, **changes), f"storage={home}")
    assert code == 0, errors
    assert f"continuing from step {saved} of {STEPS}" in output
    assert not (tmp_path / "runs").exists()
    (run,) = store.runs()
    assert "model.safetensors" in store.artifacts(run, "checkpoint")
    assert run.info.status == "FINISHED"
    assert store.steps(run, "held_out_loss") == EVALUATED
    resumed, expected = (load_checkpoint(folder / "train/tiny") for folder in (home, uninterrupted / "runs"))
    assert_close(resumed.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_a_run_that_fails_says_why_and_ends_as_failed(
    draw: Draw, tmp_path: Path, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = "training.optimizer.learning_rate=1e30"
    code, _, errors = call(capsys, "train", written(tmp_path, draw.random.randrange(1000)), rate)
    assert code == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "learning rate 1e+30" in line
    assert "to go on from there: gsa train" in errors
    (run,) = Store(tmp_path / "runs").runs()
    assert (run.info.status, run.data.tags["gsa.state"]) == ("FAILED", "failed")
    assert "learning rate 1e+30" in run.data.tags["gsa.reason"]


def test_other_settings_under_the_same_name_are_refused_and_change_nothing(
    whole: tuple[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = whole
    files = {p: p.stat().st_mtime_ns for p in (folder / "runs/train").rglob("step-*/*")}
    assert files
    assert "model.num_layers = 3: was 2" in refused(capsys, "train", str(folder / "train.yaml"), "model.num_layers=3")
    assert {p: p.stat().st_mtime_ns for p in (folder / "runs/train").rglob("step-*/*")} == files


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An MLflow server of its own, with its artifacts, on a free port of this machine."""
    server = Server(tmp_path)
    yield server.uri
    server.kill()


@pytest.mark.services
def test_runs_and_checkpoints_go_to_a_tracking_server(
    draw: Draw, tmp_path: Path, server: str, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = call(capsys, "train", written(tmp_path, draw.random.randrange(1000)), f"tracking.uri={server}")
    assert code == 0, errors
    assert not (tmp_path / "runs/mlflow.db").exists()
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("gsa")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "held_out_loss")] == [4, 8, 12]
    storage = ("--storage", str(tmp_path / "runs"))
    code, shown, errors = call(capsys, "eval", run.info.run_id, "--tracking-uri", server, "--json", *storage)
    assert code == 0, errors
    found = json.loads(shown)
    assert found["metrics"]["held_out_loss"] == pytest.approx(run.data.metrics["held_out_loss"], rel=1e-4)
    assert "context_length = 24" in found["retrieval_refused"]
