"""Ray's sessions stand where the paths of its sockets are short enough."""

import os
import socket
from pathlib import Path

import pytest

from gsa.errors import RequestError
from ray_jobs import sessions
from ray_jobs.sessions import SESSION, SOCKET, session_folder


def test_the_longest_path_that_is_taken_can_be_bound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    room = SOCKET - SESSION - len("/ray")
    for length in (room, room + 1):
        folder = Path("/tmp/" + "x" * (length - len("/tmp/")))
        monkeypatch.setenv("TMPDIR", str(folder))
        assert (session_folder() is None) == (length == room)
    longest = f"{'/tmp/' + 'x' * (room - 5)}/ray/session_2026-11-29_05-56-14_307547_4194304/sockets/plasma_store.10"
    assert len(longest) == SOCKET
    with socket.socket(socket.AF_UNIX) as bound, pytest.raises(FileNotFoundError):  # not "AF_UNIX path too long"
        bound.bind(longest)
    with socket.socket(socket.AF_UNIX) as bound, pytest.raises(OSError, match="path too long"):
        bound.bind(longest + "x")


def test_bytes_count_and_not_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/" + "漢" * 12)
    found = session_folder()
    assert found == f"/tmp/gsa-ray-{os.getuid()}/ray"


def test_where_no_folder_is_short_enough_the_request_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 100)))
    monkeypatch.setattr(sessions, "SHORT", (str(tmp_path / "nowhere"),))
    with pytest.raises(RequestError, match="is too long for Ray's sockets: at most 36 bytes"):
        session_folder()
