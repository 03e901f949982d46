"""Settings: YAML files and `key=value` overrides become checked dataclasses.

- A file is parsed by `gsa.plain`, `gsa.typed` makes its values of their settings' types, and OmegaConf merges them into
  the dataclasses that stand beside the code they set.
- `include: other.yaml` in any mapping starts that mapping from another file's content.
- Keys are dotted; `model.layers[2].k` names one layer's setting. `[0:2]`, `[0,3:5,7]`, `[*]` and the thirds
  `[first]`, `[middle]` and `[last]` name several layers' at once.
"""

import copy
import dataclasses
import functools
import json
import os
import re
import shlex
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gsa import plain
from gsa.data.packing import DataConfig
from gsa.errors import ConfigError, RequestError
from gsa.evaluation.loss import EvaluationConfig
from gsa.model import MOST_LAYERS, ModelConfig
from gsa.paths import of_user
from gsa.scalars import resolved
from gsa.schema import Schema, declared, element_type, hints_of, parts_of
from gsa.settings import check, join, nearest, setting
from gsa.store import TrackingConfig
from gsa.training.loop import TrainingConfig
from gsa.training.workers import WorkersConfig
from gsa.typed import conform


@dataclasses.dataclass
class TrainConfig:
    """Everything that one training run depends on."""

    name: str = setting("train", "name of the run and of its folder under storage")
    storage: str = setting("runs", "folder for runs, checkpoints and caches; shared by all nodes of a cluster")
    seed: int = setting(0, "seed of the initial values and of the order of the data", ge=0, le=2**64 - 1)
    model: ModelConfig = setting(ModelConfig, "the decoder")
    data: DataConfig = setting(DataConfig, "text, tokenizer and packing")
    training: TrainingConfig = setting(TrainingConfig, "stages, optimizer and checkpoints")
    evaluation: EvaluationConfig = setting(EvaluationConfig, "held-out evaluation")
    tracking: TrackingConfig = setting(TrackingConfig, "MLflow")
    workers: WorkersConfig = setting(WorkersConfig, "data-parallel workers of one run")

    def check(self, prefix: str = "") -> None:
        check_name(join(prefix, "name"), self.name)
        if not self.model.has_indexer and not any(s.steps for s in self.training.stages if s.kind != "warmup"):
            kinds = ", ".join(f"{s.kind} ({s.steps} steps)" for s in self.training.stages)
            allowed = "a model without an indexer skips warmup stages, so dense or sparse stages must have steps"
            raise ConfigError(join(prefix, "training.stages"), kinds, allowed)


def check_name(key: str, name: str) -> None:
    """Names become folders and tags: letters, digits, `.`, `_` and `-`, not starting with a dot."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(key, name, "must be 1 to 100 letters, digits, '.', '_' or '-', not starting with '.'")


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read a training configuration.

    Args:
        path: a YAML file.
        overrides: `key=value` strings; values are YAML.

    Raises:
        RequestError: the file is missing, is not YAML, or holds an unknown key (the nearest
            one is suggested), a value of the wrong type, or one out of bounds.
    """
    data = read_yaml(Path(path))
    refuse_other_kind(Path(path), data, "train")
    return build(TrainConfig, data, overrides or [])


# the settings at the top of each kind of file that no other kind has
KINDS = {
    "sweep": {"space", "train"},
    "train": {"model", "data", "training", "evaluation", "tracking", "workers"},
    "model": {field.name for field in dataclasses.fields(ModelConfig)},
}


def refuse_other_kind(path: Path, data: dict[str, Any], wanted: str) -> None:
    """Say what a file is for where it is not of the kind that is `wanted`.

    Raises:
        RequestError: it is of another one of `KINDS`.
    """
    if KINDS[wanted] & data.keys():
        return
    for kind, keys in KINDS.items():
        if found := [key for key in data if key in keys]:
            name = shlex.quote(_shown(path))
            use = f"model: {{include: {name}}} in a training run's" if kind == "model" else f"gsa {kind} {name}"
            what = {"sweep": "a sweep's", "train": "a training run's", "model": "a model's"}[kind]
            raise RequestError(f"{_shown(path)}: is {what} configuration (it has {found[0]!r}): {use}")


T = TypeVar("T")


