"""Sweeps, whole: real Ray, real Optuna, real training, read back through MLflow's client."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console

from gsa.data.packing import prepare
from gsa.evaluation.floors import bigram_bits_per_byte
from ray_jobs.record import COMPLETE, Record
from ray_jobs.report import Report
from ray_jobs.sweep import load_sweep, run_sweep
from tests.draw import Draw
from tests.ray_jobs.store import Store
from tests.text import tiny

ROOT = Path(__file__).parents[2]
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115 - lives as long as the tests
STAGES = [{"kind": "dense", "steps": 4}, {"kind": "warmup", "steps": 2}, {"kind": "sparse", "steps": 6}]
SPACE: dict[str, Any] = {
    "training.optimizer.learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True},
    "model.attention.controller.k": {"type": "int", "low": 2, "high": 12},
}


def write_sweep(folder: Path, seed: int, **changes: Any) -> Path:
    """A sweep of six short trials, without a scheduler."""
    sweep: dict[str, Any] = {
        "name": "small",
        "train": tiny(folder, seed, training__stages=STAGES, evaluation__every=4),
        "space": SPACE,
        "objectives": [{"metric": "held_out_loss"}, {"metric": "held_out_selected_fraction"}],
        "num_samples": 5,
        "scheduler": {"kind": "none"},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(sweep | changes))
    return path


def run(path: Path, *overrides: str) -> Report:
    return run_sweep(load_sweep(path, list(overrides)), QUIET)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ray_jobs.cli", *arguments]


def test_the_quickstart_at_a_smaller_size(tmp_path: Path) -> None:
    small = {
        "storage": str(tmp_path / "runs"),
        "data.corpus.max_bytes": "2000000",
        "data.context_length": "64",
        "training.stages": "[{kind: dense, steps: 60}, {kind: warmup, steps: 10}, {kind: sparse, steps: 50}]",
        "training.log_every": "10",
        "evaluation": "{every: 30, sequences: 16}",
        "model.attention.controller": "{kind: variance, k: 32, k_min: 4, k_max: 64}",
    }
    overrides = [f"train.{key}={value}" for key, value in small.items()]
    overrides += ["num_samples=6", "scheduler.grace_period=30"]
    config = load_sweep(ROOT / "configs/sweep/quickstart.yaml", overrides)
    assert config.name == "quickstart"
    report = run_sweep(config, QUIET)
    store = Store(tmp_path / "runs")

    parent, children = store.parent(), store.children()
    assert parent.info.status == "FINISHED"
    assert len(children) == 7
    assert "baseline-dense" in children
    states = {"finished": "FINISHED", "stopped_early": "FINISHED"}
    for name, trial in children.items():
        state = trial.data.tags["gsa.state"]
        assert trial.info.status == states[state]
        steps = store.steps(trial, "held_out_loss")
        assert steps == sorted(set(steps))
        last = 110 if name == "baseline-dense" else 120
        assert (steps[-1] == last) == (state == "finished")
        assert trial.data.params["model.num_layers"] == "2"
        assert {"config.yaml"} <= store.artifacts(trial)
        checkpoint = {"model.safetensors", "state.pt", "config.yaml", "tokenizer.json", "checkpoint.json"}
        assert store.artifacts(trial, "checkpoint") == (checkpoint if state == "finished" else set())
        assert trial.data.tags["mlflow.source.git.commit"]
        assert trial.inputs is not None
        assert trial.inputs.dataset_inputs[0].dataset.name == "python_stdlib"
    assert any(metric.startswith("system/") for trial in children.values() for metric in trial.data.metrics)
    for row in report.trials:
        logged = children[row["trial_id"]].data.params
        for key, value in row["params"].items():
            assert logged[key] in (json.dumps(value), str(value))

    assert report.floors["dense_bits_per_byte"] == children["baseline-dense"].data.metrics["held_out_bits_per_byte"]
    data = prepare(config.train.data, tmp_path / "runs" / "data")
    assert report.floors["bigram_bits_per_byte"] == bigram_bits_per_byte(data, config.train.evaluation)
    assert report.trials[0]["trial_id"] == report.best == report.pareto[0]
    (model,) = store.client.search_registered_models()
    assert (model.name, model.latest_versions[0].run_id) == ("quickstart", report.trials[0]["run_id"])

    again = json.loads(
        subprocess.run(
            command("report", "quickstart", "--json", "--storage", str(tmp_path / "runs")),
            capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    assert {"sweep", "objectives", "trials", "pareto", "best"} <= set(again)
    assert set(again["trials"][0]) >= {"trial_id", "state", "params", "metrics", "run_id", "checkpoint"}
    assert again == json.loads(report.to_json())
    shown = subprocess.run(
        command("eval", report.trials[0]["run_id"], "--json", "--storage", str(tmp_path / "runs")),
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    evaluated = json.loads(shown)["metrics"]["held_out_loss"]
    assert evaluated == pytest.approx(report.trials[0]["metrics"]["held_out_loss"], rel=1e-4)


def test_a_sweep_exists_once_and_a_finished_one_is_only_shown_again(draw: Draw, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=2)
    first = run(path)
    refused = subprocess.run(command("sweep", str(path)), capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "exists in" in refused.stderr
    other = ["train.storage=" + str(tmp_path / "other"), f"train.tracking.uri=sqlite:///{tmp_path}/runs/mlflow.db"]
    refused = subprocess.run(command("sweep", str(path), *other), capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "another sweep of this name" in refused.stderr
    record = (tmp_path / "runs/sweeps/small/record.jsonl").read_bytes()
    resume = command("sweep", "--resume", "small", "--storage", str(tmp_path / "runs"))
    shown = subprocess.run(resume, capture_output=True, text=True, check=True)
    assert f"best: {first.best}" in shown.stdout
    assert (tmp_path / "runs/sweeps/small/record.jsonl").read_bytes() == record
    check_moved(tmp_path / "runs", tmp_path / "else where", first)


def check_moved(old: Path, new: Path, before: Report) -> None:
    """A sweep whose storage folder was moved is read, grown and evaluated in the new place; the old one stays away."""
    old.rename(new)
    here = ["--storage", str(new)]
    read = subprocess.run(command("report", "small", "--json", *here), capture_output=True, text=True, check=True)
    assert json.loads(read.stdout)["trials"] == json.loads(before.to_json())["trials"]
    grown = subprocess.run(
        command("sweep", "--resume", "small", "num_samples=3", *here), capture_output=True, text=True, check=False
    )
    assert grown.returncode == 0, grown.stderr
    assert f"sweep 'small' was moved: it goes on in {new} (was in {old})" in grown.stdout
    store = Store(new)
    assert len(store.children()) == 4
    for trial in store.children().values():
        assert "model.safetensors" in store.artifacts(trial, "checkpoint")
        assert trial.info.artifact_uri == f"{new.as_uri()}/artifacts/{trial.info.run_id}/artifacts"
    saved = yaml.safe_load((new / "sweeps/small/sweep.yaml").read_text())
    assert (saved["train"]["storage"], saved["num_samples"]) == (str(new), 3)
    best = next(trial for trial in before.trials if trial["trial_id"] == before.best)
    subprocess.run(command("eval", best["run_id"], *here), capture_output=True, check=True)
    assert not old.exists()


def test_a_trial_that_fails_is_kept_with_its_reason_and_the_sweep_goes_on(draw: Draw, tmp_path: Path) -> None:
    bad = {"type": "categorical", "choices": [1e-3, 1e30]}
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=6, dense_baseline=False)
    space = SPACE | {"training.optimizer.learning_rate": bad}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"space": space, "seed": 3}))
    report = run(path)
    children = Store(tmp_path / "runs").children()
    states = {trial["state"] for trial in report.trials}
    assert states == {"finished", "failed"}
    for trial in report.trials:
        failed = trial["params"]["training.optimizer.learning_rate"] == 1e30
        assert trial["state"] == ("failed" if failed else "finished")
        assert children[trial["trial_id"]].info.status == ("FAILED" if failed else "FINISHED")
        assert ("learning rate 1e+30" in trial["reason"]) == failed
        assert (trial["checkpoint"] is None) == failed
        assert not (failed and trial["trial_id"] in report.pareto)


def wait_for(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_whole(folder: Path, trials: int) -> None:
    """Nothing lost and nothing doubled: trials, runs, steps."""
    record = Record(folder / "sweeps/small/record.jsonl")
    assert len(record.trials()) == trials
    assert all(entry.state == COMPLETE for entry in record.trials())
    store = Store(folder)
    assert store.parent().info.status == "FINISHED"
    steps = {e.trial_id: [4, 8, 10] if e.baseline else [4, 8, 12] for e in record.trials()}
    store.check_steps(steps)
    assert {e.trial_id: sorted(e.steps) for e in record.trials()} == steps
    for trial in store.children().values():
        assert (trial.info.status, trial.data.tags["gsa.state"]) == ("FINISHED", "finished")


def test_a_driver_killed_at_any_moment_is_resumed_to_the_same_sweep(draw: Draw, tmp_path: Path) -> None:
    seed = draw.random.randrange(1000)
    path = write_sweep(tmp_path, seed, max_concurrent_trials=1)
    arguments, kills = ["sweep", str(path)], 0
    record = tmp_path / "runs/sweeps/small/record.jsonl"
    resume = ["sweep", "--resume", "small", "--storage", str(tmp_path / "runs")]
    for _ in range(3):
        process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = lines(record)
        wanted = before + draw.random.randint(2, 7)
        wait_for(lambda: lines(record) >= wanted or process.poll() is not None)  # noqa: B023 - called at once
        time.sleep(draw.random.random())
        kills += process.poll() is None
        process.kill()
        process.wait()
        arguments = resume
    assert kills >= 2
    subprocess.run(command(*resume), check=True, capture_output=True)
    check_whole(tmp_path / "runs", 6)
    (tmp_path / "whole").mkdir()
    uninterrupted = write_sweep(tmp_path / "whole", seed, max_concurrent_trials=1)
    run(uninterrupted)
    found = [Record(f / "runs/sweeps/small/record.jsonl") for f in (tmp_path, tmp_path / "whole")]
    assert [e.params for e in found[0].trials()] == [e.params for e in found[1].trials()]
    assert [e.values for e in found[0].trials()] == [e.values for e in found[1].trials()]


def trial_processes(driver: int) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ImplicitFunc" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(draw: Draw, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=2)
    record = tmp_path / "runs/sweeps/small/record.jsonl"
    process = subprocess.Popen(command("sweep", str(path)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    killed = 0
    for events in (3, 5):
        wait_for(lambda: lines(record) >= events or process.poll() is not None)  # noqa: B023 - called at once
        for trial in trial_processes(process.pid)[:1]:
            trial.kill()
            killed += 1
    assert process.wait(timeout=200) == 0
    assert killed
    check_whole(tmp_path / "runs", 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_says_how_to_go_on_and_does(draw: Draw, tmp_path: Path, number: signal.Signals) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=2)
    record = tmp_path / "runs/sweeps/small/record.jsonl"
    process = subprocess.Popen(command("sweep", str(path)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: lines(record) >= 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"To go on: gsa sweep --resume small --storage {tmp_path / 'runs'}" in errors
    store = Store(tmp_path / "runs")
    assert store.parent().info.status == "KILLED"
    assert {run.info.status for run in store.children().values()} <= {"KILLED", "FINISHED"}
    resume = command("sweep", "--resume", "small", "--storage", str(tmp_path / "runs"))
    subprocess.run(resume, check=True, capture_output=True)
    check_whole(tmp_path / "runs", 3)


def test_a_sweep_that_runs_is_not_started_again(draw: Draw, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000))
    record = tmp_path / "runs/sweeps/small/record.jsonl"
    process = subprocess.Popen(command("sweep", str(path)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: lines(record) >= 2)
    resume = command("sweep", "--resume", "small", "--storage", str(tmp_path / "runs"))
    refused = subprocess.run(resume, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "is running already" in refused.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


def test_progress_is_plain_lines_where_there_is_no_terminal(draw: Draw, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=2)
    done = subprocess.run(command("sweep", str(path)), capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    assert "3/3 trials (3 finished)" in done.stdout
    assert "started" in done.stdout
    assert "best held_out" not in done.stderr
    assert "gsa ui" in done.stdout
