"""What every command says in the same way: errors, how to go on, and what to do next."""

import sys
from typing import NoReturn, TextIO, cast

from rich.console import Console

from gsa.errors import RunError
from ray_jobs.signals import Saved
from ray_jobs.streams import Stream

console = Console(file=cast(TextIO, Stream("stdout")))
errors = Console(file=cast(TextIO, Stream("stderr")))
LINE = 1000  # characters of an error


def print_error(text: str) -> None:
    """One line, whatever the text holds; of a very long one the beginning and the end."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(shown) > LINE:
        shown = f"{shown[: LINE // 2]} … {shown[-LINE // 2 :]}"  # what was given, and what is allowed
    errors.print("error:", shown, style="red", markup=False, highlight=False, soft_wrap=True)


def failed(error: RunError, advice: str) -> NoReturn:
    """End with exit code 1."""
    print_error(str(error))
    errors.print(advice, markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


def interrupted(command: str, stop: KeyboardInterrupt) -> NoReturn:
    """End with exit code 130."""
    saved = "everything is saved" if isinstance(stop, Saved) else "steps since the last checkpoints are trained again"
    errors.print(f"interrupted; {saved}. To go on: {command}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(130)


def suggest(*commands: str) -> None:
    """Print commands to paste."""
    console.print("next: " + "\n      ".join(commands), markup=False, highlight=False, soft_wrap=True)
