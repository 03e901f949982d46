"""How paths are read, in settings and on the command line alike.

- `~` and `~user` at the beginning are home folders; `./~x` is a file of that name.
- A relative path is relative to the shell's current folder, one in an `include` to the file that includes.
- Nothing else has a meaning: blanks, `%`, `#`, brackets and links are as the file system has them. Only
  `data.corpus.files` may hold globs, and there a file of that very name comes first.
"""

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from gsa.errors import ConfigError

SQLITE = "sqlite:///"


def of_user(path: str) -> str:
    """A path with its home folder filled in."""
    return os.path.expanduser(path)


def absolute(path: str, key: str) -> str:
    """A path that means the same in every process of this machine.

    Args:
        path: as a user writes it.
        key: of the setting that it is of.

    Raises:
        ConfigError: no file can have it.
    """
    if not path.strip() or "\0" in path:
        raise ConfigError(key, path, "must be a path")
    return os.path.abspath(of_user(path))


def names_folder(name: str) -> bool:
    """Whether what may be the name of something else is that of a folder: one that is there, or written as a path."""
    return name.startswith(("~", ".", "/")) or os.path.isdir(name)


def database_of(uri: str) -> Path | None:
    """The file of an SQLite URI, absolute; None for any other URI, and for a database in memory."""
    path, _, _ = uri.removeprefix(SQLITE).partition("?")
    if not uri.startswith(SQLITE) or path in ("", ":memory:"):
        return None
    return Path(os.path.abspath(of_user(unquote(path))))


def sqlite_uri(database: Path) -> str:
    """The SQLite URI of a file, in which only what would mean something else is quoted: `?`, and `%` as in `%20`."""
    return SQLITE + re.sub(r"%(?=[0-9A-Fa-f]{2})|\?", lambda found: quote(found[0]), str(database))


def absolute_uri(uri: str) -> str:
    """An SQLite URI whose path means the same in every process of this machine; any other as it is."""
    database = database_of(uri)
    _, mark, options = uri.partition("?")
    return uri if database is None else sqlite_uri(database) + mark + options