def build(schema: type[T], data: dict[str, Any], overrides: list[str] | None = None) -> T:
    """Merge plain data and overrides into a settings dataclass and check it.

    Raises:
        RequestError: as `load_config`.
    """
    # those that name layers last: how many there are may be among the others
    for key, value in sorted(map(parse_override, overrides or []), key=lambda pair: "[" in pair[0]):
        assign(schema, data, key, value)
    data = conform(schema, data)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(_structured(schema), data))
    except OmegaConfBaseException as error:  # nothing is left for it to refuse; its words would mean nothing to a user
        key = error.full_key or "configuration"
        raise ConfigError(key, lookup(data, key), "cannot be taken as a setting") from error
    check(config)
    return typing.cast(T, config)


# the defaults of a schema: to make them takes most of the time that `build` would take
_structured: Callable[[Any], Any] = functools.cache(OmegaConf.structured)


def replaced(config: T, settings: dict[str, Any]) -> T | None:
    """A checked configuration with some settings replaced, in a fraction of the time that `build` takes.

    Returns:
        What `build` would make of it; None where a value is not yet of its setting's type, or a setting has settings of
        its own: only `build` knows then.

    Raises:
        ConfigError: as `build`.
    """
    changed = copy.deepcopy(config)
    for key, value in settings.items():
        *path, last = parts_of(key)
        owner: Any = changed
        hint: Any = type(changed)
        for part in path:
            if isinstance(part, int):
                hint = element_type(hint)
                owner.extend(hint() for _ in range(part + 1 - len(owner)))
                owner = owner[part]
            else:
                hint = hints_of(type(owner)).get(part)
                owner = getattr(owner, part, None)
        if not isinstance(last, str) or not _is_of(value, hints_of(type(owner)).get(last)):
            return None
        setattr(owner, last, value)
    check(changed)
    return changed


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value is of a setting's type as it stands: a scalar, or a list of them."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_of(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and all(_is_of(item, typing.get_args(hint)[0]) for item in value)
    return hint in (int, float, str, bool, types.NoneType) and type(value) is hint


def parse_override(text: str) -> tuple[str, Any]:
    """The key and the value of `key=value`, which stays as it was written until `build` where it is unquoted."""
    key, separator, value = text.partition("=")
    if not separator or not parts_of(key.strip()):
        raise RequestError(f"override {text!r}: must be key=value, for example training.optimizer.learning_rate=1e-3")
    try:
        return key.strip(), plain.parse(value, unquoted=True)
    except plain.PlainError as error:
        raise ConfigError(key, value, f"is not a YAML value ({error})") from error


