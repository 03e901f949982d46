"""Standard output and error that outlive whoever reads them: a closed pipe or terminal ends the command in order."""

import os
import signal
import sys
from typing import Any


class Stream:
    """`sys.stdout` or `sys.stderr`, whichever object that is at the time.

    Where nobody can read what is written any more, the rest goes nowhere, and the process is told as by the terminal's
    own signal: SIGHUP.

    Args:
        name: `stdout` or `stderr`.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._leave()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def _stream(self) -> Any:
        return getattr(sys, self._name)

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        signal.raise_signal(signal.SIGHUP)
