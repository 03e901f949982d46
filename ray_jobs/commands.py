"""Shell commands that are printed for a user to paste: quoted, and complete with the store that they are about."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from gsa.store import TrackingConfig

Options = Mapping[str, object]  # a long option to its value; None: a flag


def shell(*words: object) -> str:
    """A command line that a POSIX shell splits into exactly these words."""
    return shlex.join(map(str, words))


def gsa(command: str, *arguments: object, options: Options | None = None) -> str:
    """A command line of `gsa`; arguments and values may start with a dash."""
    return command_line(("gsa", command), arguments, options or {})


def command_line(program: Sequence[str], arguments: Sequence[object], options: Options) -> str:
    """A command line of a program that takes options before or after its arguments, and `--` before the latter."""
    words: list[object] = []
    for name, value in options.items():
        if value is None:
            words.append(name)
        else:
            words += [f"{name}={value}"] if str(value).startswith("-") else [name, value]
    if any(str(argument).startswith("-") for argument in arguments):
        return shell(*program, *words, "--", *arguments)
    return shell(*program, *arguments, *words)


def at_storage(storage: str | Path) -> Options:
    """`--storage`, unless it is the default."""
    return {} if os.path.abspath(storage) == os.path.abspath("runs") else {"--storage": storage}


def at_store(tracking: TrackingConfig, storage: str | Path) -> Options:
    """Where a command finds the runs that were logged with this configuration: the storage folder's own store, unless
    the configuration names another."""
    place = at_storage(storage) if tracking.uri is None else {"--tracking-uri": tracking.uri}
    if tracking.experiment == TrackingConfig().experiment:
        return place
    return {**place, "--experiment": tracking.experiment}
