"""Text files, one document each, however long."""

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from gsa.data.document import Document, Skipped, empty_file
from gsa.data.files import SourceFile, unique
from gsa.data.reading import BadTextError, Read, check_text, pieces
from gsa.errors import ConfigError

HELD = 64  # pieces of a file that are kept until all of it is known to be text; a longer one is checked first


def text_files(files: list[SourceFile], read: Read) -> Iterator[Document | Skipped]:
    """The files' text; nothing of a file that is not text throughout.

    Raises:
        ConfigError: a file cannot be read or decompressed.
    """
    # named from the folder that holds them all: a corpus that is moved is split as before
    root = os.path.commonpath([file.path.absolute().parent for file in files])
    for path, named in files:
        group, found = os.path.relpath(path.absolute(), root), False
        try:
            stream = pieces(path, read)
            held = list(islice(stream, HELD))
            if len(held) == HELD:
                check_text(path)
            for text in chain(held, stream):
                if text.strip():
                    yield Document(group, text, found)
                    found = True
        except BadTextError as error:
            yield Skipped(error, f"{group} {error.allowed}", empty=False, required=named)
        else:
            if not found:
                yield empty_file(path, group, named)


def standard_library() -> list[Path]:
    """The source files of the running Python's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    unwanted = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return unique(p for p in root.rglob("*.py") if p.is_file() and not unwanted & set(p.relative_to(root).parts))


def python_files(paths: list[Path], read: Read) -> Iterator[Document | Skipped]:
    """Source files of the standard library, by package.

    Raises:
        ConfigError: a file cannot be read.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in paths:
        relative = path.relative_to(root)
        try:
            with tokenize.open(path) as file:  # honours a coding cookie
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            reason = f"{relative} is not in the encoding that it names ({error})"
            yield Skipped(ConfigError("data.corpus.source", "python_stdlib", reason), reason, empty=False)
        except OSError as error:
            reason = f"{path} cannot be read ({error.strerror})"
            raise ConfigError("data.corpus.source", "python_stdlib", reason) from error
        else:
            read(path.stat().st_size)
            if text.strip():
                yield Document(relative.parts[0], text)
            else:
                reason = f"{relative} is empty"
                yield Skipped(ConfigError("data.corpus.source", "python_stdlib", reason), reason, empty=True)
