"""What `make test-fast` leaves out is told by marks that can't be forgotten."""

import subprocess
import sys

import pytest

from tests.marks import GROUPS, LEFT_OUT, MARKS, QUICK


def test_a_test_that_is_not_marked_starts_no_process() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"starts a process \(python.*\): mark it as one of slow, ray, "):
        subprocess.run([sys.executable, "-c", ""], check=True)
    assert subprocess.run(["sh", "-c", "exit 3"], check=False).returncode == 3
    assert "sh" in QUICK


@pytest.mark.slow
def test_a_marked_one_does() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


def test_every_mark_is_registered(pytestconfig: pytest.Config) -> None:
    known = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    assert set(LEFT_OUT) | {mark for marks in MARKS.values() for mark in marks} <= known


def test_what_asks_for_something_shared_is_marked_and_grouped(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        for fixture in set(getattr(item, "fixturenames", [])) & set(MARKS):
            assert all(item.get_closest_marker(mark) for mark in MARKS[fixture]), item.nodeid
        if set(getattr(item, "fixturenames", [])) & set(GROUPS):
            (group,) = next(item.iter_markers("xdist_group")).args
            # as xdist tells its workers; with a pytest that it does not know, every worker starts all that is shared
            assert not request.config.getoption("loadgroup", False) or item.nodeid.endswith(f"@{group}")
