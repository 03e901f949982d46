"""A user id that the system has no account for, as containers have it, is as good as any other."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gsa import account
from gsa.account import own_folder
from tests.unnamed import UNNAMED, can_be_unnamed

ASK = """
import getpass, os, pathlib
assert os.getuid() == 12345
import gsa
print(getpass.getuser(), pathlib.Path.home(), os.access(pathlib.Path.home(), os.W_OK), os.environ.get("TRITON_HOME"))
"""


@can_be_unnamed
@pytest.mark.slow
def test_a_user_without_an_account_has_a_name_and_a_home(tmp_path: Path) -> None:
    kept = {key: value for key, value in os.environ.items() if key not in ("HOME", "USER", "LOGNAME", "USERNAME")}
    given = kept | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(account.__file__).parents[1])}
    done = subprocess.run([*UNNAMED, sys.executable, "-c", ASK], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    home = tmp_path / "gsa-home-12345"
    assert done.stdout.splitlines() == [f"12345 {home} True None"]
    assert home.stat().st_mode & 0o777 == 0o700


def test_who_has_an_account_keeps_what_was_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "ada")
    before = dict(os.environ)
    account.ensure()
    assert dict(os.environ) == before


def test_a_folder_that_somebody_else_made_is_not_used(tmp_path: Path) -> None:
    name = f"own-{os.getuid()}"
    assert own_folder("own", str(tmp_path)) == own_folder("own", str(tmp_path)) == tmp_path / name
    (tmp_path / name).chmod(0o777)  # another could have put files there
    assert own_folder("own", str(tmp_path)) != tmp_path / name
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(tempfile.gettempdir())
    found = own_folder("own", str(tmp_path))
    assert found.parent == tmp_path
    assert found.stat().st_mode & 0o777 == 0o700
