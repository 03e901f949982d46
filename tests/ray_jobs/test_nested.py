"""Trials of several workers: started once, freed where their trial's process dies, new after a failure."""

import contextlib
import subprocess
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from gsa import load_checkpoint
from gsa.errors import RunError
from ray_jobs.nested import begin, release_dead
from ray_jobs.record import COMPLETE, FAIL, PAUSED, Record
from tests.draw import Draw
from tests.ray_jobs.commands import command, trial_processes, wait_for
from tests.ray_jobs.small import check_whole, run, write_sweep

pytestmark = pytest.mark.ray

HELD_OUT = [{"metric": "held_out_loss"}]
RATE = "training.optimizer.learning_rate"


def groups(folder: Path) -> int:
    """How many times workers were started."""
    return len(list((folder / "runs/sweeps/small/trials/.ray_train").glob("gsa-workers-*")))


def notes(folder: Path) -> list[Path]:
    return list((folder / "runs/sweeps/small/trials/.workers").glob("*"))


def test_workers_outlast_trials_that_end_or_pause(draw: Draw, tmp_path: Path, cluster: None) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=3, dense_baseline=False)
    scheduler = "scheduler={kind: halving, grace_period: 8, reduction_factor: 2}"
    report = run(path, "train.workers.num_workers=2", "objectives=[{metric: held_out_loss}]", scheduler)
    assert len(report.trials) == 3
    assert {trial["state"] for trial in report.trials} <= {"finished", "stopped_early"}
    states = [entry.state for entry in Record(tmp_path / "runs/sweeps/small/record.jsonl").trials()]
    assert len(states) == 3
    assert PAUSED in states
    assert FAIL not in states
    load_checkpoint(tmp_path / "runs/sweeps/small/trials" / str(report.best))
    assert groups(tmp_path) == 1
    assert not notes(tmp_path)  # nothing is held any more


def test_a_trial_that_fails_ends_its_workers_alone(draw: Draw, tmp_path: Path, cluster: None) -> None:
    rates = {RATE: {"type": "categorical", "choices": [1e-3, 1e30]}}
    path = write_sweep(
        tmp_path, draw.random.randrange(1000), space=rates, objectives=HELD_OUT, num_samples=3, dense_baseline=False,
        searcher={"sampler": "random"}, gate=False,
    )  # fmt: skip
    with contextlib.suppress(RunError):  # all of them may fail
        run(path, "train.workers.num_workers=2")
    trials = Record(tmp_path / "runs/sweeps/small/record.jsonl").trials()
    for trial in trials:
        assert trial.state == (FAIL if trial.settings[RATE] == 1e30 else COMPLETE), trial
        assert (trial.state == COMPLETE) or "learning rate 1e+30" in trial.reason
    failed = [trial.state for trial in trials].count(FAIL)
    assert failed <= groups(tmp_path) <= failed + 1


def test_workers_whose_trial_is_killed_are_let_go(draw: Draw, tmp_path: Path) -> None:
    path = write_sweep(
        tmp_path, draw.random.randrange(1000), num_samples=1, objectives=HELD_OUT, dense_baseline=False, max_failures=3
    )
    process = subprocess.Popen(command("sweep", str(path), "train.workers.num_workers=2"), stdout=subprocess.DEVNULL)
    wait_for(lambda: notes(tmp_path))
    for trial in trial_processes(process.pid):
        trial.kill()
    assert process.wait(timeout=200) == 0
    assert groups(tmp_path) == 2
    check_whole(tmp_path / "runs", 1)


def test_what_a_driver_has_left_is_let_go_by_the_next_and_nothing_else_is(tmp_path: Path, cluster: None) -> None:
    begin(tmp_path)
    assert len((tmp_path / ".drivers").read_text().split()) == 2
    group = placement_group([{"CPU": 1}])
    ray.get(group.ready())
    own, job = ray.get_runtime_context().get_session_name(), ray.get_runtime_context().get_job_id()
    cases = (
        ([f"{own} {job}"], "CREATED"),  # it runs
        ([f"{own} {job}", f"{own} {job}"], "CREATED"),  # it runs, and has begun a second time
        ([f"another {job}", f"{own} ffffffff"], "CREATED"),  # the same number in another Ray
        ([f"{own} eeeeeeee", f"{own} ffffffff"], "CREATED"),  # nobody's that we know
        ([f"{own} {job}", f"{own} ffffffff"], "REMOVED"),
    )
    for lines, state in cases:
        (tmp_path / ".drivers").write_text("".join(f"{line}\n" for line in lines))
        release_dead(tmp_path)
        assert placement_group_table(group)["state"] == state, lines
