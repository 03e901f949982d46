"""What tells slow tests apart: `slow`, `ray` and `services` are what `make test-fast` leaves out.

A test that uses a shared cluster or server is marked by the fixture it asks for, the tests of a module that can start
Ray by what it imports; the rest says so with `pytest.mark`. A test without a mark that starts a process fails.
"""

import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

LEFT_OUT = ("slow", "ray", "services", "gpu")
# what a fixture says of the tests that ask for it
MARKS = {
    "cluster": ("ray",),
    "shared_cluster": ("ray",),
    "no_cluster": ("ray",),
    "ray_head": ("ray", "services"),
    "services": ("services",),
    "swept": ("ray",),
}
# what a name in a test's module says of it
IMPORTS = dict.fromkeys(("command", "ray", "resume_sweep", "run_sweep", "run_train", "running_head"), "ray")
# tests of a group run in one process of xdist's, so that what they share is started once
GROUPS = {
    "services": "servers",
    "ray_head": "servers",
    "cluster": "cluster",
    "shared_cluster": "cluster",
    "ended": "cluster",  # of a module whose other tests want a cluster
    "swept": "swept",
}
QUICK = {"bash", "git", "sh", "uname"}  # programs that any test may run
CHILDREN = 1.0  # seconds of CPU time that the processes of a test that is not marked may take

_guarded: list[str] = []  # the test that runs, where it is not marked


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their fixtures; the largest groups come first, so that nobody waits for them in the end."""
    for item in items:
        fixtures, module = getattr(item, "fixturenames", []), vars(getattr(item, "module", pytest))
        marks = [mark for name in fixtures for mark in MARKS.get(name, ())]
        for mark in dict.fromkeys(marks + [mark for name, mark in IMPORTS.items() if name in module]):
            item.add_marker(mark)
        groups = [GROUPS[name] for name in GROUPS if name in fixtures]
        if groups and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(groups[0]))
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    marks = {mark.name for mark in item.iter_markers()}
    return 0 if "xdist_group" in marks else 1 if marks & set(LEFT_OUT) else 2


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    marked = any(item.get_closest_marker(mark) for mark in LEFT_OUT)
    if not marked:
        _guarded.append(item.nodeid)
    try:
        return (yield)
    finally:
        _guarded.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    before = _children()
    found = yield
    if _guarded and _children() - before > CHILDREN:
        _refuse("takes the CPU time of other processes")
    return found


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Python tells of each program before it starts it."""
    if not _guarded or event != "subprocess.Popen":
        return
    executable, command = arguments[:2]
    program = Path(os.fsdecode(executable or command[0])).name
    if program not in QUICK:
        _refuse(f"starts a process ({program})")


def _refuse(what: str) -> None:
    pytest.fail(f"{_guarded[0]} {what}: mark it as one of {', '.join(LEFT_OUT)}", pytrace=False)


sys.addaudithook(_watch)
