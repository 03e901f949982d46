"""The search space language: any setting of a training configuration, by its key.

    space:
      training.optimizer.learning_rate: {type: float, low: 1e-4, high: 1e-2, log: true}
      model.attention.controller.kind: {type: categorical, choices: [fixed, variance]}
      model.attention.controller.k: {type: int, low: 16, high: 64, step: 16}
      model.attention.controller.temperature:
        {type: float, low: 0.1, high: 10, log: true, when: {model.attention.controller.kind: variance}}
      model.layers[*].share: {type: categorical, choices: [1, 8]}      # each layer its own
      model.layers[0:2].k: {type: int, low: 32, high: 64}              # both layers the same
      model.layers[middle].local_window: {type: int, low: 0, high: 64} # a third of the layers, all the same

A dimension with `when` exists only where the named settings, which dimensions before it set, have one of the named
values: all of them, where the condition names several layers. With `[*]` in both keys each layer asks for its own.
"""

import copy
import dataclasses
import json
import re
from typing import Any

import optuna

from gsa.config import TrainConfig, all_keys, assign, build, element_type, expand, field_of, replaced
from gsa.errors import ConfigError, RequestError
from gsa.settings import check_value, nearest
from ray_jobs.record import Params

# what a trial's results are compared by, and what all trials share
FIXED = ("name", "storage", "evaluation", "tracking", "workers")

EACH = "[*]"  # in a key: one dimension a layer

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

    def internal(self, value: Any) -> Any:
        """The value as Optuna stores it."""
        return label(value) if self.type == "categorical" else value


def label(choice: Any) -> Any:
    """Optuna's categories are scalars: a list or mapping stands there as its JSON."""
    return json.dumps(choice) if isinstance(choice, list | dict) else choice


