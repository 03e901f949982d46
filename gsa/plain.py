"""YAML from anywhere, as plain data: no code, no cycles, no key twice, and no larger than settings ever are.

PyYAML's safe loader runs no code, but keeps the last of two equal keys, follows aliases into more data than memory
holds, and recurses as deep as the text is nested.
"""

import copy
import pathlib
import stat
from typing import Any

import yaml

from gsa.errors import one_line
from gsa.lines import Path, dotted, doubled

BYTES = 2**20  # of a file
DEPTH = 50
VALUES = 100_000  # with each alias counted as often as it stands there
DIGITS = 100  # of a number
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class PlainError(ValueError):
    """It is not plain YAML; one line says why.

    Args:
        message: why, with the place.
        line: where, from 1.
    """

    def __init__(self, message: str, line: int) -> None:
        self.line = line
        super().__init__(message)


def parse(text: str) -> Any:
    """The data that a YAML text stands for.

    Raises:
        PlainError: it is not YAML, or more than plain settings.
    """
    root = compose(text)
    for place, line, first in doubled(root):
        raise PlainError(f"{dotted(place)} is in line {first} and again in line {line}", line)
    return construct(root)


def compose(text: str, first: bool = False) -> yaml.Node | None:
    """The nodes of a YAML text, with their lines.

    Args:
        first: take the first document of several.

    Raises:
        PlainError: as `parse`, but for keys that are there twice.
    """
    try:
        root = next(yaml.compose_all(text, yaml.SafeLoader), None) if first else yaml.compose(text, yaml.SafeLoader)
        _size(root, (), {})
    except yaml.YAMLError as error:
        raise PlainError(one_line(error), _line(error)) from error
    except RecursionError:
        raise PlainError(f"it is nested deeper than {DEPTH}", 1) from None
    return root


def construct(root: yaml.Node | None) -> Any:
    """The data that nodes stand for.

    Raises:
        PlainError: a tag asks for more than data.
    """
    try:  # of a copy: what is merged in with `<<` is put among a mapping's own keys
        return None if root is None else yaml.SafeLoader("").construct_document(copy.deepcopy(root))
    except yaml.YAMLError as error:
        raise PlainError(one_line(error), _line(error)) from error
    except ValueError as error:  # a date that is none
        raise PlainError(one_line(error), root.start_mark.line + 1 if root else 1) from error


def read_text(path: pathlib.Path) -> str:
    """The text of a file of settings.

    Raises:
        FileNotFoundError: there is none.
        OSError: it is no regular file, or cannot be read.
        ValueError: it is too large, or not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is not a regular file")
    if status.st_size > BYTES:
        raise ValueError(f"it has {status.st_size} bytes, at most {BYTES} are read")
    return path.read_text(encoding="utf-8")


def _line(error: yaml.YAMLError) -> int:
    mark = getattr(error, "problem_mark", None)
    return int(mark.line) + 1 if mark else 1


def _size(node: yaml.Node | None, place: Path, known: dict[int, int | None]) -> int:
    """How many values a node stands for, at this place."""
    if node is None:
        return 0
    line = int(node.start_mark.line) + 1
    where = f"{dotted(place)} in line {line}"
    if len(place) > DEPTH:
        raise PlainError(f"{where} is nested deeper than {DEPTH}", line)
    if not isinstance(node, yaml.CollectionNode):
        if node.tag in NUMBERS and len(node.value) > DIGITS:
            raise PlainError(f"{where} has more than {DIGITS} digits", line)
        return 1
    if id(node) not in known:
        known[id(node)] = None
        inside = node.value if isinstance(node, yaml.MappingNode) else list(enumerate(node.value))
        found = 1
        for key, value in inside:
            if isinstance(key, yaml.CollectionNode):
                raise PlainError(f"{where} has a key that is not text", line)
            part = key if isinstance(key, int) else key.value
            found += _size(value, (*place, part), known)
        known[id(node)] = found
    size = known[id(node)]
    if size is None:
        raise PlainError(f"{where} holds itself", line)
    if size > VALUES:
        raise PlainError(f"{where}: its aliases stand for more than {VALUES} values", line)
    return size
