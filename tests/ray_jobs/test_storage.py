"""One driver at a time: a second is refused with the name of the first, and the lock of a dead one is none."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gsa.errors import RequestError
from ray_jobs import storage
from ray_jobs.storage import STALE, locked

HOLD = """
import sys, time
from pathlib import Path
from ray_jobs.storage import locked
with locked(Path(sys.argv[1]), "sweep 's'"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_second_driver_is_told_who_the_first_is_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(RequestError, match=f"sweep 's' is running already .process {process.pid} of .* on") as refused,
        locked(tmp_path, "sweep 's'"),
    ):
        pass
    assert socket.gethostname() in str(refused.value)
    process.kill()
    process.wait()
    with locked(tmp_path, "sweep 's'"):
        assert json.loads((tmp_path / ".owner.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".owner.json").exists()


def test_an_owner_on_another_machine_is_believed_as_long_as_it_gives_signs_of_life(tmp_path: Path) -> None:
    note = tmp_path / ".owner.json"
    note.write_text(json.dumps({"host": "elsewhere", "pid": 7, "user": "ada"}))
    with (
        pytest.raises(RequestError, match="process 7 of ada on elsewhere; if it is not, delete"),
        locked(tmp_path, "sweep 's'"),
    ):
        pass
    assert note.exists()
    old = time.time() - STALE - 1
    os.utime(note, (old, old))
    with locked(tmp_path, "sweep 's'"):
        assert json.loads(note.read_text())["host"] == socket.gethostname()


def test_a_note_that_is_no_note_keeps_nobody_out(tmp_path: Path) -> None:
    for content in ("", "{", "[1]", '{"host": 1}'):
        (tmp_path / ".owner.json").write_text(content)
        with locked(tmp_path, "sweep 's'"):
            pass


def test_the_note_is_removed_and_the_lock_free_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path, "sweep 's'"):
        raise KeyError
    assert not (tmp_path / ".owner.json").exists()
    with locked(tmp_path, "sweep 's'"):
        pass


def test_an_owner_that_was_taken_over_knows_it_and_leaves_the_new_owners_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "STALE", 0.06)
    note = tmp_path / ".owner.json"
    other = json.dumps({"host": "elsewhere", "pid": 7, "user": "ada"})
    with locked(tmp_path, "sweep 's'") as hold:
        time.sleep(0.05)
        assert hold.lost == ""
        note.unlink()
        wait_for(note.exists)  # it is still ours, and comes back
        note.write_text(other)
        wait_for(lambda: bool(hold.lost))
        assert "was taken over by process 7 of ada on elsewhere" in hold.lost
    assert note.read_text() == other


def test_a_note_that_cannot_be_renewed_is_reported_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage, "STALE", 0.06)
    note = tmp_path / ".owner.json"
    with locked(tmp_path, "sweep 's'") as hold:
        note.unlink()
        note.mkdir()
        wait_for(lambda: any("others may take it over" in message for message in caplog.messages))
        assert sum("is tried again" in message for message in caplog.messages) == 1
        note.rmdir()
        wait_for(note.is_file)
        assert hold.lost == ""


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
