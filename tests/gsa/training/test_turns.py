"""Turns on a GPU, taken by real processes: whoever measures is alone, soon, and nobody's death blocks the others."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import pytest
import torch

from gsa.errors import RunError
from gsa.training import turns
from gsa.training.turns import Turns

FORK = multiprocessing.get_context("fork")  # they only lock files; a fresh interpreter would first import torch
CPU = torch.device("cpu")
PATIENCE = 60  # seconds until a process that should get its turn is given up


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "gpu_name", lambda device: "GPU-0")


def train(folder: Path, inside: "Synchronized[int]", steps: "Synchronized[int]") -> None:
    mine = Turns(folder, CPU)
    while True:
        with mine.training():
            with inside.get_lock():
                inside.value += 1
            time.sleep(0.002)
            with inside.get_lock():
                inside.value -= 1
            with steps.get_lock():
                steps.value += 1


def hold(folder: Path, kind: str, entered: "Synchronized[int]") -> None:
    with getattr(Turns(folder, CPU), kind)():
        entered.value = 1
        time.sleep(PATIENCE)


@contextlib.contextmanager
def started(target: object, *arguments: object, count: int = 1) -> Iterator[list[int]]:
    processes = [FORK.Process(target=target, args=arguments, daemon=True) for _ in range(count)]  # type: ignore[arg-type]
    for process in processes:
        process.start()
    try:
        yield [process.pid or 0 for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait_for(value: "Synchronized[int]", least: int) -> None:
    end = time.monotonic() + PATIENCE
    while value.value < least:
        assert time.monotonic() < end, f"{value.value} of {least} after {PATIENCE} s"
        time.sleep(0.001)


def test_nobody_trains_while_one_is_alone_and_steps_that_have_begun_are_all_it_waits_for(tmp_path: Path) -> None:
    inside, steps = FORK.Value("i", 0), FORK.Value("i", 0)
    mine, count, rounds, waited = Turns(tmp_path, CPU), 4, 25, []
    with started(train, tmp_path, inside, steps, count=count):
        wait_for(steps, 2 * count)
        for _ in range(rounds):
            before = steps.value
            with mine.alone():
                waited.append(steps.value - before)
                for _ in range(5):
                    assert inside.value == 0
                    time.sleep(0.001)
            wait_for(steps, steps.value + count)  # they go on afterwards
    print("steps that others ended before it was alone:", waited)
    assert max(waited) <= 5 * count
    assert sum(waited) <= 2 * count * rounds


def test_several_train_at_once(tmp_path: Path) -> None:
    entered = FORK.Value("i", 0)
    with started(hold, tmp_path, "training", entered):
        wait_for(entered, 1)
        with Turns(tmp_path, CPU).training():
            pass


@pytest.mark.parametrize("kind", ["training", "alone"])
def test_a_killed_holder_frees_its_turn(tmp_path: Path, kind: str) -> None:
    entered, next_one = FORK.Value("i", 0), FORK.Value("i", 0)
    with started(hold, tmp_path, kind, entered) as (pid,):
        wait_for(entered, 1)
        with started(hold, tmp_path, "alone", next_one):
            time.sleep(0.05)
            assert not next_one.value
            os.kill(pid, signal.SIGKILL)
            wait_for(next_one, 1)


def test_an_error_within_a_turn_ends_it(tmp_path: Path) -> None:
    mine = Turns(tmp_path, CPU)
    for turn in (mine.training, mine.alone, mine.training):
        with pytest.raises(KeyError), turn():
            raise KeyError


def test_gpus_do_not_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Turns(tmp_path, CPU).alone():
        monkeypatch.setattr(turns, "gpu_name", lambda device: "GPU-1")
        with Turns(tmp_path, CPU).alone():
            pass


def as_user(uid: int, folder: Path, outcome: "Synchronized[int]") -> None:
    """1 where the turns of a GPU work for a user, 2 where they are refused in one line."""
    os.umask(0o077)
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    try:
        mine = Turns(folder, CPU)
        with mine.training():
            pass
        with mine.alone():
            outcome.value = 1
    except RunError as error:
        outcome.value = 2 if "have its owner delete" in str(error) else 3


def outcome_for(uid: int, folder: Path) -> int:
    outcome = FORK.Value("i", 0)
    with started(as_user, uid, folder, outcome):
        wait_for(outcome, 1)
    return int(outcome.value)


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become other users")


@pytest.fixture
def world() -> Iterator[Path]:
    """A folder as /tmp is: everybody may make files in it, and delete their own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o1777)
        yield Path(name)


@needs_root
def test_users_share_turns_whoever_came_first_and_whatever_the_umask(world: Path) -> None:
    assert [outcome_for(uid, world / "turns") for uid in (12345, 23456, 0, 12345)] == [1, 1, 1, 1]
    assert stat.S_IMODE((world / "turns").stat().st_mode) == 0o1777
    assert {stat.S_IMODE(file.stat().st_mode) for file in (world / "turns").iterdir()} == {0o644}
    assert sorted(file.name for file in (world / "turns").iterdir()) == ["GPU-0.gate", "GPU-0.gpu"]


@needs_root
def test_a_folder_that_another_user_keeps_closed_is_one_line(world: Path) -> None:
    (world / "turns").mkdir(mode=0o755)  # root's
    assert outcome_for(12345, world / "turns") == 2
    assert outcome_for(0, world / "turns") == 1  # its owner opens it
    assert outcome_for(12345, world / "turns") == 1


def test_a_link_in_the_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    for folder, target in (("there", victim), ("dangling", tmp_path / "made")):
        victim.write_text("precious")
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "GPU-0.gate").symlink_to(target)
        with pytest.raises(RunError, match=r"GPU-0\.gate: cannot be used to take turns"):
            Turns(tmp_path / folder, CPU)
    assert (victim.read_text(), (tmp_path / "made").exists()) == ("precious", False)


def test_a_cleaner_of_temporary_files_does_no_harm(tmp_path: Path) -> None:
    mine = Turns(tmp_path / "turns", CPU)
    shutil.rmtree(tmp_path / "turns")
    with mine.training():
        pass


def test_a_cpu_needs_no_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    mine = Turns(tmp_path / "locks", CPU)
    with mine.alone(), mine.training():
        assert not (tmp_path / "locks").exists()
