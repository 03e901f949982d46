"""What is done beside a block goes on after an error, and says so once for each kind."""

import logging
import threading

import pytest

from gsa.background import every


def test_an_error_is_logged_once_and_the_call_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    calls, enough = 0, threading.Event()

    def call() -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            enough.set()
        if calls != 3:
            raise (OSError(28, "No space left on device") if calls < 5 else ValueError("not a number"))

    with caplog.at_level(logging.ERROR), every(0.001, call, "renewing the lock of runs"):
        assert enough.wait(10), "the thread ended"
    assert caplog.messages == [
        "renewing the lock of runs failed, and is tried again (OSError: [Errno 28] No space left on device)",
        "renewing the lock of runs failed, and is tried again (ValueError: not a number)",
    ]


def test_the_calls_end_with_the_block_also_where_it_raises() -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), every(0.001, lambda: None, "nothing"):
        raise KeyError
    assert threading.active_count() == before
