"""What a cluster's GPUs hold is asked of their nodes, and what would not fit is refused before it runs."""

import contextlib
import dataclasses
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from gsa.errors import ConfigError, RequestError, RunError
from gsa.training.workers import WorkersConfig
from ray_jobs import sweep
from ray_jobs.cluster import running, worker_memory
from ray_jobs.record import RUNNING, Proposal, Record
from ray_jobs.runs import TrialContext
from ray_jobs.sweep import load_sweep, resume_sweep, run_sweep
from ray_jobs.trial import make_trainable
from tests.draw import Draw
from tests.ray_jobs.small import QUIET, write_sweep
from tests.shared import SharedCluster

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("gpus")]

FOLDER = Path(tempfile.gettempdir()) / f"gsa-gpus-{os.getpid()}"  # all programs that a node finds
TOOL = FOLDER / "nvidia-smi"


@contextlib.contextmanager
def cluster_with_gpus() -> Iterator[None]:
    """A cluster of one node with five H100, which finds no program but a shell and, where a test has one, `TOOL`."""
    FOLDER.mkdir()
    for name in ("bash", "sh"):  # Ray starts workers with it
        program = shutil.which(name)
        assert program is not None
        (FOLDER / name).symlink_to(program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(FOLDER))
        resources: dict[str, float] = {"accelerator_type:H100": 1}
        ray.init(num_cpus=3, num_gpus=5, resources=resources, include_dashboard=False, log_to_driver=False)
    try:
        with running():
            yield
    finally:
        ray.shutdown()
        shutil.rmtree(FOLDER)


@pytest.fixture
def gpus(shared_cluster: SharedCluster) -> Iterator[None]:
    shared_cluster.start(cluster_with_gpus)
    yield
    TOOL.unlink(missing_ok=True)


@pytest.fixture
def sizes(draw: Draw, gpus: None) -> list[int]:
    """MiB of the node's GPUs, as its `nvidia-smi` tells them; the smallest has one."""
    found = [draw.random.randrange(2, 200_000) for _ in range(draw.random.randint(1, 4))] + [1]
    draw.random.shuffle(found)
    TOOL.write_text("#!/bin/sh\n" + "".join(f"echo {size}\n" for size in found))
    TOOL.chmod(0o755)
    return found


def test_a_worker_may_use_its_share_of_the_smallest_gpu(sizes: list[int]) -> None:
    for share, expected in ((0.25, 2**18), (1.0, 2**20), (2.0, 2**20)):
        assert worker_memory(WorkersConfig(gpus_per_worker=share)) == expected, sizes
    assert worker_memory(WorkersConfig(gpus_per_worker=0)) is None


def test_what_does_not_fit_is_refused_before_it_runs(sizes: list[int], draw: Draw, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), dense_baseline=False, gate=True)
    with pytest.raises(ConfigError, match=r"none of 200 draws .* is valid; .*training needs about .* GiB, there are"):
        run_sweep(load_sweep(path, ["train.workers.gpus_per_worker=1", "train.model.vocab_size=50000"]), QUIET)
    assert not (tmp_path / "runs/sweeps/small/sweep.yaml").exists()  # its name is not taken


def test_without_a_tool_that_tells_nothing_is_refused(gpus: None) -> None:
    assert worker_memory(WorkersConfig(gpus_per_worker=1.0)) is None


def test_storage_that_a_node_does_not_see_ends_the_sweep_and_costs_it_no_trial(
    draw: Draw, tmp_path: Path, gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=2, dense_baseline=False)

    def elsewhere(context: TrialContext) -> Callable[[Proposal], None]:
        return make_trainable(dataclasses.replace(context, folder=str(tmp_path / "nowhere")))

    config = load_sweep(path)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "make_trainable", elsewhere)
        with pytest.raises(RunError, match=r"must be a folder that all nodes share: \S+ does not see .*nowhere"):
            run_sweep(config, QUIET)
    record = Record(tmp_path / "runs/sweeps/small/record.jsonl")
    assert {entry.state for entry in record.trials()} == {RUNNING}
    report = resume_sweep("small", str(tmp_path / "runs"), QUIET)
    assert [trial["state"] for trial in report.trials] == ["finished"] * 2


def test_trials_run_where_their_type_of_gpu_is(draw: Draw, tmp_path: Path, gpus: None) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), num_samples=1, dense_baseline=False)
    ask = ["train.workers.gpus_per_worker=0.25"]
    with pytest.raises(ConfigError, match=r"accelerator_type = 'L40S': can never be scheduled: nodes have H100"):
        run_sweep(load_sweep(path, [*ask, "train.workers.accelerator_type=L40S"]), QUIET)
    report = run_sweep(load_sweep(path, [*ask, "train.workers.accelerator_type=H100"]), QUIET)
    assert [trial["state"] for trial in report.trials] == ["finished"]


def test_an_address_where_no_head_answers_is_refused_at_once(no_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(RequestError, match=r"RAY_ADDRESS = '127\.0\.0\.1:\d+': no Ray head answers"), running():
            pass


def test_nothing_of_a_cluster_outlives_the_command_that_started_it(no_cluster: None) -> None:
    earlier = set(psutil.Process().children(recursive=True))
    with running():
        assert ray.get(ray.remote(worker_memory).remote(WorkersConfig())) is None
        started = set(psutil.Process().children(recursive=True)) - earlier
        assert len(started) > 5  # servers, agents and workers
    assert psutil.wait_procs(started, timeout=10)[1] == []
