"""What settings there are: the keys, declarations and types of a settings dataclass, and the nearest to a wrong key.

Keys are dotted; the elements of a list are in brackets, `model.layers[2].k`, and `[]` stands for any of them.
"""

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from gsa.errors import RequestError
from gsa.settings import join

Schema = type[Any]
MOST_SUGGESTED = 3  # keys that an error suggests

hints_of: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)


def parts_of(key: str) -> list[str | int]:
    """The names and indices of a key, in order; what else stands in brackets is text."""
    parts: list[str | int] = []
    for name, index in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", key):
        parts.append(name or (int(index) if index.isdecimal() and len(index) < 10 else index))
    return parts


def element_type(hint: Any) -> Any:
    """The type under `list[...]` and `... | None`."""
    arguments = [a for a in typing.get_args(hint) if a is not types.NoneType]
    if typing.get_origin(hint) in (list, typing.Union, types.UnionType) and arguments:
        return element_type(arguments[0])
    return hint


def declared(schema: Schema, key: str) -> tuple["dataclasses.Field[Any]", Any]:
    """The declaration and the type of the setting that a key (with or without indices) names.

    An index at the end names an element of a list. The keys of a mapping that is itself a setting are not looked into.

    Raises:
        RequestError: no such setting; the nearest one is suggested.
    """
    current: Any = schema
    field: dataclasses.Field[Any] | None = None
    hint: Any = schema
    walked = ""
    for part in (p for p in parts_of(re.sub(r"\[[^\]]*\]", "", key)) if isinstance(p, str)):
        if typing.get_origin(current) is dict:
            break
        known = {f.name: f for f in dataclasses.fields(current)} if dataclasses.is_dataclass(current) else {}
        if part not in known:
            raise unknown(schema, key, join(walked, part), list(known))
        field, walked, hint = known[part], join(walked, part), hints_of(current)[part]
        current = element_type(hint)
    if field is None:
        raise RequestError("an empty key names no setting")
    return field, current if key.endswith("]") else hint


def field_of(schema: Schema, key: str) -> "dataclasses.Field[Any]":
    """As `declared`, the declaration alone."""
    return declared(schema, key)[0]


def all_keys(schema: Schema) -> list[str]:
    """The key of every setting that has no settings of its own, without brackets."""
    keys = list(_keys(schema))
    return [key.replace("[]", "") for key in keys if not any(k.startswith((f"{key}.", f"{key}[].")) for k in keys)]


def unknown(schema: Schema, key: str, walked: str = "", known: list[str] | None = None) -> RequestError:
    """The error for a key that names no setting, with those that it may stand for.

    Args:
        schema: where it was looked for.
        key: as it was given, from the top of the schema.
        walked: as far as it could be followed, its first unknown part included; without it, all of the key.
        known: the settings that are there in its place.
    """
    known = known or []
    if similar := _ending_as(schema, key) or _ending_nearly_as(schema, key, walked or key, known):
        return RequestError(f"{key}: no such setting; did you mean {' or '.join(map(repr, similar))}?")
    return RequestError(f"{key}: no such setting" + (f"; known here: {', '.join(known)}" if known else ""))


def _ending_nearly_as(schema: Schema, key: str, walked: str, known: list[str]) -> list[str]:
    """What a key with a slip of the keyboard stands for: a name known in that place, or any key."""
    last = walked.split(".")[-1]
    if here := difflib.get_close_matches(last, known, 1):
        return here
    *above, name = key.split(".")
    if anywhere := difflib.get_close_matches(name, dict.fromkeys(k.split(".")[-1] for k in all_keys(schema)), 1, 0.75):
        return _ending_as(schema, ".".join([*above, *anywhere]))
    return difflib.get_close_matches(key, all_keys(schema), 1)


def _ending_as(schema: Schema, key: str) -> list[str]:
    """The keys whose last name is that of a wrong key, those most like it, its own brackets in them."""
    brackets = re.findall(r"\[[^\]]*\]", key)
    names = [part for part in parts_of(re.sub(r"\[[^\]]*\]", "", key)) if isinstance(part, str)]
    known = {k: k.replace("[]", "").split(".") for k in _keys(schema) if k.count("[]") == len(brackets)}
    closeness = {k: _closeness(names, parts) for k, parts in known.items() if parts[-1:] == names[-1:]}
    best = [k for k, close in closeness.items() if close == max(closeness.values())]
    return [_filled(k, brackets) for k in best[:MOST_SUGGESTED]]


def _closeness(given: list[str], known: list[str]) -> tuple[int, float]:
    """How many names two keys have in common at their end, then how alike they are."""
    end = 0
    for a, b in zip(reversed(given), reversed(known), strict=False):
        if a != b:
            break
        end += 1
    # of a name alone nothing tells which one is meant
    alike = difflib.SequenceMatcher(None, ".".join(given), ".".join(known)).ratio() if len(given) > 1 else 0.0
    return end, alike


def _filled(key: str, brackets: list[str]) -> str:
    for bracket in brackets:
        key = key.replace("[]", bracket, 1)
    return key


def _keys(schema: Schema, prefix: str = "") -> Iterator[str]:
    """Every key, of settings that have settings of their own too, with `[]` after the name of a list of them."""
    for name, hint in hints_of(schema).items():
        key, inner = join(prefix, name), element_type(hint)
        yield key
        if dataclasses.is_dataclass(inner):
            several = typing.get_origin(hint) is list
            yield from _keys(typing.cast(Schema, inner), f"{key}[]" if several else key)
