"""What was spent, by the record alone."""

from pathlib import Path

import pytest

from gsa.errors import ConfigError
from gsa.training.workers import WorkersConfig
from ray_jobs.budget import Budget, BudgetConfig, wall_seconds
from ray_jobs.capacity import NodeType
from ray_jobs.record import Entry, Record
from tests.draw import Draw

GPU_NODE, CPU_NODE = NodeType("gpu8", {"CPU": 64, "GPU": 8}, 1), NodeType("head", {"CPU": 4}, 1)
PRICES = {"gpu8": 32.0, "default": 1.0}


def test_a_trial_pays_for_its_share_of_the_node_that_it_needs() -> None:
    for workers, hour in (
        (WorkersConfig(1, 4, 1), 32.0 / 8),
        (WorkersConfig(2, 4, 0.5), 2 * 32.0 / 16),
        (WorkersConfig(1, 48, 1), 32.0 * 48 / 64),  # its CPUs are the larger share
    ):
        budget = Budget(BudgetConfig(prices=PRICES), workers, [CPU_NODE, GPU_NODE])
        cost = budget.cost(Entry("t", {}, {}, seconds=1800))
        assert cost.money == pytest.approx(hour / 2)
        assert cost.gpu_hours == pytest.approx(workers.num_workers * workers.gpus_per_worker / 2)
    assert Budget(BudgetConfig(prices=PRICES), WorkersConfig(1, 1), [CPU_NODE]).price == 0.25


def test_each_bound_is_named_when_it_is_reached(draw: Draw) -> None:
    workers, nodes = WorkersConfig(1, 4, 1), [GPU_NODE]
    entries = [Entry(str(i), {}, {}, seconds=draw.random.uniform(0, 7200)) for i in range(5)]
    hours = sum(entry.seconds for entry in entries) / 3600
    for name, spent in (("gpu_hours", hours), ("money", hours * 4)):
        for factor, reached in ((1.01, False), (0.99, True)):
            config = BudgetConfig(**{name: spent * factor}, prices=PRICES)
            found = Budget(config, workers, nodes).spent([], entries, 0)
            assert bool(found) == reached
            assert not found or f"budget.{name}" in found
    imported = [*entries, Entry("old", {}, {}, seconds=1e9, imported="run")]
    assert not Budget(BudgetConfig(gpu_hours=hours * 1.01), workers, nodes).spent([], imported, 0)


def test_time_between_lives_does_not_count(tmp_path: Path) -> None:
    now = 1000.0
    record = Record(tmp_path / "r.jsonl", lambda: now)
    record.begin()
    record.propose(Entry("t", {}, {}))
    now = 1060.0
    record.result("t", 1, {})
    now = 5000.0  # the driver was dead
    record.begin()
    now = 5030.0
    assert wall_seconds(record.events, now) == 90
    assert wall_seconds(Record(tmp_path / "r.jsonl").events, now) == 90
    budget = Budget(BudgetConfig(wall_hours=90 / 3600), WorkersConfig(), [])
    assert budget.spent(record.events, [], now).startswith("budget.wall_hours = 0.025 is spent")
    assert not budget.spent(record.events, [], now - 1)


def test_prices_that_are_missing_are_named() -> None:
    with pytest.raises(ConfigError, match=r"budget\.prices = 'gpu8': has no price; there are prices of head"):
        Budget(BudgetConfig(prices={"head": 1.0}), WorkersConfig(1, 1, 1), [GPU_NODE])
    with pytest.raises(ConfigError, match=r"budget\.money = 5\.0: cannot be kept"):
        Budget(BudgetConfig(money=5.0, prices=PRICES), WorkersConfig(1, 1, 1), [CPU_NODE])
    with pytest.raises(ConfigError, match="needs prices"):
        BudgetConfig(money=5.0).check("budget")
    with pytest.raises(ConfigError, match="must be >= 0"):
        BudgetConfig(prices={"a": -1.0}).check("budget")
