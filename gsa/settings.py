"""How a setting is declared, and how its bounds are checked.

Each part of the project declares its settings in a dataclass beside its code, with
`setting(default, doc, bounds)`. What is declared there is all there is: YAML files,
`key=value` overrides, search spaces and MLflow parameters derive from it.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from gsa.errors import ConfigError

LARGEST = 2**63 - 1  # integer that torch, NumPy and databases take


def setting(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Iterable[str] | None = None,
    read: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None,
) -> Any:
    """One field of a settings dataclass: its default, its meaning and its bounds.

    Args:
        default: the value, or a callable (a dataclass, `list`, a lambda) that makes it.
        doc: what it sets, with its unit.
        ge, gt, le, lt: numeric bounds, of the value or of every element of a list. Whole numbers are also within
            ±`LARGEST`, unless `le` says more.
        choices: the allowed strings, of the value or of every element of a list.
        read: makes plain data of what a mapping that may hold anything was given as, by the setting's key and its
            value, which may hold `gsa.scalars.Unquoted`.
    """
    metadata = {
        "doc": doc,
        "bounds": {"ge": ge, "gt": gt, "le": le, "lt": lt},
        "choices": None if choices is None else tuple(choices),
        "read": read,
    }
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check(config: Any, prefix: str = "") -> None:
    """Hold every field of a settings dataclass to its bounds, then the dataclass to its own `check`.

    A settings dataclass may define `check(self, prefix)` for rules between its fields.

    Raises:
        ConfigError: for the first value out of bounds, with its full key.
    """
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), join(prefix, field.name)
        for nested_key, nested in _nested(value, key):
            check(nested, nested_key)
        for element in value if isinstance(value, list) else [value]:
            check_value(field, key, element)
    if hasattr(config, "check"):
        config.check(prefix)


def check_value(field: "dataclasses.Field[Any]", key: str, value: Any) -> None:
    """Hold one value, or one element of a list, to the bounds of the field that it is for."""
    choices = field.metadata.get("choices")
    if choices is not None and value is not None and value not in choices:
        raise ConfigError(key, value, f"must be one of {', '.join(choices)}{nearest(str(value), choices)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, value, "must be a finite number")
    bounds = field.metadata.get("bounds", {})
    if isinstance(value, int):
        bounds = {"ge": -LARGEST, "le": LARGEST} | {name: bound for name, bound in bounds.items() if bound is not None}
    for name, sign, holds in _COMPARISONS:
        bound = bounds.get(name)
        if bound is not None and not holds(value, bound):
            raise ConfigError(key, value, f"must be {sign} {bound}")


_COMPARISONS = [
    ("ge", ">=", lambda value, bound: value >= bound),
    ("gt", ">", lambda value, bound: value > bound),
    ("le", "<=", lambda value, bound: value <= bound),
    ("lt", "<", lambda value, bound: value < bound),
]


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def nearest(word: str, words: Sequence[str]) -> str:
    """`"; did you mean 'x'?"` when one of the words is near, else nothing."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _nested(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        yield key, value
    elif isinstance(value, list):
        yield from ((f"{key}[{i}]", item) for i, item in enumerate(value) if dataclasses.is_dataclass(item))
