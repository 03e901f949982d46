"""Gives a process whose user has no account what programs ask of one: a user name and a home folder.

Containers run under user ids that no line of /etc/passwd knows (OpenShift, `docker run --user`). Python, PyTorch,
MLflow and Triton take the name and the home from the environment first, and fail without either.
"""

import os
import pwd
import tempfile
from pathlib import Path


def ensure() -> None:
    """Set USER and HOME where neither the environment nor the system has them, for this process and its children.

    A home that is set is left as it is. Where it cannot be written to, Triton gets another place for compiled kernels.
    """
    uid = os.getuid()
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        account = None
    if account is None and not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        os.environ["USER"] = str(uid)
    if account is None and not os.environ.get("HOME"):
        os.environ["HOME"] = str(own_folder("gsa-home"))
    if not os.access(os.path.expanduser("~"), os.W_OK) and "TRITON_HOME" not in os.environ:
        os.environ["TRITON_HOME"] = str(own_folder("gsa-home"))


def own_folder(name: str, parent: str | None = None) -> Path:
    """A folder for temporary files that this user alone can use: the same one each time.

    Args:
        name: of the folder; the user's id is added.
        parent: where it stands; the default is the folder of temporary files.
    """
    parent = parent or tempfile.gettempdir()
    folder = Path(parent) / f"{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))  # somebody else made that one
    return folder
