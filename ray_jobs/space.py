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
from collections.abc import Callable
from typing import Any

import optuna

from gsa.config import TrainConfig, assign, build, expand, replaced
from gsa.errors import ConfigError, RequestError
from gsa.schema import all_keys, declared
from gsa.settings import nearest
from ray_jobs.dimensions import Dimension, as_set, described, several
from ray_jobs.record import Params

# what a trial's results are compared by, and what all trials share
FIXED = ("name", "storage", "evaluation", "tracking", "workers")

EACH = "[*]"  # in a key: one dimension a layer
DRAWS = 200  # at random, all of which must be invalid for a space to be held to be empty


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
        self.config = build(TrainConfig, copy.deepcopy(base))
        self.base = dataclasses.asdict(self.config)
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

    def refuse_empty(self, check: Callable[[TrainConfig], None] = lambda config: None) -> None:
        """Refuse a space of which nothing can be trained.

        Args:
            check: what a configuration must pass beside its own bounds; raises RequestError.

        Raises:
            ConfigError: none of many random draws is a valid configuration.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(DRAWS):
            try:
                check(self.compose(self.settings(self.sample(study.ask()))))
            except RequestError as error:
                last = error
            else:
                return
        why = f"none of {DRAWS} draws from the space is valid"
        if isinstance(last, ConfigError):
            raise ConfigError(last.key, last.value, f"{last.allowed}; {why}")
        raise ConfigError("space", sorted({d.key for d in self.dimensions}), f"{why}; the last: {last}")

    def _parse(self, key: str, given: Any) -> list[Dimension]:
        declared(TrainConfig, key)
        if key.split(".")[0] in FIXED:
            raise ConfigError("space", key, f"cannot be searched: trials must share {', '.join(FIXED)}")
        if key not in all_keys(TrainConfig) and "[" not in key:
            raise ConfigError("space", key, "names several settings: search them one by one")
        values = described(key, given)
        targets = expand(TrainConfig, self.base, key)
        self._refuse_absent_layer(key, targets)
        groups = [(t, (t,)) for t in targets] if EACH in key else [(key, tuple(targets))]
        return [Dimension(name, group, **values, when=self._conditions(key, name, given)) for name, group in groups]

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

    def _conditions(self, key: str, name: str, given: dict[str, Any]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
        when = given.get("when", {})
        if not isinstance(when, dict):
            raise ConfigError(f"space.{key}.when", when, "must map an earlier key of the space to its values")
        conditions = []
        for other, values in when.items():
            place = f"space.{key}.when.{other}"
            for dimension in self._named(key, name, str(other)):
                allowed = tuple(as_set(other, value, place) for value in several(other, values))
                for value in allowed:
                    dimension.refuse_never(value, place)
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
