"""How a driver and its signals reach the runs that train for it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ray_jobs import stop
from ray_jobs.signals import STOPS, interrupt, stops_go_to, stops_held


def test_a_request_reaches_whoever_watches_and_a_reset_takes_it_back(tmp_path: Path) -> None:
    path = tmp_path / "run/.stop"
    assert not stop.watch(path)()  # there is no such file yet
    stop.reset(path)
    asked = stop.watch(path)
    assert not asked()
    stop.request(path)
    assert stop.watch(path)()
    assert not asked()  # it looked a moment ago
    stop.reset(path)
    assert not stop.watch(path)()


def test_a_watch_looks_again_after_its_interval_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "INTERVAL", 0.0)
    stop.reset(tmp_path / ".stop")
    asked = stop.watch(tmp_path / ".stop")
    assert not asked()
    stop.request(tmp_path / ".stop")
    assert asked()
    (tmp_path / ".stop").unlink()
    assert asked()


@pytest.mark.parametrize("number", STOPS)
def test_signals_go_to_the_handler_while_the_block_runs(hangups: None, number: signal.Signals) -> None:
    before = [signal.getsignal(s) for s in STOPS]
    with pytest.raises(KeyboardInterrupt), stops_go_to(interrupt):
        signal.raise_signal(number)
    assert [signal.getsignal(s) for s in STOPS] == before


def test_what_nohup_ignores_stays_ignored() -> None:
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stops_go_to(interrupt):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, earlier)


@pytest.mark.slow
def test_signals_to_the_group_do_not_reach_what_was_started_while_they_were_held() -> None:
    program = "import signal, sys; print('ready', flush=True); sys.stdin.readline(); print('alive', flush=True)"
    command = [sys.executable, "-c", program]
    with stops_held():
        held = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert held.stdout is not None
    assert held.stdout.readline() == "ready\n"
    for number in STOPS:
        os.kill(held.pid, number)
    assert held.communicate("\n", timeout=30)[0] == "alive\n"
    assert held.returncode == 0


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_a_command_in_order(hangups: None) -> None:
    program = (
        "import signal, sys\n"
        "from ray_jobs.cli import console\n"
        "from ray_jobs.signals import interrupt, stops_go_to\n"
        "try:\n"
        "    with stops_go_to(interrupt):\n"
        "        sys.stdin.readline()\n"
        "        for i in range(1000): console.print(i)\n"
        "except KeyboardInterrupt:\n"
        "    console.print('to nobody')\n"
        "    sys.exit(130)\n"
    )
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert (process.wait(timeout=60), errors) == (130, "")
