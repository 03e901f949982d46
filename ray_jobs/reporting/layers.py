"""What each trial selects in each layer, and the settings in which its layers differ."""

import re
from typing import Any

from ray_jobs.record import Params
from ray_jobs.space import Space

Layer = dict[str, dict[str, Any]]  # "metrics" and "settings", by name

_METRIC = re.compile(r"layer_(\d+)/(.+)")  # as `gsa.evaluation.loss.evaluate` names them
_SETTING = re.compile(r"model\.layers\[(\d+)\]\.(.+)")


def layers_of(metrics: dict[str, float], params: Params, space: Space | None) -> list[Layer]:
    """One entry a layer, up to the last that has a metric; settings are of the space and of the sweep's base."""
    found: dict[int, dict[str, float]] = {}
    for name, value in metrics.items():
        match = _METRIC.fullmatch(name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = value
    settings = _settings(params, space) if space is not None else {}
    count = max(found, default=-1) + 1
    return [{"metrics": found.get(i, {}), "settings": settings.get(i, {})} for i in range(count)]


def _settings(params: Params, space: Space) -> dict[int, dict[str, Any]]:
    base = space.base["model"].get("layers") or []
    settings = {i: {k: v for k, v in layer.items() if v is not None} for i, layer in enumerate(base)}
    for key, value in space.settings(params).items():
        match = _SETTING.fullmatch(key)
        if match:
            settings.setdefault(int(match[1]), {})[match[2]] = value
    return settings
