"""Whether two configurations train the same run: what results from them is compared, not what was given.

- Null and a setting that is not there are the same; so are a layer's own setting and the common one it repeats.
- Stages without steps change nothing.
- Where text comes from is compared as it was given; that it is the same text, its fingerprint tells.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from gsa.model import LAYER_SETTINGS, LayerConfig

if TYPE_CHECKING:
    from gsa.config import TrainConfig

DECISIVE = ("model", "data", "training", "seed")
FREE = ("data.prepared",)  # names the tokenized copy, which the fingerprint holds to the same text


def difference(held: "TrainConfig", given: "TrainConfig") -> tuple[str, Any, Any] | None:
    """The first setting in which two configurations train differently: its key, its value in each; None if in none."""
    from gsa.config import flatten

    old, new = flatten(_resolved(held)), flatten(_resolved(given))
    for key in dict.fromkeys([*new, *old]):
        if key.split(".")[0] not in DECISIVE or key.startswith(FREE):
            continue
        was, now = old.get(key), new.get(key)
        filled_in = key == "model.vocab_size" and None in (was, now)  # from the tokenizer, once there is one
        if was != now and not filled_in:
            return key, was, now
    return None


def _resolved(config: "TrainConfig") -> "TrainConfig":
    """The same training, with every layer's settings of its own and without stages that have no steps."""
    model, training = config.model, config.training
    layers = []
    for i in range(model.num_layers):
        attention = model.attention_of(i)
        values = {}
        for field in dataclasses.fields(LayerConfig):
            value: Any = attention
            for name in LAYER_SETTINGS[field.name]:
                value = getattr(value, name)
            values[field.name] = value
        layers.append(LayerConfig(**values))
    stages = [stage for stage in training.stages if stage.steps]
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, layers=layers),
        training=dataclasses.replace(training, stages=stages),
    )
