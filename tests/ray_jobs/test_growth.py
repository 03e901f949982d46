"""A sweep's whole life: started, interrupted, resumed, grown, moved to another folder, grown again, reported."""

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from gsa import spool
from gsa.errors import RequestError
from gsa.training.steps import steps
from ray_jobs.cli import main
from ray_jobs.cluster import running
from ray_jobs.record import COMPLETE, Record
from ray_jobs.sweep import resume_sweep
from tests.draw import Draw
from tests.ray_jobs.commands import command, wait_for
from tests.ray_jobs.small import QUIET, write_sweep
from tests.ray_jobs.store import Store
from tests.text import tiny

STAGES = [{"kind": "dense", "steps": 20}, {"kind": "sparse", "steps": 100}]


def trials(storage: Path) -> list[str]:
    """The trials of the sweep, all of which must be whole."""
    entries = Record(storage / "sweeps/small/record.jsonl").trials()
    assert {entry.state for entry in entries} == {COMPLETE}
    assert set(Store(storage).children()) == {entry.trial_id for entry in entries}
    return [entry.trial_id for entry in entries]


def configuration(storage: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((storage / "sweeps/small/sweep.yaml").read_text())
    return loaded


def last_rows(storage: Path) -> dict[str, int]:
    """The last step that each trial has logged."""
    folders = [path.parent for path in storage.rglob("metrics.jsonl")]
    return {folder.name: max((row.step for row in spool.rows(folder)), default=0) for folder in folders}


@pytest.mark.timeout(900)  # seven drivers, one after another
def test_the_life_of_a_sweep(draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = tiny(tmp_path, draw.random.randrange(1000), training__stages=STAGES)
    train["training"] |= {"checkpoint_every": 1000, "log_every": 1}
    train["evaluation"]["every"] = 60
    path = write_sweep(tmp_path, 0, train=train, num_samples=2, dense_baseline=False)
    storage, moved = tmp_path / "runs", tmp_path / "else where"

    process = subprocess.Popen(
        command("sweep", str(path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: any(step >= 5 for step in last_rows(storage).values()))
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"everything is saved. To go on: gsa sweep --resume small --storage {storage}" in errors
    assert Store(storage).parent().info.status == "KILLED"
    trained = {name: step for name, step in last_rows(storage).items() if step}
    for name, step in trained.items():
        (saved,) = steps(storage / "sweeps/small/trials" / name)
        assert int(saved.name[5:]) >= step  # no step of any trial is lost

    with running():
        resume_sweep("small", str(storage), QUIET)
        assert len(trials(storage)) == 2
        # what earlier versions left: settings that may change as params, and a file that is ahead of MLflow
        parent = Store(storage).parent().info.run_id
        for key in ("num_samples", "confirm.best", "budget.gpu_hours", "max_failures", "max_concurrent_trials"):
            Store(storage).client.log_param(parent, key, "old")
        grown = configuration(storage) | {"num_samples": 3}
        (storage / "sweeps/small/sweep.yaml").write_text(yaml.safe_dump(grown))
        resume_sweep("small", str(storage), QUIET)
        assert len(trials(storage)) == 3
        overrides = ["num_samples=4", "confirm={best: 1, seeds: 1}", "budget.gpu_hours=9", "max_failures=5"]
        resume_sweep("small", str(storage), QUIET, [*overrides, "max_concurrent_trials=1"])
        assert len(trials(storage)) == 5
        held = configuration(storage)
        assert (held["num_samples"], held["confirm"]) == (4, {"best": 1, "seeds": 1})
        tags = Store(storage).parent().data.tags
        assert (tags["gsa.setting.num_samples"], tags["gsa.setting.budget.gpu_hours"]) == ("4", "9.0")
        for wrong in ("num_samples=0", "seed=3", "train.seed=3", "budget.gpu_hours=none"):
            with pytest.raises(RequestError, match=wrong.partition("=")[0]):
                resume_sweep("small", str(storage), QUIET, [wrong])
        assert configuration(storage) == held

    # each in a process of its own, as MLflow remembers for a process where artifacts are
    storage.rename(moved)
    resume = command("sweep", "--resume", "small", "--storage", str(moved))
    done = subprocess.run([*resume, "num_samples=5"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"sweep 'small' was moved: it goes on in {moved} (was in {storage})" in done.stdout
    assert len(trials(moved)) == 6
    for trial in Store(moved).children().values():
        assert trial.info.artifact_uri == f"{moved.as_uri()}/artifacts/{trial.info.run_id}/artifacts"
        assert "model.safetensors" in Store(moved).artifacts(trial, "checkpoint")

    # the text has changed since: the copy that the trials were trained on is offered, and taken
    with (tmp_path / "text/0.txt").open("a") as file:
        file.write("x = y\n" * 50)
    before = (moved / "sweeps/small/record.jsonl").read_bytes()
    with pytest.raises(RequestError, match="the text has changed since the run began; to go on with") as refused:
        resume_sweep("small", str(moved), QUIET, ["num_samples=6"])
    assert (moved / "sweeps/small/record.jsonl").read_bytes() == before
    *given, offered = shlex.split(str(refused.value).rpartition("began with: ")[2])
    assert given == ["gsa", "sweep", "--resume", "small", "--storage", str(moved)]
    done = subprocess.run([*resume, "num_samples=6", offered], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len([name for name in trials(moved) if "-seed" not in name]) == 6  # a new best may be repeated as well
    assert offered == f"train.data.prepared={configuration(moved)['train']['data']['prepared']}"
    assert not storage.exists()

    with pytest.raises(SystemExit) as ended:
        main(["report", "small", "--json", "--storage", str(moved)])
    assert ended.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["best"] in trials(moved)
    assert len(shown["trials"]) == 6
    assert {one["trial_id"] for one in shown["confirmed"]} <= set(trials(moved))  # one, or two where a better one came
    assert shown["confirmed"]
    with pytest.raises(SystemExit) as ended:
        main(["eval", shown["trials"][0]["run_id"], "--json", "--storage", str(moved)])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["held_out_loss"] > 0  # of the text as it is now
    assert not storage.exists()