def read_yaml(path: Path, _including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file as plain data, with every `include` resolved relative to the file that names it.

    What is unquoted stays as it was written until `build` (`gsa.scalars`).

    Raises:
        RequestError: the file or one that it includes is missing, cannot be read, or is not YAML.
    """
    path = Path(of_user(str(path))).resolve()
    if path in _including:
        raise RequestError(f"{path}: includes itself through {_including[-1].name}")
    try:
        data = plain.parse(plain.read_text(path), unquoted=True)
    except FileNotFoundError:
        raise RequestError(f"{_shown(path)}: no such configuration file") from None
    except plain.PlainError as error:
        raise RequestError(f"{_shown(path)}: is not YAML that can be read as settings ({error})") from error
    except (OSError, ValueError) as error:
        raise RequestError(f"{_shown(path)}: cannot be read as text ({error})") from error
    if not isinstance(data, dict):
        raise RequestError(f"{_shown(path)}: must hold a mapping of settings, not {_kind(resolved(data))}")
    return typing.cast(dict[str, Any], _resolve_includes(data, path, (*_including, path)))


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`: mappings merge key by key, anything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def assign(schema: Schema, data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in plain data, in place; brackets name layers as `expand` says."""
    concretes = expand(schema, data, key)
    declared(schema, key)  # here the whole key is known, for a better hint
    for concrete in concretes:
        _assign_one(data, parts_of(concrete), value, concrete)


THIRDS = ("first", "middle", "last")


def expand(schema: Schema, data: dict[str, Any], key: str) -> list[str]:
    """The keys, one a layer, that a key with several layers stands for; other keys stand for themselves.

    `layers[*]` is every layer; `layers[a:b]` a slice; `layers[0,3:5,7]` a list of numbers and slices. `layers[first]`
    and `layers[last]` are ⌊L/3⌋ layers each at the bottom and at the top of L layers, `layers[middle]` the others.

    Raises:
        ConfigError: what stands in brackets is none of these, names a layer that is not there, one twice or none, or
            a third of fewer than 3 layers.
    """
    found = re.search(r"\[(?!\d+\])([^\]]*)\]", key)
    if not found:
        return [key]
    if not re.search(r"(^|\.)layers$", key[: found.start()]):
        raise ConfigError(key, found.group(), "only model.layers takes [*], [a:b], [a,b] and [first]")
    count_key = key[: found.start()].removesuffix("layers") + "num_layers"
    length = resolved(lookup(data, count_key))
    if length is None:
        length = ModelConfig().num_layers
    if not isinstance(length, int) or isinstance(length, bool):
        raise ConfigError(count_key, length, "must be a whole number")
    chosen = _chosen(key, found.group(1), length)
    return [key[: found.start()] + f"[{i}]" + key[found.end() :] for i in chosen]


def _chosen(key: str, selector: str, length: int) -> list[int]:
    if selector in THIRDS:
        third = length // 3
        if third < 1:
            raise ConfigError(key, f"[{selector}]", f"names a third of the layers, and there are only {length}")
        bounds = (0, third, length - third, length)
        place = THIRDS.index(selector)
        return list(range(bounds[place], bounds[place + 1]))
    chosen: list[int] = []
    for item in [":"] if selector == "*" else selector.split(","):
        start, colon, stop = item.strip().partition(":")
        if not re.fullmatch(r"(-?\d+)?:(-?\d+)?|\d+", start + colon + stop):
            allowed = "must be layers' numbers and slices, as [2], [0:3] and [0,3:5], or *, first, middle or last"
            raise ConfigError(key, f"[{selector}]", f"{allowed}{nearest(selector, THIRDS)}")
        named = range(length)[_index(start) : _index(stop)] if colon else range(length)[int(start) :][:1]
        if not named:
            raise ConfigError(key, f"[{selector}]", f"{item.strip()} names none of the {length} layers")
        chosen += named
    if len(set(chosen)) < len(chosen):
        raise ConfigError(key, f"[{selector}]", "names a layer twice")
    return chosen


def lookup(data: Any, key: str) -> Any:
    """The value at a dotted key of plain data or of a settings dataclass, `None` where there is none."""
    for part in parts_of(key):
        if dataclasses.is_dataclass(data):
            data = getattr(data, str(part), None)
        elif isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return None
    return data


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A settings dataclass as `{dotted key: scalar}`; lists of scalars become JSON."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), join(prefix, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, key)
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for i, item in enumerate(value):
                flat |= flatten(item, f"{key}[{i}]")
        else:
            flat[key] = json.dumps(value) if isinstance(value, list) else value
    return flat


def to_yaml(config: Any) -> str:
    """A settings dataclass as YAML that `read_yaml` and `build` turn back into an equal one."""
    return plain.dump(dataclasses.asdict(config))


def _resolve_includes(data: Any, path: Path, including: tuple[Path, ...]) -> Any:
    if isinstance(data, list):
        return [_resolve_includes(item, path, including) for item in data]
    if not isinstance(data, dict):
        return data
    own = {key: _resolve_includes(value, path, including) for key, value in data.items() if key != "include"}
    if "include" not in data:
        return own
    if not isinstance(resolved(data["include"]), str) or "\0" in data["include"]:
        raise ConfigError("include", resolved(data["include"]), f"must be the path of a YAML file (in {_shown(path)})")
    return merge(read_yaml(path.parent / of_user(data["include"]), including), own)


def _assign_one(data: Any, parts: list[str | int], value: Any, key: str) -> None:
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if isinstance(part, int):
            if not isinstance(data, list):
                raise ConfigError(key, value, f"[{part}] needs a list before it")
            if part >= MOST_LAYERS:
                raise ConfigError(key, value, f"[{part}] must be < {MOST_LAYERS}")
            data.extend({} for _ in range(part + 1 - len(data)))
        elif not isinstance(data, dict):
            raise ConfigError(key, value, f"{part!r} is not below a mapping")
        if following is None:
            data[part] = value
            return
        if isinstance(part, str) and resolved(data.get(part)) is None:
            data[part] = [] if isinstance(following, int) else {}
        data = data[part]


def _index(text: str) -> int | None:
    return int(text) if text else None


def _shown(path: Path) -> str:
    return os.path.relpath(path)


def _kind(data: Any) -> str:
    return {type(None): "nothing", list: "a list"}.get(type(data), repr(data)[:40])
