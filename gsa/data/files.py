"""Which files a corpus is made of: paths and globs become files, each once, in a fixed order.

- A file is told apart by what it is (device and inode), not by its path: two links to one file are one file, and a
  split never has a copy on both sides.
- `**` visits a folder once, so a link back to a folder above it ends there.
"""

import fnmatch
import functools
import glob
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from gsa.errors import ConfigError
from gsa.paths import of_user

logger = logging.getLogger(__name__)


class SourceFile(NamedTuple):
    path: Path
    named: bool  # by its own path, not by a glob


def find_files(patterns: Iterable[str]) -> list[SourceFile]:
    """The files that paths and globs name: in the order of the patterns, those of one glob sorted.

    Raises:
        ConfigError: a path or glob names none.
    """
    found: dict[tuple[int, int], SourceFile] = {}
    for pattern in map(of_user, patterns):
        named = not glob.has_magic(pattern) or os.path.isfile(pattern)
        paths = [path for path in ([pattern] if named else sorted(_matches(pattern))) if os.path.isfile(path)]
        if not paths:
            raise ConfigError("data.corpus.files", pattern, "no such file")
        for path in paths:
            identity = _identity(path)
            known = found.get(identity, SourceFile(Path(path), named))
            found[identity] = SourceFile(known.path, known.named or named)
    return list(found.values())


def unique(paths: Iterable[Path]) -> list[Path]:
    """Paths, sorted, without those that lead to a file again."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(paths):
        found.setdefault(_identity(path), path)
    return list(found.values())


def _matches(pattern: str) -> Iterator[str]:
    """What `glob.glob(pattern, recursive=True)` finds, but each folder is searched for the same names once.

    The standard library's follows links back to folders above for as long as the system lets it.
    """
    parts = [part for part in pattern.split(os.sep) if part]
    if pattern.endswith(os.sep):
        parts.append("")  # it names folders
    visited: set[tuple[int, int, int]] = set()
    waiting = [(os.sep if pattern.startswith(os.sep) else "", 0)]
    while waiting:
        folder, depth = waiting.pop()
        place = (*_identity(folder or os.curdir), depth)
        if place in visited:
            continue
        visited.add(place)
        part, is_last = parts[depth], depth == len(parts) - 1
        deeper: list[tuple[str, int]] = []
        if part == "**":
            if not is_last:
                deeper.append((folder, depth + 1))
            names = [name for name in _names(folder) if not name.startswith(".")]
        elif glob.has_magic(part):
            names = [
                name
                for name in fnmatch.filter(_names(folder), part)
                if part.startswith(".") or not name.startswith(".")
            ]
        else:
            names = [part] if part else []
        for path in (os.path.join(folder, name) for name in names):
            if os.path.isdir(path):
                if part == "**" or not is_last:
                    deeper.append((path, depth if part == "**" else depth + 1))
            elif is_last:
                yield path
        waiting += reversed(deeper)


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or os.curdir), key=lambda name: name + os.sep)
    except OSError as error:
        _say_unreadable(folder, str(error.strerror))
        return []


@functools.cache
def _say_unreadable(folder: str, reason: str) -> None:
    logger.warning("data.corpus.files: cannot look into %s (%s)", folder, reason)


def _identity(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
