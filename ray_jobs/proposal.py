"""`gsa propose`: a search space by layer, drawn from what one trained model does on its held-out text.

- `share` is settled where the model's own masses settle it: a layer takes the widest window that loses less than
  0.5 % of the mass that its exact selection keeps. Only layers that lose more with windows of 8 get a dimension.
- `k` (`ratio` with a controller of that kind) is searched from half to twice of what keeps 99 % of the mass.
- `reuse` is searched where the layer below's selection loses less than 0.5 %, a G1 gate where more than 4 % of the
  attention goes to the first token.
- Layers that are alike share one dimension. Of many layers, groups are merged until there are few enough, the most
  alike first: pairs that least raise the sum of squares within groups, in octaves (Ward, 1963).
"""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from gsa import plain
from gsa.config import TrainConfig, assign
from gsa.errors import RequestError
from gsa.evaluation.layers import SHARES, layer_diagnostics
from gsa.evaluation.report import trained
from gsa.store import TrackingConfig
from gsa.training import checkpoint
from gsa.training.workers import Workers
from ray_jobs.tables import Column, show_columns

FREE = 0.005  # mass that a layer may lose and still take a wider window without a search
HOPELESS = 0.1  # mass lost from which a window wider than the narrowest is not worth trying
SINK = 0.04  # attention on the first token from which a gate is worth trying
ALIKE = 0.125  # what two layers half an octave apart raise the sum of squares by

# windows that share a selection keep as many keys: only time tells them apart
TARGET_LENGTH = 131_072  # tokens at which attention is timed, unless the model's configuration says otherwise
OBJECTIVES = [{"metric": "held_out_loss", "mode": "min"}, {"metric": "attention_latency_ms", "mode": "min"}]


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What to search, what to settle, and why."""

    space: dict[str, Any]  # dimensions, in the language of `ray_jobs.space`
    settings: dict[str, Any]  # what needs no search, by key
    layers: list[dict[str, float]]  # the diagnostics that it is drawn from
    reasons: list[str]  # what is proposed, by layer

    def sweep(self, config: TrainConfig) -> dict[str, Any]:
        """A sweep around `config` as plain data: what `gsa sweep` reads."""
        train = dataclasses.asdict(config)
        for key, value in self.settings.items():
            assign(TrainConfig, train, key, value)
        if config.evaluation.latency_length is None:
            assign(TrainConfig, train, "evaluation.latency_length", TARGET_LENGTH)
        return {"space": self.space, "objectives": OBJECTIVES, "train": train}

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def propose_space(layers: list[dict[str, float]], config: TrainConfig, max_dimensions: int = 6) -> Proposal:
    """A search space by layer of at most `max_dimensions` dimensions, at least 1.

    Args:
        layers: as of `gsa.evaluation.layers.layer_diagnostics`, of a model trained with `config`.
        config: what the sweep starts from.
        max_dimensions: of the space, over all of its settings.
    """
    shares = {i: _widest(row) for i, row in enumerate(layers) if "k_99" in row}
    features = {
        "share": {i: math.log2(layers[i]["share_8_lost"]) for i, share in shares.items() if share == 1},
        **_k_features(layers, config),
        "reuse": {i: 0.0 for i, row in enumerate(layers) if row.get("reuse_1_lost", 1) < FREE},
        "gates": dict.fromkeys(_sinks(layers, config), 0.0),
    }
    reasons = [_without_indexer(i, row, config) for i, row in enumerate(layers)]
    settings = {}
    for share in SHARES:
        if alike := [i for i in shares if shares[i] == share]:
            settings[f"model.layers{selector(alike)}.share"] = share
            for i in alike:
                reasons[i].append(f"share = {share}")
    space = {}
    for name, groups in group(features, max_dimensions).items():
        for alike in groups:
            key = f"model.layers{selector(alike)}.{name}"
            space[key] = _dimension(name, [layers[i] for i in alike], [features[name][i] for i in alike], config)
            for i in alike:
                reasons[i].append(f"{name} {_range(space[key])}")
    return Proposal(space, settings, layers, ["; ".join(reason) or "as it is" for reason in reasons])


def group(features: dict[str, dict[int, float]], most: int) -> dict[str, list[list[int]]]:
    """Cut each setting's layers into groups of like ones, at most `most` groups over all settings, `most` ≥ 1.

    Args:
        features: setting → layer → what layers are compared by. Where there are more settings than groups, the first
            settings count.

    Returns:
        Setting → groups of layers, each in ascending order.
    """
    named = {name: values for name, values in features.items() if values}
    named = dict(itertools.islice(named.items(), most))
    groups = {name: [[i] for i in sorted(values, key=lambda i: (values[i], i))] for name, values in named.items()}
    while True:
        pairs = [
            (_cost(named[name], *pair), name, place)
            for name, found in groups.items()
            for place, pair in enumerate(itertools.pairwise(found))
        ]
        cost, name, place = min(pairs, default=(math.inf, "", 0))
        if not pairs or (cost >= ALIKE and sum(map(len, groups.values())) <= most):
            return {name: sorted(sorted(layers) for layers in found) for name, found in groups.items()}
        groups[name][place : place + 2] = [groups[name][place] + groups[name][place + 1]]


def selector(layers: list[int]) -> str:
    """The brackets that name ascending `layers` in a key, as `[0:3,5]`."""
    runs = []
    for _, numbered in itertools.groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in numbered]
        runs.append(str(run[0]) if len(run) == 1 else f"{run[0]}:{run[-1] + 1}")
    return f"[{','.join(runs)}]"


def measure(source: str, tracking: TrackingConfig, storage: Path) -> tuple[TrainConfig, list[dict[str, float]]]:
    """The configuration of a checkpoint and the diagnostics of its layers on its own held-out text.

    Args:
        source: a folder, `runs:/<run_id>` or a run id.
        tracking, storage: where runs are found, and where tokenized text is cached.

    Raises:
        RequestError: there is no such checkpoint, or its text is not the text it was trained on.
    """
    found, config, data = trained(source, tracking, storage)
    config.storage = str(storage)
    model = checkpoint.load(found).to(Workers.current().device)
    return config, layer_diagnostics(model, data, config.evaluation)


def write(proposal: Proposal, config: TrainConfig, path: Path) -> None:
    """Write the sweep as YAML.

    Raises:
        RequestError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(plain.dump(proposal.sweep(config)), encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror})") from error