class Space:
    """A checked search space around one training configuration.

    Args:
        space: the language above, as plain data.
        base: the training configuration, as plain data, that each trial starts from.

    Raises:
        RequestError: a key or a field is unknown, or a bound or choice is not allowed; nothing has been started.
    """

    def __init__(self, space: dict[str, Any], base: dict[str, Any]) -> None:
        if not space:
            raise ConfigError("space", space, "must name at least one setting to search")
        self.base, self.config = base, build(TrainConfig, copy.deepcopy(base))
        self.dimensions: list[Dimension] = []
        for key, given in space.items():
            new = self._parse(key, given)
            self._refuse_twice(new)
            self.dimensions += new
        if "model.num_layers" in space and any("[" in key for key in space):
            raise ConfigError("space", "model.num_layers", "cannot be searched together with settings of single layers")

    def sample(self, trial: optuna.Trial) -> Params:
        """Draw every active dimension of an Optuna trial (define-by-run)."""
        params: Params = {}
        for dimension in self.dimensions:
            if dimension.active(params):
                params[dimension.key] = dimension.sample(trial)
        return params

    def settings(self, params: Params) -> dict[str, Any]:
        """Parameters as settings: a dimension may set several layers."""
        targets = {dimension.key: dimension.targets for dimension in self.dimensions}
        return {target: value for key, value in params.items() for target in targets[key]}

    def compose(self, settings: dict[str, Any]) -> TrainConfig:
        """The checked configuration of a trial.

        Raises:
            ConfigError: the combination is not allowed.
        """
        found = replaced(self.config, settings)
        return compose(self.base, settings) if found is None else found

    def _parse(self, key: str, given: Any) -> list[Dimension]:
        field = field_of(TrainConfig, key)
        if key.split(".")[0] in FIXED:
            raise ConfigError("space", key, f"cannot be searched: trials must share {', '.join(FIXED)}")
        if key not in all_keys(TrainConfig) and "[" not in key:
            raise ConfigError("space", key, "names several settings: search them one by one")
        if not isinstance(given, dict) or given.get("type") not in FIELDS:
            kind = given.get("type") if isinstance(given, dict) else given
            allowed = f"type must be one of {', '.join(FIELDS)}{nearest(str(kind), list(FIELDS))}"
            raise ConfigError(f"space.{key}", kind, allowed)
        known = FIELDS[given["type"]] | {"type", "when"}
        for name in given:
            if name not in known:
                hint = nearest(str(name), sorted(known)) or f"; known: {', '.join(sorted(known))}"
                raise RequestError(f"space.{key}.{name}: no such field of a {given['type']} dimension{hint}")
        self._check_values(key, given, field)
        values = {name: given[name] for name in known & given.keys() - {"type", "when", "choices"}}
        choices = tuple(given.get("choices", ()))
        if values:
            convert = float if given["type"] == "float" else int
            values = {name: v if name == "log" else convert(v) for name, v in values.items()}
        targets = expand(TrainConfig, self.base, key)
        self._refuse_absent_layer(key, targets)
        groups = [(t, (t,)) for t in targets] if EACH in key else [(key, tuple(targets))]
        return [
            Dimension(name, group, given["type"], **values, choices=choices, when=self._conditions(key, name, given))
            for name, group in groups
        ]

    def _refuse_twice(self, new: list[Dimension]) -> None:
        setters = {target: dimension.key for dimension in self.dimensions for target in dimension.targets}
        for dimension in new:
            for target in dimension.targets:
                if target in setters:
                    raise ConfigError("space", dimension.key, f"sets {target}, which {setters[target]} sets already")

    def _refuse_absent_layer(self, key: str, targets: list[str]) -> None:
        num_layers = self.base["model"]["num_layers"]
        for target in targets:
            layer = re.match(r"model\.layers\[(\d+)\]", target)
            if layer and int(layer[1]) >= num_layers:
                raise ConfigError("space", key, f"there is no layer {layer[1]} among the {num_layers} layers")

    def _check_values(self, key: str, given: dict[str, Any], field: "dataclasses.Field[Any]") -> None:
        if given["type"] == "categorical":
            choices = given.get("choices")
            if not isinstance(choices, list) or not choices:
                raise ConfigError(f"space.{key}.choices", choices, "must be a list of at least one value")
            for choice in choices:
                for element in choice if isinstance(choice, list) else [choice]:
                    check_value(field, f"space.{key}.choices", element)
            return
        if element_type(field.type) not in (int, float):
            raise ConfigError(f"space.{key}.type", given["type"], f"{key} is not a number; use categorical")
        for name in ("low", "high"):
            try:
                number = float(given[name])
            except (KeyError, TypeError, ValueError):
                raise ConfigError(f"space.{key}.{name}", given.get(name), "must be a number") from None
            check_value(field, f"space.{key}.{name}", int(number) if number.is_integer() else number)
        step, log = given.get("step"), given.get("log", False)
        if step is not None and (isinstance(step, bool) or not isinstance(step, int | float) or step <= 0):
            raise ConfigError(f"space.{key}.step", step, "must be a number > 0")
        if not isinstance(log, bool):
            raise ConfigError(f"space.{key}.log", log, "must be true or false")
        low, high = float(given["low"]), float(given["high"])
        if low > high:
            raise ConfigError(f"space.{key}.low", low, f"must be <= high, which is {high}")
        if given.get("log") and (low <= 0 or given.get("step") is not None):
            raise ConfigError(f"space.{key}.log", True, "needs low > 0 and no step")
        if given["type"] == "int" and not (low.is_integer() and high.is_integer()):
            raise ConfigError(f"space.{key}", [low, high], "bounds of an int dimension must be integers")

    def _conditions(self, key: str, name: str, given: dict[str, Any]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
        when = given.get("when", {})
        if not isinstance(when, dict):
            raise ConfigError(f"space.{key}.when", when, "must map an earlier key of the space to its values")
        conditions = []
        for other, values in when.items():
            allowed = tuple(values) if isinstance(values, list) else (values,)
            for dimension in self._named(key, name, str(other)):
                impossible = [v for v in allowed if dimension.choices and v not in dimension.choices]
                if impossible:
                    raise ConfigError(f"space.{key}.when.{other}", impossible[0], f"is none of {dimension.choices}")
                conditions.append((dimension.key, allowed))
        return tuple(conditions)

    def _named(self, key: str, name: str, other: str) -> list[Dimension]:
        """The earlier dimensions that a condition `other` of the dimension `name`, written as `key`, asks for."""
        by_key = {dimension.key: dimension for dimension in self.dimensions}
        if other in by_key:
            return [by_key[other]]
        setters = {target: dimension for dimension in self.dimensions for target in dimension.targets}
        if EACH in key and EACH in other:
            layer = re.search(r"\[\d+\]", name)
            assert layer is not None
            settings = [other.replace(EACH, layer[0])]
        else:
            settings = expand(TrainConfig, self.base, other)
        for setting in settings:
            if setting not in setters:
                hint = nearest(other, list(by_key))
                raise ConfigError(f"space.{key}.when", other, f"must be a key that stands before it in the space{hint}")
        return list({setters[setting].key: setters[setting] for setting in settings}.values())


def compose(base: dict[str, Any], settings: dict[str, Any]) -> TrainConfig:
    """A training configuration with some settings replaced.

    Raises:
        ConfigError: the combination is not allowed.
    """
    data = json.loads(json.dumps(base))
    for key, value in settings.items():
        assign(TrainConfig, data, key, value)
    return build(TrainConfig, data)
