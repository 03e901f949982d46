"""Where Ray keeps its sessions: a folder whose path leaves room for its sockets.

The path of a Unix socket has at most 107 bytes (103 on macOS), and Ray's own part of it is about 70. Where TMPDIR is
longer than the rest (Slurm and macOS give each job or user a long one) Ray does not start.
"""

import logging
import os
import sys
import tempfile

from ray._common.utils import get_default_ray_temp_dir

from gsa.account import own_folder
from gsa.errors import RequestError

logger = logging.getLogger(__name__)

SOCKET = 103 if sys.platform == "darwin" else 107  # bytes of a socket's path
# what Ray adds to its folder: a session's name with the longest process id, and the longest name of a socket
SESSION = len("/session_2026-11-29_05-56-14_307547_4194304/sockets/plasma_store.10")
SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def session_folder() -> str | None:
    """The folder for Ray's sessions; `None` where Ray's own choice will do.

    Raises:
        RequestError: its own choice is too long, and no shorter folder can be written to.
    """
    usual = get_default_ray_temp_dir()
    if _fits(usual):
        return None
    for folder in SHORT:
        if os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            found = str(own_folder("gsa-ray", folder) / "ray")  # Ray opens its own folder to all users
            logger.warning("%s is too long a path for Ray's sockets; it keeps its sessions in %s", usual, found)
            return found
    most = SOCKET - SESSION - len("/ray")
    raise RequestError(f"TMPDIR = {tempfile.gettempdir()!r}: is too long for Ray's sockets: at most {most} bytes")


def _fits(folder: str) -> bool:
    return len(os.fsencode(folder)) + SESSION <= SOCKET
