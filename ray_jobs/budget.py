"""What a sweep may spend: time, GPU-hours and money, over all of its lives."""

import dataclasses
from collections.abc import Iterable

from gsa.errors import ConfigError
from gsa.settings import setting
from gsa.training.workers import WorkersConfig
from ray_jobs.capacity import NodeType, fitting, worker_resources
from ray_jobs.events import Event
from ray_jobs.record import Entry


@dataclasses.dataclass
class BudgetConfig:
    wall_hours: float | None = setting(None, "hours that the sweep may run, over all of its lives", gt=0)
    gpu_hours: float | None = setting(None, "GPU-hours of training, over all trials", gt=0)
    money: float | None = setting(None, "cost of training, over all trials, in the currency of prices", gt=0)
    prices: dict[str, float] = setting(dict, "price of an hour of a node, by node type; default is every other's")

    def check(self, prefix: str) -> None:
        for name, price in self.prices.items():
            if not price >= 0:
                raise ConfigError(f"{prefix}.prices.{name}", price, "must be >= 0")
        if self.money is not None and not self.prices:
            raise ConfigError(f"{prefix}.money", self.money, "needs prices: what an hour of a node costs, by node type")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What training has cost."""

    seconds: float
    gpu_hours: float
    money: float


class Budget:
    """Spending by the record.

    Args:
        config: the bounds.
        workers: of one trial.
        nodes: that the cluster has or may start. A trial pays for its share of the node type with the most GPUs.
    """

    def __init__(self, config: BudgetConfig, workers: WorkersConfig, nodes: Iterable[NodeType]) -> None:
        self.config, self.workers = config, workers
        self.price = self._price(list(nodes))

    def cost(self, entry: Entry) -> Cost:
        """What one trial has cost so far."""
        hours = entry.seconds / 3600
        return Cost(entry.seconds, *(hours * rate for rate in self.rates.values()))

    @property
    def rates(self) -> dict[str, float]:
        """GPU-hours and money of an hour of one trial."""
        gpus = self.workers.num_workers * self.workers.gpus_per_worker
        return {"gpu_hours": gpus, "money": self.price}

    def spent(self, events: Iterable[Event], entries: Iterable[Entry], now: float) -> str:
        """Which bound is reached, in words; nothing while none is."""
        config = self.config
        if config.wall_hours is None and config.gpu_hours is None and config.money is None:
            return ""  # asked at every turn of Tune's loop
        costs = [self.cost(entry) for entry in entries if entry.imported is None]
        found = {
            "wall_hours": wall_seconds(events, now) / 3600 if config.wall_hours else 0.0,
            "gpu_hours": sum(cost.gpu_hours for cost in costs),
            "money": sum(cost.money for cost in costs),
        }
        for name, value in found.items():
            bound = getattr(config, name)
            if bound is not None and value >= bound:
                return f"budget.{name} = {bound:g} is spent ({value:.3g})"
        return ""

    def _price(self, nodes: list[NodeType]) -> float:
        """Of an hour of one trial."""
        if not self.config.prices:
            return 0.0
        asked = worker_resources(self.workers)
        able = [node for node in nodes if fitting(node.resources, asked)]
        if not able and self.config.money is not None:
            raise ConfigError("budget.money", self.config.money, "cannot be kept: no node that is known holds a trial")
        if not able:
            return 0.0
        node = max(able, key=lambda n: n.resources.get("GPU", 0))
        share = max(each / node.resources[name] for name, each in asked.items())
        price = self.config.prices.get(node.name, self.config.prices.get("default"))
        if price is None:
            known = ", ".join(sorted(self.config.prices))
            raise ConfigError("budget.prices", node.name, f"has no price; there are prices of {known}, and no default")
        return price * share * self.workers.num_workers


def wall_seconds(events: Iterable[Event], now: float) -> float:
    """How long drivers have worked on the sweep: each from its beginning to its last event, the last one to now."""
    total, began, last = 0.0, None, 0.0
    for event in events:
        if event["event"] == "life":
            total += last - began if began is not None else 0.0
            began = event["time"]
        last = event["time"]
    return total + (now - began if began is not None else 0.0)
