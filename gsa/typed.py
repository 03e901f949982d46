"""Plain data becomes of the types that the settings are declared with, or is refused in our own words.

- A setting of text keeps an unquoted scalar as it was written: `name: 007` is "007". Quoted numbers are numbers where
  a number is wanted, a whole number may be written as `1e3`, and YAML 1.1's `yes`, `no`, `on` and `off` are booleans.
- What is not there stays away: defaults are filled in later.
"""

import dataclasses
import math
import types
import typing
from typing import Any

from gsa.errors import ConfigError
from gsa.scalars import Unquoted, number, resolve, resolved
from gsa.schema import Schema, hints_of, unknown
from gsa.settings import join

MISSING = "???"  # OmegaConf's own mark of a value that is still missing
REFERENCE = "${"  # begins what OmegaConf would replace
KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
SEVERAL: dict[Any, str] = {int: "whole numbers", float: "numbers", bool: "true or false", str: "text"}
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def conform(schema: Schema, data: dict[str, Any], prefix: str = "", top: Schema | None = None) -> dict[str, Any]:
    """The settings in `data`, each of its declared type.

    Args:
        schema: a settings dataclass.
        data: plain data, `Unquoted` scalars among it.
        prefix: key of the schema in `top`, which is the schema itself by default.

    Raises:
        RequestError: no such setting; the nearest one is suggested.
        ConfigError: a value that its setting cannot take.
    """
    hints, top = hints_of(schema), top or schema
    fields = {field.name: field for field in dataclasses.fields(schema)}
    found = {}
    for name, value in data.items():
        key = join(prefix, str(name))
        if name not in hints:
            raise unknown(top, key, key, list(hints))
        read = fields[name].metadata.get("read")
        if read is not None and isinstance(value, dict):
            value = read(key, value)
        found[str(name)] = typed(hints[name], value, key, fields[name], top)
    return found


def typed(
    hint: Any, value: Any, key: str, field: "dataclasses.Field[Any] | None" = None, top: Schema | None = None
) -> Any:
    """A value as one of a setting's type.

    Args:
        hint: the type.
        value: plain data, `Unquoted` scalars among it.
        key: of the setting, for the error.
        field: its declaration, for the choices that it names.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, str) and value == MISSING:
        raise ConfigError(key, str(value), "is a value that is still missing")
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, Unquoted) and resolve(value) is None):
            return None
        (inner,) = (one for one in arguments if one is not types.NoneType)
        return typed(inner, value, key, field, top)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(key, resolved(value), "must be a mapping of settings")
        return conform(typing.cast(Schema, hint), value, key, top)
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ConfigError(key, resolved(value), _allowed(hint, field))
        several = dataclasses.is_dataclass(arguments[0])
        return [typed(arguments[0], v, f"{key}[{i}]" if several else key, field, top) for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(key, resolved(value), "must be a mapping")
        return {str(name): typed(arguments[1], item, join(key, str(name)), None, top) for name, item in value.items()}
    if hint is Any:
        return _any(key, value)
    found = _scalar(hint, value)
    if found is None:
        raise ConfigError(key, resolved(value), _allowed(hint, field))
    if isinstance(found, str) and REFERENCE in found:
        raise ConfigError(key, found, "must be the value itself: ${…} is not replaced")
    return found


def _scalar(hint: Any, value: Any) -> Any:
    """A value as a number, a boolean or text; None if it is none."""
    if hint is str:
        if isinstance(value, bool):
            return "true" if value else "false"
        # what is left empty is not text that somebody wrote
        return str(value) if isinstance(value, str | int | float) and not _empty(value) else None
    if hint is bool:
        if isinstance(value, str):
            words = BOOLEANS if isinstance(value, Unquoted) else ("true", "false")
            return BOOLEANS[value.lower()] if value.lower() in words else None
        return value if isinstance(value, bool) else None
    if isinstance(value, str):
        value = number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if hint is int:
        whole = isinstance(value, int) or (math.isfinite(value) and value.is_integer())
        return int(value) if whole else None
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)  # beyond what a float holds, which is refused by its bounds


def _empty(value: Any) -> bool:
    return isinstance(value, Unquoted) and value == ""


def _any(key: str, value: Any) -> Any:
    """A value of a setting that takes any, with what is unquoted as what it stands for."""
    if isinstance(value, dict):
        return {str(name): _any(f"{key}.{name}", item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_any(key, item) for item in value]
    if isinstance(value, str) and (value == MISSING or REFERENCE in value):
        raise ConfigError(key, str(value), "must be the value itself")
    return resolve(value) if isinstance(value, Unquoted) else value


def _allowed(hint: Any, field: "dataclasses.Field[Any] | None") -> str:
    """What a setting takes, in words."""
    choices = field.metadata.get("choices") if field is not None else None
    if typing.get_origin(hint) is list:
        (inner,) = typing.get_args(hint)
        of = f" of {SEVERAL[inner]}" if inner in SEVERAL else ""
        return f"must be a list{of}" if choices is None else f"must be a list of {', '.join(choices)}"
    return f"must be one of {', '.join(choices)}" if choices is not None else f"must be {KINDS[hint]}"
