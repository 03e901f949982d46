"""Rows of JSON lines, one document each; of arrays of rows, and of rows that span lines, too.

Only the text column is read: what the others hold, or when they first hold something, does not matter.
"""

import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

from gsa.data.document import Document, Skipped, empty_file, missing_column, row
from gsa.data.reading import BadTextError, Read, Source, decode, lines, opened
from gsa.errors import ConfigError, one_line

HEAD = 1 << 20  # bytes that tell JSON lines from other JSON; of the latter, characters that are read at once
LARGEST_ROW = 1 << 28  # characters of a row that spans lines

# what json.loads raises; too many brackets, or digits, are not a JSONDecodeError
NOT_JSON = (ValueError, RecursionError)


def json_rows(files: Iterable[tuple[Source, bool]], column: str, read: Read) -> Iterator[Document | Skipped]:
    """The rows of JSON files, in order.

    Args:
        files: each with whether the request names that very file.
        column: which holds the text.
        read: is told of bytes as they are read.

    Raises:
        ConfigError: a file cannot be read, is in another encoding, or is wrong within an array or a row that spans
            lines.
    """
    for path, named in files:
        found = False
        for number, value in _values(path, read):
            found = True
            yield _row(value, path, number, column)
        if not found:
            yield empty_file(path, os.path.basename(path), named)


def _row(value: Any, path: Source, number: int, column: str) -> Document | Skipped:
    place, name = f"line {number}", os.path.basename(path)
    if isinstance(value, BadTextError):
        return Skipped(value, f"{name} {value.allowed}", empty=False)
    if not isinstance(value, dict):
        reason = f"{place}: holds {type(value).__name__}, not an object"
        return Skipped(ConfigError("data.corpus.files", str(path), reason), f"{name} {reason}", empty=False)
    if column not in value:
        error = missing_column(column, list(value), f"{path}, {place}")
        return Skipped(error, f"{name} {place}: has no {column}", empty=False)
    return row(value[column], "data.corpus.files", str(path), column, place, name)


def _values(path: Source, read: Read) -> Iterator[tuple[int, Any]]:
    """Each value with the number of its first line; in place of a line that is not JSON, the error that says so."""
    if not _is_lines(path):
        yield from _values_across_lines(path, read)
        return
    for number, line in lines(path, read):
        try:
            yield number, json.loads(decode(line, path, number))
        except BadTextError as error:
            yield number, error
        except NOT_JSON as error:
            yield number, BadTextError("data.corpus.files", str(path), _not_json(number, error))


def _is_lines(path: Source) -> bool:
    """Whether a JSON file is no array, and its first value ends in the line in which it begins."""
    with opened(path, lambda _: None) as file:
        start = file.read(HEAD).decode(errors="ignore").lstrip()
    if start.startswith("["):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(start)
    except NOT_JSON:
        return True
    return "\n" not in start[:end]


BETWEEN = re.compile(r"[\s,\[\]]*")


def _values_across_lines(path: Source, read: Read) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder()
    text, number, depth, more = "", 1, 0, True
    with opened(path, read) as file:
        characters = io.TextIOWrapper(file, encoding="utf-8", newline="")
        while more:
            try:
                # as much as is held already: what is cut off is decoded again from its start
                chunk = characters.read(max(HEAD, len(text)))
            except UnicodeDecodeError as error:
                reason = f"is not UTF-8 ({error.reason}) after line {number}"
                raise ConfigError("data.corpus.files", str(path), reason) from error
            text, more, place = text + chunk, bool(chunk), 0
            while True:
                between = BETWEEN.match(text, place)
                start = between.end() if between else place
                line = number + text.count("\n", place, start)
                try:
                    value, end = decoder.raw_decode(text, start)
                except NOT_JSON as error:
                    if start < len(text) and (not more or len(text) - place > LARGEST_ROW):
                        raise ConfigError("data.corpus.files", str(path), _not_json(line, error)) from error
                    break
                yield line, value
                depth += text.count("[", place, start) - text.count("]", place, start)
                number, place = line + text.count("\n", start, end), end
            text = text[place:]
    if depth != text.count("]") - text.count("["):
        raise ConfigError("data.corpus.files", str(path), f"its array does not end (line {number})")


def _not_json(number: int, error: Exception) -> str:
    reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
    return f"line {number} is not JSON ({reason})"
