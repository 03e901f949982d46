"""Turns on a GPU that several processes of one host share: training together, or one of them alone to measure.

- Two files per GPU are locked: a gate, and the GPU itself. Training passes through the gate and holds the GPU with the
  others that train. Whoever wants to be alone closes the gate, then waits for the GPU: nobody starts another step
  meanwhile, so the wait is no longer than the steps that have begun.
- The locks are the kernel's (`flock`): when a process dies, however it dies, it holds nothing.
- Every user of the host takes part, whoever came first: files are opened for reading alone, which is all that a lock
  needs, made readable whatever the umask, and never written to; links are not followed.
- Only processes of one worker each may take turns: workers that wait for each other's steps could wait in a circle.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from gsa.errors import RunError


class Turns:
    """The turns of one GPU.

    Args:
        folder: of the lock files, on a file system of this host; made for all users if it is not there.
        device: a CPU needs no turns, nothing is locked.

    Raises:
        RunError: the folder is there, and another user's who does not let this one use it.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        self._files: tuple[Path, Path] | None = None
        name = gpu_name(device)
        if name is not None:
            _make_shared_folder(folder)
            self._files = folder / f"{name}.gate", folder / f"{name}.gpu"
            for file in self._files:
                _make_shared_file(file)

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
    descriptor = _open(file)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _open(file: Path) -> int:
    # without O_CREAT: in a folder like /tmp the kernel refuses that for another user's file (fs.protected_regular)
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(file, flags)
    except FileNotFoundError:  # a cleaner of temporary files has been here
        _make_shared_folder(file.parent)
        _make_shared_file(file)
        return os.open(file, flags)


def _make_shared_folder(folder: Path) -> None:
    """Make a folder in which every user may make files, as in /tmp."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        own = Path(tempfile.mkdtemp(prefix=".gsa-", dir=folder.parent))
        own.chmod(0o1777)
        try:
            own.rename(folder)  # with its mode from the first moment on
        except OSError:  # another process was faster
            own.rmdir()
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and status.st_mode & 0o1777 != 0o1777:
        folder.chmod(0o1777)


def _make_shared_file(file: Path) -> None:
    """Make an empty file that every user may read, where there is none."""
    try:
        if not file.exists():
            descriptor, own = tempfile.mkstemp(prefix=".gsa-", dir=file.parent)
            os.fchmod(descriptor, 0o644)
            os.close(descriptor)
            with contextlib.suppress(FileExistsError):
                os.link(own, file, follow_symlinks=False)  # with its mode from the first moment on
            os.unlink(own)
        os.close(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
    except OSError as error:
        remedy = f"have its owner delete {file.parent}, or set TMPDIR"
        raise RunError(f"{file}: cannot be used to take turns on the GPU ({error.strerror}); {remedy}") from error
