"""YAML from anywhere, as plain data: no code, no cycles, no key twice, and no larger than settings ever are.

- PyYAML's safe loader runs no code, but keeps the last of two equal keys, follows aliases into more data than memory
  holds, and recurses as deep as the text is nested.
- Unquoted scalars are numbers, booleans and null by `gsa.scalars`, not by PyYAML's YAML 1.1.
"""

import copy
import pathlib
import re
import stat
from typing import Any, ClassVar

import yaml

from gsa.errors import one_line
from gsa.lines import Path, dotted, doubled
from gsa.scalars import DIGITS, PATTERNS, Unquoted, resolve

BYTES = 2**20  # of a file
DEPTH = 50
VALUES = 100_000  # with each alias counted as often as it stands there
TAG = "tag:yaml.org,2002:"
NUMBERS = (f"{TAG}int", f"{TAG}float")
TEXT = f"{TAG}str"
MERGE = re.compile("^<<$")


class PlainError(ValueError):
    """It is not plain YAML; one line says why.

    Args:
        message: why, with the place.
        line: where, from 1.
    """

    def __init__(self, message: str, line: int) -> None:
        self.line = line
        super().__init__(message)


def _resolved(loader: Any, node: yaml.ScalarNode) -> Any:
    return resolve(node.value)


def _unquoted(loader: Any, node: yaml.ScalarNode) -> Any:
    if node.style is None and node.tag == loader.resolve(yaml.ScalarNode, node.value, (True, False)):
        return Unquoted(node.value)
    return node.value if node.tag == TEXT else resolve(node.value)  # as a tag of its own says


class _Loader(yaml.SafeLoader):
    """Null, booleans, numbers, text, lists and mappings, whose keys are text as written."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {
        None: yaml.SafeLoader.construct_undefined,
        TEXT: yaml.SafeLoader.construct_yaml_str,
        f"{TAG}merge": yaml.SafeLoader.construct_yaml_str,  # where it is not a key
        f"{TAG}seq": yaml.SafeLoader.construct_yaml_seq,
        f"{TAG}map": yaml.SafeLoader.construct_yaml_map,
        **{f"{TAG}{name}": _resolved for name in PATTERNS},
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


class _UnquotedLoader(_Loader):
    """The same, but keeps what was written of unquoted scalars."""

    yaml_constructors: ClassVar[dict[Any, Any]] = _Loader.yaml_constructors | {
        TEXT: _unquoted,
        **{f"{TAG}{name}": _unquoted for name in PATTERNS},
    }


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or `gsa.scalars` would read as something else."""


_Loader.yaml_implicit_resolvers = {"<": [(f"{TAG}merge", MERGE)]}
for _name, _pattern in PATTERNS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{TAG}{_name}", _pattern, None)
_UnquotedLoader.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def parse(text: str, unquoted: bool = False) -> Any:
    """The data that a YAML text stands for; the keys of mappings are text.

    Args:
        unquoted: keep unquoted scalars as `Unquoted`, whose meaning depends on the setting that they are for.

    Raises:
        PlainError: it is not YAML, or more than plain settings.
    """
    if len(text) > BYTES:
        raise PlainError(f"it has {len(text)} characters, at most {BYTES} are read", 1)
    loader = _UnquotedLoader if unquoted else _Loader
    root = compose(text, loader=loader)
    for place, line, first in doubled(root):
        raise PlainError(f"{dotted(place)} is in line {first} and again in line {line}", line)
    return construct(root, loader)


def dump(data: Any) -> str:
    """Plain data as YAML that `parse` turns back into equal data, and any other reader of YAML too."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def compose(text: str, first: bool = False, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> yaml.Node | None:
    """The nodes of a YAML text, with their lines.

    Args:
        first: take the first document of several.
        loader: decides what scalars are; PyYAML's own reads YAML 1.1, as Ray does.

    Raises:
        PlainError: as `parse`, but for keys that are there twice.
    """
    try:
        root = next(yaml.compose_all(text, loader), None) if first else yaml.compose(text, loader)
        _size(root, (), {})
    except yaml.YAMLError as error:
        raise PlainError(one_line(error), _line(error)) from error
    except RecursionError:
        raise PlainError(f"it is nested deeper than {DEPTH}", 1) from None
    return root


def construct(root: yaml.Node | None, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The data that nodes stand for, which `compose` gave with the same loader.

    Raises:
        PlainError: a tag asks for more than data.
    """
    try:  # of a copy: what is merged in with `<<` is put among a mapping's own keys
        return None if root is None else loader("").construct_document(copy.deepcopy(root))
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
