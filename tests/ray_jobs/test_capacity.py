"""How much a cluster holds, against counting it out node by node; and which setting is named when that is nothing."""

import itertools

import pytest

from gsa.errors import ConfigError
from gsa.settings import check
from gsa.training.workers import WorkersConfig
from ray_jobs.capacity import Fleet, NodeType, configured_fleet
from tests.draw import Draw

CLUSTER = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "l40s": {"resources": {"CPU": 4, "GPU": 1, "accelerator_type:L40S": 1}, "max_workers": 4},
        "h100": {"resources": {"CPU": 192, "GPU": 8, "accelerator_type:H100": 1}, "max_workers": 2},
    },
}


def counted(fleet: Fleet, workers: WorkersConfig) -> int:
    """The most workers that any allowed choice of nodes holds, packed one after the other."""
    best = 0
    for counts in itertools.product(*(range(node.most + 1) for node in fleet.growing)):
        if sum(counts) > fleet.most:
            continue
        kinds = [(node, node.most) for node in fleet.standing] + list(zip(fleet.growing, counts, strict=True))
        held = 0
        for node, count in kinds:
            cpus, gpus = node.resources.get("CPU", 0), node.resources.get("GPU", 0)
            each = 0
            while (each + 1) * workers.cpus_per_worker <= cpus and (each + 1) * workers.gpus_per_worker <= gpus:
                each += 1
            held += count * each
        best = max(best, held)
    return best


def test_a_fleet_holds_what_counting_finds(draw: Draw) -> None:
    pick = draw.random

    def kind(name: str) -> NodeType:
        return NodeType(name, {"CPU": pick.randint(0, 9), "GPU": pick.randint(0, 4)}, pick.randint(0, 3))

    for _ in range(200):
        standing, growing = ([kind(f"{i}") for i in range(pick.randint(0, 3))] for _ in range(2))
        fleet = Fleet(standing, growing, pick.randint(0, 6))
        workers = WorkersConfig(pick.randint(1, 4), pick.choice([0.5, 1, 2, 3]), pick.choice([0, 0.5, 1, 2]))
        expected = counted(fleet, workers)
        if expected >= workers.num_workers:
            assert fleet.runs(workers, "workers") == expected // workers.num_workers
        else:
            with pytest.raises(ConfigError, match="workers"):
                fleet.runs(workers, "workers")


@pytest.mark.parametrize(
    ("workers", "held"),
    [
        (WorkersConfig(1, 4, 1), 2 * 8 + 3),
        (WorkersConfig(1, 1, 0.5), 2 * 16 + 3 * 2),
        (WorkersConfig(1, 4, 1, "L40S"), 4),
        (WorkersConfig(8, 4, 1, "H100"), 2),
        (WorkersConfig(4, 8, 1), 4),
    ],
)
def test_what_an_autoscaler_may_start_counts(workers: WorkersConfig, held: int) -> None:
    assert configured_fleet(CLUSTER).runs(workers, "train.workers") == held


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        (WorkersConfig(1, 200, 1), r"workers\.cpus_per_worker = 200: can never.*the largest node has 192 CPUs"),
        (WorkersConfig(1, 1, 9), r"workers\.gpus_per_worker = 9: can never be scheduled: the largest node has 8 GPUs"),
        (WorkersConfig(1, 1, 1, "A100"), r"workers\.accelerator_type = 'A100': can never.*nodes have H100, L40S"),
        (WorkersConfig(1, 8, 1, "L40S"), r"workers = '8 CPU and 1 GPU.*no node has all of it at once: head has 0 CPU"),
        (WorkersConfig(5, 4, 1, "L40S"), r"workers\.num_workers = 5: can never.*the cluster holds 4 workers of 4 CPU"),
    ],
)
def test_what_can_never_run_is_refused_by_its_setting(workers: WorkersConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configured_fleet(CLUSTER).runs(workers, "workers")


def test_a_type_of_gpu_is_only_asked_for_with_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"accelerator_type = 'L40S': needs gpus_per_worker > 0"):
        check(WorkersConfig(accelerator_type="L40S"))
