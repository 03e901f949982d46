"""Running a command as a user whom the system has no account for."""

import subprocess

import pytest

UNNAMED = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]  # in a namespace of its own; needs no root
can_be_unnamed = pytest.mark.skipif(
    subprocess.run([*UNNAMED, "true"], capture_output=True, check=False).returncode != 0,
    reason="this machine makes no user namespaces",
)
