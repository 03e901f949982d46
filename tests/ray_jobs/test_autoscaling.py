"""A sweep on a cluster that Ray's own autoscaler grows from no node and shrinks to none, and that loses a node."""

import subprocess
import threading
from pathlib import Path

import pytest

from gsa.training.steps import PREFIX, steps
from tests.draw import Draw
from tests.ray_jobs.commands import command, wait_for
from tests.ray_jobs.head import link_project, running_head
from tests.ray_jobs.nodes import kill_all, running_nodes
from tests.ray_jobs.small import write_sweep
from tests.ray_jobs.store import Store
from tests.text import tiny

STEPS, EVERY = 240, 24
STAGES = [{"kind": "dense", "steps": STEPS // 2}, {"kind": "sparse", "steps": STEPS // 2}]


def numbers(folder: Path) -> set[int]:
    """The steps that a trial has checkpoints of."""
    return {int(path.name.removeprefix(PREFIX)) for path in steps(folder)}


class Checkpoints(threading.Thread):
    """Every checkpoint that a trial ever had, in order; a trial keeps its newest two."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.seen, self.ended = folder, list[int](), threading.Event()

    def run(self) -> None:
        before: set[int] = set()
        while not self.ended.wait(0.02):
            now = numbers(self.folder)
            self.seen += sorted(now - before)
            before = now


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_a_sweep_grows_its_cluster_loses_a_node_and_leaves_none(draw: Draw, tmp_path: Path) -> None:
    changes = {"evaluation__every": EVERY, "training__checkpoint_every": EVERY, "training__log_every": EVERY}
    train = tiny(tmp_path, draw.random.randrange(1000), training__stages=STAGES, **changes)
    path = write_sweep(tmp_path, 0, train=train, num_samples=1, max_failures=5, max_concurrent_trials=2)
    link_project(tmp_path)
    trials = tmp_path / "runs/sweeps/small/trials"
    with running_head(tmp_path, nodes=2, cpus=1) as head:
        assert not running_nodes(head.gcs_address)
        submit = command("submit", str(path), "--working-dir", str(tmp_path))
        with (tmp_path / "output").open("w") as output:
            job = subprocess.Popen(submit, env=head.environment, stdout=output, stderr=output, cwd=tmp_path)
        wait_for(lambda: len(running_nodes(head.gcs_address)) == 2)
        wait_for(lambda: any(EVERY <= max(numbers(trial), default=0) < STEPS / 2 for trial in trials.glob("[!.]*")))
        watched = [Checkpoints(trial) for trial in trials.glob("[!.]*")]
        for one in watched:
            one.start()
        kill_all(draw.random.choice(running_nodes(head.gcs_address)))
        newest = {one.folder.name: max(numbers(one.folder), default=0) for one in watched}
        assert job.wait(timeout=200) == 0, (tmp_path / "output").read_text()
        wait_for(lambda: not running_nodes(head.gcs_address), 60)
    for one in watched:
        one.ended.set()
        one.join()
        assert one.seen == sorted(one.seen), "a trial went back beyond its newest checkpoint"
        later = [step for step in one.seen if step > newest[one.folder.name]]
        reached = newest[one.folder.name]
        assert reached == STEPS or (later and later[0] - reached <= EVERY), (reached, one.seen)
    store = Store(tmp_path / "runs")
    assert store.parent().info.status == "FINISHED"
    store.check_steps(dict.fromkeys(store.children(), list(range(EVERY, STEPS + 1, EVERY))))
    assert len(store.children()) == 2
    assert {run.data.tags["gsa.state"] for run in store.children().values()} == {"finished"}
