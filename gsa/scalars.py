"""What an unquoted scalar of YAML stands for: null, a boolean, a number or text, by the core schema of YAML 1.2.

- `1e-3`, `1e2`, `.5` and `0x10` are numbers; `1_000`, `1:30`, `2026-11-28`, `yes` and `on` are text. (YAML 1.1, which
  PyYAML reads, has it the other way round.)
- A setting decides: one that holds text keeps `007` and `1.10` as they were written, one that holds a number does not
  (`gsa.typed`). Until the setting is known, a scalar is `Unquoted`.
"""

import re
from typing import Any

PATTERNS = {
    "null": re.compile(r"^(?:~|null|Null|NULL|)$"),
    "bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
    "float": re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}
DIGITS = 100  # of a number; Python itself refuses to read very long ones


class Unquoted(str):
    """An unquoted scalar, as it was written."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(resolve(self))


def resolve(text: str) -> Any:
    """What an unquoted scalar stands for where its setting is of any type."""
    if PATTERNS["null"].match(text):
        return None
    if PATTERNS["bool"].match(text):
        return text.lower() == "true"
    found = number(text)
    return str(text) if found is None else found


def number(text: str) -> int | float | None:
    """The number that a text is; None if it is none, or has more than `DIGITS` characters."""
    if len(text) > DIGITS:
        return None
    if PATTERNS["int"].match(text):
        return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
    if PATTERNS["float"].match(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return None


def resolved(data: Any) -> Any:
    """Plain data with every `Unquoted` scalar as what it stands for."""
    if isinstance(data, dict):
        return {str(key): resolved(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [resolved(item) for item in data]
    return resolve(data) if isinstance(data, Unquoted) else data
