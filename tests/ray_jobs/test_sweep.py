"""Sweeps, whole: real Ray, real Optuna, real training, read back through MLflow's client."""

import dataclasses
import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from gsa.data.packing import prepare
from gsa.errors import RequestError
from gsa.evaluation.floors import bigram_bits_per_byte
from ray_jobs.record import Record
from ray_jobs.sweep import load_sweep, resume_sweep, run_sweep
from tests.draw import Draw
from tests.ray_jobs.commands import ROOT, call, command, refused, trial_processes, wait_for
from tests.ray_jobs.small import QUIET, SPACE, check_whole, lines, run, write_sweep
from tests.ray_jobs.store import Store

pytestmark = pytest.mark.ray


def test_the_quickstart_at_a_smaller_size(tmp_path: Path, cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
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

    storage = ("--storage", str(tmp_path / "runs"))
    code, shown, _ = call(capsys, "report", "quickstart", "--json", *storage)
    assert code == 0
    again = json.loads(shown)
    assert {"sweep", "objectives", "trials", "pareto", "best"} <= set(again)
    assert set(again["trials"][0]) >= {"trial_id", "state", "params", "metrics", "run_id", "checkpoint"}
    assert again == json.loads(report.to_json())
    code, shown, _ = call(capsys, "eval", report.trials[0]["run_id"], "--json", *storage)
    assert code == 0
    evaluated = json.loads(shown)["metrics"]["held_out_loss"]
    assert evaluated == pytest.approx(report.trials[0]["metrics"]["held_out_loss"], rel=1e-4)


@dataclasses.dataclass(frozen=True)
class Ended:
    """A sweep of two trials and a dense one that ran as a process of its own, without a terminal."""

    config: Path
    storage: Path
    output: str
    errors: str
    meanwhile: str  # why it could not be continued while it ran


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder, seed = tmp_path_factory.mktemp("ended"), random.randrange(1000)
    print(f"seed {seed}")
    path, storage = write_sweep(folder, seed, num_samples=2), folder / "runs"
    process = subprocess.Popen(command("sweep", str(path)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: lines(storage / "sweeps/small/record.jsonl") >= 2)
    with pytest.raises(RequestError) as meanwhile:
        resume_sweep("small", str(storage), QUIET)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return Ended(path, storage, output, errors, str(meanwhile.value))


def test_a_sweep_that_runs_is_not_started_again(ended: Ended) -> None:
    assert "is running already" in ended.meanwhile


def test_a_sweep_exists_once_and_a_finished_one_is_only_shown_again(
    ended: Ended, tmp_path: Path, cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "exists in" in refused(capsys, "sweep", str(ended.config))
    other = [f"train.storage={tmp_path / 'other'}", f"train.tracking.uri=sqlite:///{ended.storage}/mlflow.db"]
    assert "another sweep of this name" in refused(capsys, "sweep", str(ended.config), *other)
    record = (ended.storage / "sweeps/small/record.jsonl").read_bytes()
    _, report, _ = call(capsys, "report", "small", "--json", "--storage", str(ended.storage))
    code, shown, _ = call(capsys, "sweep", "--resume", "small", "--storage", str(ended.storage))
    assert code == 0
    assert f"best: {json.loads(report)['best']}" in shown
    assert (ended.storage / "sweeps/small/record.jsonl").read_bytes() == record


def test_a_trial_that_fails_is_kept_with_its_reason_and_the_sweep_goes_on(
    draw: Draw, tmp_path: Path, cluster: None
) -> None:
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


def test_a_driver_killed_at_any_moment_is_resumed_to_the_same_sweep(draw: Draw, tmp_path: Path, cluster: None) -> None:
    seed = draw.random.randrange(1000)
    path = write_sweep(tmp_path, seed, num_samples=4)
    arguments, kills = ["sweep", str(path)], 0
    record = tmp_path / "runs/sweeps/small/record.jsonl"
    resume = ["sweep", "--resume", "small", "--storage", str(tmp_path / "runs")]
    for _ in range(2):
        process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = lines(record)
        wanted = before + draw.random.randint(2, 5)
        wait_for(lambda: lines(record) >= wanted or process.poll() is not None)  # noqa: B023 - called at once
        time.sleep(draw.random.random())
        kills += process.poll() is None
        process.kill()
        process.wait()
        arguments = resume
    assert kills == 2
    resume_sweep("small", str(tmp_path / "runs"), QUIET)
    check_whole(tmp_path / "runs", 5)
    (tmp_path / "whole").mkdir()
    uninterrupted = write_sweep(tmp_path / "whole", seed, num_samples=4)
    run(uninterrupted)
    found = [Record(f / "runs/sweeps/small/record.jsonl") for f in (tmp_path, tmp_path / "whole")]
    assert [e.params for e in found[0].trials()] == [e.params for e in found[1].trials()]
    assert [e.values for e in found[0].trials()] == [e.values for e in found[1].trials()]


def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(draw: Draw, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=1)
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
    check_whole(tmp_path / "runs", 2)


def test_a_second_signal_ends_a_sweep_at_once_and_it_goes_on(
    draw: Draw, tmp_path: Path, cluster: None, hangups: None
) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=2)
    record = tmp_path / "runs/sweeps/small/record.jsonl"
    process = subprocess.Popen(command("sweep", str(path)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: lines(record) >= 3)
    process.send_signal(signal.SIGHUP)  # the first: for SIGTERM alone see test_growth
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "steps since the last checkpoints are trained again" in errors
    assert f"To go on: gsa sweep --resume small --storage {tmp_path / 'runs'}" in errors
    store = Store(tmp_path / "runs")
    assert store.parent().info.status == "KILLED"
    assert {run.info.status for run in store.children().values()} <= {"KILLED", "FINISHED"}
    resume_sweep("small", str(tmp_path / "runs"), QUIET)
    check_whole(tmp_path / "runs", 3)


def test_progress_is_plain_lines_where_there_is_no_terminal(ended: Ended) -> None:
    assert "\x1b" not in ended.output
    assert "3/3 trials (3 finished)" in ended.output
    assert "started" in ended.output
    assert "best held_out" not in ended.errors
    assert "gsa ui" in ended.output