def show(proposal: Proposal, console: Console) -> None:
    """Print a table of the layers, what is proposed for each, and the space."""
    narrow, wide = SHARES[0], SHARES[-1]
    layers = proposal.layers
    columns = {
        f"lost by\nshare {narrow}": [_percent(row.get(f"share_{narrow}_lost")) for row in layers],
        f"by\nshare {wide}": [_percent(row.get(f"share_{wide}_lost")) for row in layers],
        "u(32)": [f"{row['u32']:.2f}" if "u32" in row else "" for row in layers],
        "mass\nkept": [_percent(row.get("mass_kept")) for row in layers],
        "k for\n99 %": [f"{row['k_99']:.0f}" if "k_99" in row else "" for row in layers],
        "on first\ntoken": [_percent(row.get("first_token_mass")) for row in layers],
    }
    numbers = [Column(header, values, right=True) for header, values in columns.items()]
    key = Column("layer", [str(i) for i in range(len(layers))], right=True)
    show_columns(console, "layers on held-out text, mass in %", [key], numbers)
    for i, reason in enumerate(proposal.reasons):
        console.print(f"layer {i}: {reason}", markup=False, highlight=False)
    for setting, dimension in proposal.space.items():
        console.print(f"{setting}: {_range(dimension)}", markup=False, highlight=False, soft_wrap=True)


def _widest(row: dict[str, float]) -> int:
    return max([1, *(share for share in SHARES if row[f"share_{share}_lost"] < FREE)])


def _k_features(layers: list[dict[str, float]], config: TrainConfig) -> dict[str, dict[int, float]]:
    """What keeps 99 % of the mass, in octaves: keys, or a share of the visible ones; nothing for other controllers."""
    controller = config.model.attention.controller
    own = {i: row for i, row in enumerate(layers) if "k_99" in row}
    if controller.kind == "ratio":
        # keys selected over their share is how many are visible
        visible = {i: row["k_mean"] / row["selected_fraction"] for i, row in own.items()}
        return {"ratio": {i: math.log2(min(1.0, row["k_99"] / visible[i])) for i, row in own.items()}}
    low, high = controller.k_min, _most_keys(config)
    if controller.kind not in ("fixed", "variance", "entropy") or low >= high:
        return {}
    return {"k": {i: math.log2(min(max(row["k_99"], low), high)) for i, row in own.items()}}


def _most_keys(config: TrainConfig) -> int:
    return min(config.model.attention.controller.k_max, config.data.context_length)


def _sinks(layers: list[dict[str, float]], config: TrainConfig) -> list[int]:
    """Layers that attend to the first token and have the common gates, G1 not among them."""
    common = config.model.attention.gates.places
    if "G1" in common:
        return []
    found = [i for i, row in enumerate(layers) if row["first_token_mass"] > SINK]
    return [i for i in found if config.model.attention_of(i).gates.places == common]


def _without_indexer(layer: int, row: dict[str, float], config: TrainConfig) -> list[str]:
    attention = config.model.attention_of(layer)
    if "k_99" in row:
        return []
    return [f"takes layer {layer - attention.selection.reuse}'s selection" if attention.sparse else "is dense"]


def _dimension(name: str, rows: list[dict[str, float]], octaves: list[float], config: TrainConfig) -> dict[str, Any]:
    """The dimension of one setting of a group of layers."""
    if name == "share":
        wider = [s for s in SHARES[1:] if max(row[f"share_{s}_lost"] for row in rows) < HOPELESS]
        return {"type": "categorical", "choices": [1, SHARES[0], *wider]}
    if name == "reuse":
        return {"type": "categorical", "choices": [0, 1]}
    if name == "gates":
        places = config.model.attention.gates.places
        return {"type": "categorical", "choices": [list(places), sorted([*places, "G1"])]}
    low, high = 2 ** min(octaves) / 2, 2 ** max(octaves) * 2
    if name == "ratio":
        return {"type": "float", "low": float(f"{low:.3g}"), "high": float(f"{min(high, 1):.3g}"), "log": True}
    least, most = config.model.attention.controller.k_min, _most_keys(config)
    return {"type": "int", "low": max(round(low), least), "high": min(round(high), most), "log": True}


def _cost(values: dict[int, float], a: list[int], b: list[int]) -> float:
    """What merging two groups adds to the sum of squares within groups."""
    apart = sum(values[i] for i in a) / len(a) - sum(values[i] for i in b) / len(b)
    return len(a) * len(b) / (len(a) + len(b)) * apart**2


def _range(dimension: dict[str, Any]) -> str:
    if dimension["type"] == "categorical":
        return " or ".join(map(str, dimension["choices"]))
    return f"from {dimension['low']} to {dimension['high']}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
