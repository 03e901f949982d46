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
from gsa.training.steps import steps
from ray_jobs.record import COMPLETE, Record
from tests.draw import Draw
from tests.ray_jobs.commands import call, command, wait_for
from tests.ray_jobs.small import write_sweep
from tests.ray_jobs.store import Store
from tests.text import tiny

STAGES = [{"kind": "dense", "steps": 10}, {"kind": "sparse", "steps": 50}]


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


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_life_of_a_sweep(draw: Draw, tmp_path: Path, cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    train = tiny(tmp_path, draw.random.randrange(1000), training__stages=STAGES)
    train["training"] |= {"checkpoint_every": 1000, "log_every": 1}
    train["evaluation"]["every"] = 30
    path = write_sweep(tmp_path, 0, train=train, num_samples=2, dense_baseline=False, max_concurrent_trials=2)
    storage, moved = tmp_path / "runs", tmp_path / "else where"

    def resume(*overrides: str, folder: Path = storage) -> tuple[int, str, str]:
        return call(capsys, "sweep", "--resume", "small", "--storage", str(folder), *overrides)

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

    # what earlier versions left: settings that may change as params, and a file that is ahead of MLflow
    parent = Store(storage).parent().info.run_id
    for key in ("num_samples", "confirm.best", "budget.gpu_hours", "max_failures", "max_concurrent_trials"):
        Store(storage).client.log_param(parent, key, "old")
    assert resume()[0] == 0
    assert len(trials(storage)) == 2
    grown = configuration(storage) | {"num_samples": 3}
    (storage / "sweeps/small/sweep.yaml").write_text(yaml.safe_dump(grown))
    assert resume()[0] == 0
    assert len(trials(storage)) == 3
    held = configuration(storage)
    for wrong in ("num_samples=0", "seed=3", "train.seed=3", "budget.gpu_hours=none"):
        code, _, errors = resume(wrong)
        assert (code, wrong.partition("=")[0] in errors) == (2, True), errors
    assert configuration(storage) == held

    # the text has changed since: the copy that the trials were trained on is offered, and taken
    text = tmp_path / "text/0.txt"
    original = text.read_bytes()
    text.write_bytes(original + b"x = y\n" * 50)
    before = (storage / "sweeps/small/record.jsonl").read_bytes()
    overrides = ["num_samples=4", "confirm={best: 1, seeds: 1}", "budget.gpu_hours=9", "max_failures=5"]
    code, _, errors = resume(*overrides)
    assert (code, "the text has changed since the run began; to go on with" in errors) == (2, True)
    assert (storage / "sweeps/small/record.jsonl").read_bytes() == before
    *given, offered = shlex.split(errors.rpartition("began with: ")[2])
    assert given == ["gsa", "sweep", "--resume", "small", "--storage", str(storage)]
    code, _, errors = resume(*overrides, offered)
    assert code == 0, errors
    assert len(trials(storage)) == 5
    held = configuration(storage)
    assert (held["num_samples"], held["confirm"]) == (4, {"best": 1, "seeds": 1})
    assert offered == f"train.data.prepared={held['train']['data']['prepared']}"
    tags = Store(storage).parent().data.tags
    assert (tags["gsa.setting.num_samples"], tags["gsa.setting.budget.gpu_hours"]) == ("4", "9.0")

    storage.rename(moved)
    code, output, errors = resume("num_samples=5", folder=moved)
    assert code == 0, errors
    assert f"sweep 'small' was moved: it goes on in {moved} (was in {storage})" in output
    assert len([name for name in trials(moved) if "-seed" not in name]) == 5  # a new best may be repeated as well
    for trial in Store(moved).children().values():
        assert trial.info.artifact_uri == f"{moved.as_uri()}/artifacts/{trial.info.run_id}/artifacts"
        assert "model.safetensors" in Store(moved).artifacts(trial, "checkpoint")

    code, output, errors = call(capsys, "report", "small", "--json", "--storage", str(moved))
    assert code == 0, errors
    shown = json.loads(output)
    assert shown["best"] in trials(moved)
    assert len(shown["trials"]) == 5
    assert {one["trial_id"] for one in shown["confirmed"]} <= set(trials(moved))  # one, or two where a better one came
    assert shown["confirmed"]
    text.write_bytes(original)
    code, output, errors = call(capsys, "eval", shown["trials"][0]["run_id"], "--json", "--storage", str(moved))
    assert code == 0, errors
    assert json.loads(output)["metrics"]["held_out_loss"] > 0
    assert not storage.exists()
