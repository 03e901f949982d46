"""One dimension of a search space: what is written of it, checked, and how Optuna draws from it."""

import dataclasses
import json
import logging
import math
from decimal import Decimal
from typing import Any

import optuna

from gsa.config import TrainConfig
from gsa.errors import ConfigError, RequestError
from gsa.scalars import number, resolved
from gsa.schema import declared, element_type
from gsa.settings import check_value, join, nearest
from gsa.typed import typed
from ray_jobs.record import Params

logger = logging.getLogger(__name__)

FIELDS = {
    "float": {"low", "high", "log", "step"},
    "int": {"low", "high", "log", "step"},
    "categorical": {"choices"},
}


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One parameter of the search."""

    key: str
    targets: tuple[str, ...]  # the settings that take its value
    type: str
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def active(self, params: Params) -> bool:
        return all(key in params and params[key] in allowed for key, allowed in self.when)

    def sample(self, trial: optuna.Trial) -> Any:
        if self.type == "float":
            return trial.suggest_float(self.key, self.low, self.high, step=self.step, log=self.log)
        if self.type == "int":
            return trial.suggest_int(self.key, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        labels = [label(choice) for choice in self.choices]
        return self.choices[labels.index(trial.suggest_categorical(self.key, labels))]

    def distribution(self) -> optuna.distributions.BaseDistribution:
        if self.type == "float":
            return optuna.distributions.FloatDistribution(self.low, self.high, self.log, self.step)
        if self.type == "int":
            return optuna.distributions.IntDistribution(int(self.low), int(self.high), self.log, int(self.step or 1))
        return optuna.distributions.CategoricalDistribution([label(choice) for choice in self.choices])

    def refuse_never(self, value: Any, key: str) -> None:
        """Raises ConfigError where the dimension never has this value, which stands at `key`."""
        if self.type == "categorical":
            if value not in self.choices:
                raise ConfigError(key, value, f"is none of {self.choices}")
        elif not self.low <= value <= self.high:
            raise ConfigError(key, value, f"is not within {self.low} and {self.high}, the bounds of {self.key}")

    def internal(self, value: Any) -> Any:
        """The value as Optuna stores it."""
        if self.type != "categorical":
            return value
        if isinstance(value, str) and value not in self.choices:
            value = number(value)  # earlier versions recorded a choice of 1e-3 as text
        return label(value)


def label(choice: Any) -> Any:
    """Optuna's categories are scalars: a list or mapping stands there as its JSON."""
    return json.dumps(choice) if isinstance(choice, list | dict) else choice


def read_space(key: str, space: dict[str, Any]) -> dict[str, Any]:
    """A space as it was given, as plain data: choices and conditions of a setting are of the setting's type.

    Args:
        key: of the space in its configuration.
        space: may hold `gsa.scalars.Unquoted`, which only settings of text take as it was written.

    Raises:
        RequestError: a choice or the value of a condition is not of its setting's type.
    """
    read: dict[str, Any] = {}
    for name, dimension in space.items():
        read[name] = resolved(dimension)
        if not isinstance(dimension, dict):
            continue
        if isinstance(dimension.get("choices"), list):
            place = join(key, f"{name}.choices")
            read[name]["choices"] = [as_set(name, choice, place) for choice in dimension["choices"]]
        if isinstance(dimension.get("when"), dict):
            for other, values in dimension["when"].items():
                place = join(key, f"{name}.when.{other}")
                typed_values = [as_set(other, value, place) for value in several(other, values)]
                read[name]["when"][other] = typed_values if isinstance(values, list) else typed_values[0]
    return read


