"""What a cluster's GPUs hold is asked of their nodes, and what would not fit is refused before it runs."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from gsa.errors import RequestError, RunError
from gsa.training.workers import WorkersConfig
from ray_jobs.cluster import running, worker_memory
from ray_jobs.sweep import load_sweep, run_sweep
from tests.draw import Draw
from tests.ray_jobs.test_sweep import QUIET, write_sweep


@pytest.fixture
def sizes(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """MiB of the GPUs of a cluster's one node, as its `nvidia-smi` tells them; the smallest has one."""
    found = [draw.random.randrange(2, 200_000) for _ in range(draw.random.randint(1, 4))] + [1]
    draw.random.shuffle(found)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + "".join(f"echo {size}\n" for size in found))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    ray.init(num_cpus=1, num_gpus=len(found), include_dashboard=False, log_to_driver=False)
    yield found
    ray.shutdown()


def test_a_worker_may_use_its_share_of_the_smallest_gpu(sizes: list[int]) -> None:
    for share, expected in ((0.25, 2**18), (1.0, 2**20), (2.0, 2**20)):
        assert worker_memory(WorkersConfig(gpus_per_worker=share)) == expected, sizes
    assert worker_memory(WorkersConfig(gpus_per_worker=0)) is None


def test_what_does_not_fit_is_refused_before_it_runs(sizes: list[int], draw: Draw, tmp_path: Path) -> None:
    path = write_sweep(tmp_path, draw.random.randrange(1000), dense_baseline=False)
    with pytest.raises(RunError, match=r"no valid combination.*training needs about .* GiB, there are"):
        run_sweep(load_sweep(path, ["train.workers.gpus_per_worker=1", "train.model.vocab_size=50000"]), QUIET)


def test_without_a_tool_that_tells_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with running():
            assert worker_memory(WorkersConfig(gpus_per_worker=1.0)) is None
    finally:
        ray.shutdown()


def test_an_address_where_no_head_answers_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(RequestError, match=r"RAY_ADDRESS = '127\.0\.0\.1:\d+': no Ray head answers"), running():
            pass
