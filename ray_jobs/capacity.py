"""What runs a cluster can hold at once: on nodes that are there, and on those that its autoscaler may start."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gsa.errors import ConfigError
from gsa.training.workers import WorkersConfig

Resources = Mapping[str, float]  # by Ray's names: CPU, GPU, accelerator_type:L40S

ACCELERATOR = "accelerator_type:"
UNASKED = ("memory", "object_store_memory")


@dataclasses.dataclass(frozen=True)
class NodeType:
    """A kind of node.

    Args:
        name: as the autoscaler knows it.
        resources: of each.
        most: how many there may be.
    """

    name: str
    resources: Resources
    most: int


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The nodes of a cluster.

    Args:
        standing: those that do not come and go.
        growing: those that an autoscaler starts and ends.
        most: how many of `growing` there may be at once, of all types together.
    """

    standing: Sequence[NodeType]
    growing: Sequence[NodeType] = ()
    most: int = 0

    @property
    def types(self) -> list[NodeType]:
        return [*self.standing, *self.growing]

    def workers(self, each: Resources) -> int:
        """How many workers fit at once that need so much each."""
        held = sum(fitting(node.resources, each) * node.most for node in self.standing)
        left = self.most
        for node in sorted(self.growing, key=lambda node: fitting(node.resources, each), reverse=True):
            nodes = min(node.most, left)
            held += nodes * fitting(node.resources, each)
            left -= nodes
        return held

    def runs(self, workers: WorkersConfig, key: str) -> int:
        """How many runs of so many workers fit at once.

        Args:
            key: of `workers` in the configuration.

        Raises:
            ConfigError: not even one; it would wait for ever.
        """
        each = worker_resources(workers)
        held = self.workers(each)
        if held == 0:
            raise next(self._reasons(workers, key))
        if held < workers.num_workers:
            wanted = " and ".join(f"{amount:g} {name}" for name, amount in each.items())
            allowed = f"the cluster holds {held} workers of {wanted} in all"
            raise ConfigError(f"{key}.num_workers", workers.num_workers, f"can never be scheduled: {allowed}")
        return held // workers.num_workers

    def _reasons(self, workers: WorkersConfig, key: str) -> Iterator[ConfigError]:
        for resource, field in (
            ("CPU", "cpus_per_worker"),
            ("GPU", "gpus_per_worker"),
            (accelerator(workers), "accelerator_type"),
        ):
            value = getattr(workers, field)
            largest = max((node.resources.get(resource, 0) for node in self.types if node.most), default=0)
            if value and largest < worker_resources(workers).get(resource, 0):
                allowed = f"the largest node has {largest:g} {resource}s"
                if field == "accelerator_type":
                    allowed = f"nodes have {', '.join(sorted(self._accelerators())) or 'no GPU of a known type'}"
                yield ConfigError(f"{key}.{field}", value, f"can never be scheduled: {allowed}")
        kinds = "; ".join(f"{node.name} has {_shown(node.resources)}" for node in self.types)
        yield ConfigError(key, _shown(worker_resources(workers)), f"no node has all of it at once: {kinds}")

    def _accelerators(self) -> set[str]:
        names = {name for node in self.types if node.most for name in node.resources}
        return {name.removeprefix(ACCELERATOR) for name in names if name.startswith(ACCELERATOR)}


def accelerator(workers: WorkersConfig) -> str:
    """Ray's resource of a type of GPU: each of its nodes has one."""
    return f"{ACCELERATOR}{workers.accelerator_type}"


def worker_resources(workers: WorkersConfig) -> dict[str, float]:
    """What one worker asks Ray for."""
    asked = {"CPU": workers.cpus_per_worker}
    if workers.gpus_per_worker:
        asked["GPU"] = workers.gpus_per_worker
    if workers.accelerator_type is not None:
        asked[accelerator(workers)] = 0.001  # a mark on the node; nobody uses it up
    return asked


def fitting(resources: Resources, each: Resources) -> int:
    """How many of `each` a node with these resources holds."""
    return int(min((resources.get(name, 0) / amount + 1e-9 for name, amount in each.items() if amount), default=0))


def configured_fleet(config: Mapping[str, Any]) -> Fleet:
    """The nodes of a cluster by the configuration of its autoscaler: Ray's `cluster.yaml`."""
    most = int(config.get("max_workers", 2))
    head = config.get("head_node_type")
    standing, growing = [], []
    for name, kind in config["available_node_types"].items():
        resources = kind.get("resources") or {}
        if name == head:
            standing.append(NodeType(name, resources, 1))
        if name != head or kind.get("max_workers"):
            growing.append(NodeType(name, resources, min(int(kind.get("max_workers", most)), most)))
    return Fleet(standing, growing, most)


def _shown(resources: Resources) -> str:
    return " and ".join(f"{n:g} {name}" for name, n in resources.items() if name not in UNASKED) or "nothing"
