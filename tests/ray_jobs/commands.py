"""The command line: in the test's own process, or as a process that can be watched, signalled and killed."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ray_jobs.cli import main

ROOT = Path(__file__).parents[2]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The exit code, output and errors of `gsa ARGUMENTS`, run in this process."""
    logging.raiseExceptions = False  # Ray's handlers still hold an earlier test's captured output
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    output, errors = capsys.readouterr()
    return int(ended.value.code or 0), output, errors


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refused request."""
    code, output, errors = call(capsys, *arguments)
    assert code == 2, output + errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in errors
    return line


def command(*arguments: str) -> list[str]:
    """What starts `gsa ARGUMENTS` as a process of its own."""
    return [sys.executable, "-m", "ray_jobs.cli", *arguments]


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def trial_processes(driver: int) -> list[psutil.Process]:
    """Those that train the trials of a sweep, by the process that runs it."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ImplicitFunc" in " ".join(process.cmdline()):
                found.append(process)
    return found
