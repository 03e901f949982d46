"""The data-parallel workers of one run: how many, on what, and which one this process is."""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from gsa.errors import ConfigError
from gsa.settings import setting


@dataclasses.dataclass
class WorkersConfig:
    num_workers: int = setting(1, "data-parallel workers", ge=1)
    cpus_per_worker: float = setting(1.0, "CPUs of each worker", gt=0)
    gpus_per_worker: float = setting(0.0, "GPUs of each worker; a fraction shares a GPU between trials", ge=0)
    accelerator_type: str | None = setting(None, "GPU that each worker needs, as Ray names it: L40S, H100; null is any")

    def check(self, prefix: str) -> None:
        if self.accelerator_type is not None and not self.gpus_per_worker:
            raise ConfigError(f"{prefix}.accelerator_type", self.accelerator_type, "needs gpus_per_worker > 0")


@dataclasses.dataclass(frozen=True)
class Workers:
    """This process among the workers of its run, as torch.distributed knows them."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def current(cls) -> "Workers":
        """One worker unless a process group exists; on a GPU where CUDA is available."""
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every worker's tensor; in fp64, so that it hardly depends on their number."""
        total = tensor.detach().double().to(self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def largest(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum of every worker's tensor, fp64."""
        largest = tensor.detach().double().to(self.device)
        if self.world > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The mean over workers of each value."""
        if self.world == 1 or not values:
            return values
        means = self.sum(torch.tensor(list(values.values()), dtype=torch.double)) / self.world
        return dict(zip(values, means.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any worker."""
        if self.world == 1:
            return flag
        return bool(self.largest(torch.tensor(float(flag))))

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()
