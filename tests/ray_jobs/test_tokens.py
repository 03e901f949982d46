"""Ray's token, in a process of its own: Ray remembers what it has found."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray_jobs.tokens import use_a_token
use_a_token()
assert enable_token_auth_by_default() == (os.environ["RAY_AUTH_MODE"] == "token")  # as `ray.init` goes on
ensure_token_if_auth_enabled()
print(os.environ["RAY_AUTH_MODE"], len(os.environ.get("RAY_AUTH_TOKEN", "")))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("home", "mode", "printed"),
    [("own", None, "token 0"), ("/proc/nowhere", None, "token 64"), ("own", "disabled", "disabled 0")],
)
def test_a_token_is_there_and_nothing_is_said_of_it(tmp_path: Path, home: str, mode: str | None, printed: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    environment |= {"HOME": str(tmp_path) if home == "own" else home} | ({"RAY_AUTH_MODE": mode} if mode else {})
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == printed, done.stderr
    token = tmp_path / ".ray/auth_token"
    assert token.exists() == (printed == "token 0")
    told = done.stderr.splitlines()
    assert len(told) == token.exists()  # once, that a file was made in the user's home
    if token.exists():
        assert "Generated new authentication token" in told[0]
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