def described(key: str, given: Any) -> dict[str, Any]:
    """The fields of a `Dimension` that are written in a space, but for its conditions.

    Args:
        key: of the setting.
        given: what stands there in the space.

    Raises:
        RequestError: a field is unknown, or a bound, a step or a choice is not allowed.
    """
    kind = given.get("type") if isinstance(given, dict) else given
    if not isinstance(given, dict) or not isinstance(kind, str) or kind not in FIELDS:
        allowed = f"type must be one of {', '.join(FIELDS)}{nearest(str(kind), list(FIELDS))}"
        raise ConfigError(f"space.{key}", kind, allowed)
    of = element_type(declared(TrainConfig, key)[1])
    known = FIELDS[kind] | {"type", "when"}
    for name in given:
        if name not in known:
            hint = nearest(str(name), sorted(known)) or f"; known: {', '.join(sorted(known))}"
            raise RequestError(f"space.{key}.{name}: no such field of a {kind} dimension{hint}")
    if kind == "categorical":
        return {"type": kind, "choices": _choices(key, given)}
    if of not in (int, float):
        raise ConfigError(f"space.{key}.type", kind, f"{key} is not a number; use categorical")
    if kind == "float" and of is int:
        raise ConfigError(f"space.{key}.type", kind, f"{key} is a whole number; use int")
    return {"type": kind} | _range(key, given)


def as_set(key: str, value: Any, place: str) -> Any:
    """A value of a setting, which stands at `place`, as the setting takes it.

    Raises:
        RequestError: it does not, or there is no such setting.
    """
    field, hint = declared(TrainConfig, key)
    found = typed(hint, value, place, field)
    for element in found if isinstance(found, list) else [found]:
        check_value(field, place, element)
    return found


def several(key: str, values: Any) -> list[Any]:
    """The values of a condition: a list of them, or one."""
    return values if isinstance(values, list) else [values]


def _choices(key: str, given: dict[str, Any]) -> tuple[Any, ...]:
    choices = given.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ConfigError(f"space.{key}.choices", choices, "must be a list of at least one value")
    return tuple(as_set(key, choice, f"space.{key}.choices") for choice in choices)


def _range(key: str, given: dict[str, Any]) -> dict[str, Any]:
    """`low`, `high`, `log` and `step` of a dimension of numbers, checked; `high` is the largest value that it takes."""
    field, _ = declared(TrainConfig, key)
    low, high = (_bound(f"space.{key}.{name}", given.get(name), field) for name in ("low", "high"))
    step, log, whole = given.get("step"), given.get("log", False), given["type"] == "int"
    if not isinstance(log, bool):
        raise ConfigError(f"space.{key}.log", log, "must be true or false")
    if low > high:
        raise ConfigError(f"space.{key}.low", low, f"must be <= high, which is {high}")
    if log and (low <= 0 or step is not None):
        raise ConfigError(f"space.{key}.log", True, "needs low > 0 and no step")
    if whole and not (float(low).is_integer() and float(high).is_integer()):
        raise ConfigError(f"space.{key}", [low, high], "bounds of an int dimension must be integers")
    convert = int if whole else float
    found: dict[str, Any] = {"low": convert(low), "high": convert(high), "log": log}
    return found if step is None else found | _stepped(key, found, _step(f"space.{key}.step", step, whole))


def _step(key: str, step: Any, whole: bool) -> float:
    """The step of a dimension."""
    kind = "a whole number" if whole else "a number"
    try:
        found: float = typed(int if whole else float, step, key)
    except ConfigError:
        raise ConfigError(key, step, f"must be {kind} > 0") from None
    if not (math.isfinite(found) and found > 0):
        raise ConfigError(key, step, f"must be {kind} > 0")
    return found


def _bound(key: str, value: Any, field: "dataclasses.Field[Any]") -> float:
    try:
        number: float = typed(float, value, key)
    except ConfigError:
        raise ConfigError(key, value, "must be a number") from None
    exact = value if isinstance(value, int) else int(number) if number.is_integer() else number
    check_value(field, key, exact)
    return exact


def _stepped(key: str, found: dict[str, Any], step: float) -> dict[str, Any]:
    """`step`, and the largest value that whole steps from `low` reach."""
    low, high = Decimal(str(found["low"])), Decimal(str(found["high"]))
    width = Decimal(str(step))
    if low < high < low + width:
        allowed = f"must be <= high - low, which is {high - low}: it would leave one value"
        raise ConfigError(f"space.{key}.step", step, allowed)
    last = low + (high - low) // width * width
    if last != high:
        logger.warning("space.%s.high = %s: whole steps of %s from %s end at %s", key, high, step, low, last)
    return {"step": step, "high": type(found["high"])(last)}
