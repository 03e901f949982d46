"""Turns on a GPU that several processes of one host share: training together, or one of them alone to measure.

- Two files per GPU are locked: a gate, and the GPU itself. Training passes through the gate and holds the GPU with the
  others that train. Whoever wants to be alone closes the gate, then waits for the GPU: nobody starts another step
  meanwhile, so the wait is no longer than the steps that have begun.
- The locks are the kernel's (`flock`): when a process dies, however it dies, it holds nothing.
- Only processes of one worker each may take turns: workers that wait for each other's steps could wait in a circle.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch


class Turns:
    """The turns of one GPU.

    Args:
        folder: of the lock files, on a file system of this host; made if it is not there.
        device: a CPU needs no turns, nothing is locked.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self._files: tuple[Path, Path] | None = None
        name = gpu_name(device)
        if name is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._files = folder / f"{name}.gate", folder / f"{name}.gpu"

    @contextmanager
    def training(self) -> Iterator[None]:
        """Use the GPU together with others that train; around one optimizer step, and not within another turn.

        Takes microseconds where nobody is alone, else waits until they are done. The GPU has finished when this ends.
        """
        if self._files is None:
            yield
            return
        gate, gpu = self._files
        with ExitStack() as turn:
            # One at a time through the gate: a stream of shared holders would keep it from whoever wants to close it.
            with _locked(gate, fcntl.LOCK_EX):
                turn.enter_context(_locked(gpu, fcntl.LOCK_SH))
            yield
            self._finish()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Use the GPU while no other process is in a turn; waits for the steps that have begun."""
        if self._files is None:
            yield
            return
        gate, gpu = self._files
        with _locked(gate, fcntl.LOCK_EX), _locked(gpu, fcntl.LOCK_EX):
            yield
            self._finish()

    def _finish(self) -> None:
        """Kernels run on after they are launched, and would do so in another's turn."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def gpu_name(device: torch.device) -> str | None:
    """The same name in every process for one GPU, whichever of them it can see; `None` for a CPU."""
    if device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


@contextmanager
def _locked(file: Path, how: int) -> Iterator[None]:
    # Opened anew each time: a lock belongs to what was opened, and threads must not share one.
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)
