"""The search space: every draw is within bounds and composes to a checked configuration, or is refused by name."""

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console

from gsa.config import TrainConfig, build, lookup
from gsa.errors import ConfigError, RequestError
from ray_jobs.space import Space
from ray_jobs.sweep import Sweep, SweepConfig, load_sweep
from tests.draw import Draw
from tests.text import tiny

ROOT = Path(__file__).parents[2]
BASE = dataclasses.asdict(build(TrainConfig, {}, ["model.num_layers=3"]))
KIND = "model.attention.controller.kind"
FULL: dict[str, Any] = {
    "training.optimizer.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
    KIND: {"type": "categorical", "choices": ["fixed", "variance", "ratio"]},
    "model.attention.controller.k": {
        "type": "int", "low": 256, "high": 4096, "step": 256, "when": {KIND: ["fixed", "variance"]},
    },
    "model.attention.controller.ratio": {"type": "float", "low": 0.1, "high": 0.5, "when": {KIND: "ratio"}},
    "model.attention.gates.places": {"type": "categorical", "choices": [[], ["G1"], ["G1", "G2"]]},
    "model.layers[*].share": {"type": "categorical", "choices": [1, 8]},
    "model.layers[0:2].local_window": {"type": "int", "low": 0, "high": 64},
}  # fmt: skip


ONE_OR_TWO = {"type": "int", "low": 1, "high": 2}


def draws(space: Space, draw: Draw, count: int) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=draw.random.randrange(1000)))
    return [space.sample(study.ask()) for _ in range(count)]


def test_every_draw_is_within_bounds_and_sets_what_it_names(draw: Draw) -> None:
    space = Space(FULL, BASE)
    kinds = set()
    for params in draws(space, draw, 40):
        kind = params[KIND]
        kinds.add(kind)
        assert ("model.attention.controller.k" in params) == (kind != "ratio")
        assert ("model.attention.controller.ratio" in params) == (kind == "ratio")
        assert {f"model.layers[{i}].share" for i in range(3)} <= set(params)
        config = space.compose(space.settings(params))
        for key, value in params.items():
            if key != "model.layers[0:2].local_window":
                assert lookup(config, key) == value
        window = params["model.layers[0:2].local_window"]
        assert [layer.local_window for layer in config.model.layers] == [window, window, None]
        assert 1e-4 <= config.training.optimizer.learning_rate <= 1e-2
        assert config.model.attention.controller.k % 256 == 0
    assert kinds == {"fixed", "variance", "ratio"}


def test_a_draw_changes_the_base_for_no_other(draw: Draw) -> None:
    space = Space(FULL, BASE)
    before = dataclasses.asdict(space.compose({}))
    for params in draws(space, draw, 5):
        space.compose(space.settings(params))
    assert dataclasses.asdict(space.compose({})) == before


def layered(num_layers: int) -> dict[str, Any]:
    return dataclasses.asdict(build(TrainConfig, {}, [f"model.num_layers={num_layers}"]))


def test_a_third_is_one_dimension_that_sets_its_layers_alike(draw: Draw) -> None:
    num_layers = draw.random.randint(3, 12)
    thirds = {
        f"model.layers[{third}].k": {"type": "int", "low": 300, "high": 900} for third in ("first", "middle", "last")
    }
    space = Space(thirds, layered(num_layers))
    assert [dimension.key for dimension in space.dimensions] == list(thirds)
    for params in draws(space, draw, 5):
        k = [layer.k for layer in space.compose(space.settings(params)).model.layers]
        first, middle, last = params.values()
        third = num_layers // 3
        assert k == [first] * third + [middle] * (num_layers - 2 * third) + [last] * third


def test_conditions_on_several_layers_hold_where_all_of_them_do(draw: Draw) -> None:
    share = {"type": "categorical", "choices": [1, 8]}
    window = {"type": "int", "low": 1, "high": 64}
    space = Space(
        {
            "model.layers[*].share": share,
            "model.layers[*].k": {"type": "int", "low": 300, "high": 900, "when": {"model.layers[*].share": 1}},
            "model.layers[first].local_window": window | {"when": {"model.layers[first].share": 8}},
            "model.layers[last].local_window": window | {"when": {"model.layers[0:2].share": [1]}},
            "model.layers[2,3].sink_tokens": window | {"when": {"model.layers[last].local_window": [3, *range(9, 65)]}},
        },
        layered(6),
    )
    for params in draws(space, draw, 40):
        shares = [params[f"model.layers[{i}].share"] for i in range(6)]
        assert [f"model.layers[{i}].k" in params for i in range(6)] == [share == 1 for share in shares]
        assert ("model.layers[first].local_window" in params) == (shares[:2] == [8, 8])
        assert ("model.layers[last].local_window" in params) == (shares[:2] == [1, 1])
        last = params.get("model.layers[last].local_window", 1)
        assert ("model.layers[2,3].sink_tokens" in params) == (last == 3 or last >= 9)
        space.compose(space.settings(params))


def test_two_dimensions_that_set_the_same_setting_of_a_layer_are_refused_by_name(draw: Draw) -> None:
    def key(layers: list[int]) -> str:
        return f"model.layers[{','.join(map(str, layers))}].local_window"

    for _ in range(30):
        num_layers = draw.random.randint(2, 9)
        a, b = (draw.random.sample(range(num_layers), draw.random.randint(1, num_layers)) for _ in range(2))
        common = [i for i in b if i in a]
        if key(a) == key(b):
            continue
        given = {key(a): ONE_OR_TWO, key(b): ONE_OR_TWO}
        if not common:
            Space(given, layered(num_layers))
            continue
        with pytest.raises(ConfigError) as refused:
            Space(given, layered(num_layers))
        assert refused.value.value == key(b)
        assert f"sets model.layers[{common[0]}].local_window, which {key(a)} sets already" in str(refused.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweep").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sweep_file_draws_valid_configurations(path: Path, draw: Draw) -> None:
    config = load_sweep(path)
    space = Space(config.space, dataclasses.asdict(config.train))
    for params in draws(space, draw, 20):
        space.compose(space.settings(params))


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "must name at least one"),
        ({"model.num_layer": {"type": "int", "low": 1, "high": 2}}, "did you mean"),
        ({"seed": {"type": "integer", "low": 1, "high": 2}}, "type must be one of float, int, categorical"),
        ({"seed": 3}, "type must be one of"),
        ({"seed": {"type": "int", "low": 1, "hihg": 2}}, "did you mean 'high'"),
        ({"seed": {"type": "int", "low": 3, "high": 2}}, "must be <= high"),
        ({"seed": {"type": "int", "low": 1}}, "space.seed.high = None: must be a number"),
        ({"seed": {"type": "int", "low": 1.5, "high": 2}}, "must be integers"),
        ({"seed": {"type": "int", "low": -1, "high": 2}}, "space.seed.low = -1: must be >= 0"),
        ({"seed": {"type": "categorical", "choices": []}}, "at least one value"),
        ({"seed": {"type": "int", "low": 0, "high": 2, "log": True}}, "needs low > 0"),
        ({"seed": {"type": "int", "low": 1, "high": 2, "step": 0}}, "space.seed.step"),
        ({"seed": {"type": "int", "low": 1, "high": 9, "step": "two"}}, "space.seed.step"),
        ({"seed": {"type": "int", "low": 1, "high": 9, "log": "yes"}}, "space.seed.log"),
        ({KIND: {"type": "float", "low": 1, "high": 2}}, "is not a number"),
        ({KIND: {"type": "categorical", "choices": ["fixed", "rato"]}}, "did you mean 'ratio'"),
        ({"model.attention.gates.places": {"type": "categorical", "choices": [["G9"]]}}, "must be one of G1"),
        ({"seed": {"type": "int", "low": 1, "high": 2, "when": {KIND: "ratio"}}}, "stands before it"),
        ({KIND: FULL[KIND], "seed": {"type": "int", "low": 1, "high": 2, "when": {KIND: "learned"}}}, "is none of"),
        ({"model.layers[7:9].k": {"type": "int", "low": 1, "high": 2}}, "names none of the 3 layers"),
        ({"model.layers[3].k": {"type": "int", "low": 1, "high": 2}}, "there is no layer 3 among the 3 layers"),
        ({"model.layers[frist].k": {"type": "int", "low": 1, "high": 2}}, "did you mean 'first'"),
        ({"model.layers[*].k": ONE_OR_TWO, "model.layers[last].k": ONE_OR_TWO}, "which model.layers[2].k sets already"),
        ({"model.layers[*].k": ONE_OR_TWO | {"when": {"model.layers[*].share": 1}}}, "stands before it"),
        ({"model.num_layers": ONE_OR_TWO, "model.layers[*].k": ONE_OR_TWO}, "cannot be searched together"),
        ({"evaluation.sequences": {"type": "int", "low": 1, "high": 2}}, "cannot be searched"),
        ({"tracking.uri": {"type": "categorical", "choices": ["a"]}}, "cannot be searched"),
        ({"workers.num_workers": {"type": "int", "low": 1, "high": 2}}, "cannot be searched"),
        ({"name": {"type": "categorical", "choices": ["a"]}}, "cannot be searched"),
        ({"model": {"type": "int", "low": 1, "high": 2}}, "names several settings"),
    ],
)  # fmt: skip
def test_a_wrong_space_is_refused_by_key_before_anything_starts(space: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as refused:
        Space(space, BASE)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


RATE = "training.optimizer.learning_rate"
K = "model.attention.controller.k"


@pytest.mark.parametrize(
    ("key", "dimension", "words"),
    [
        (K, {"type": "int", "low": 300, "high": 900, "step": 0.5}, ".step = 0.5: must be a whole number > 0"),
        (K, {"type": "int", "low": 300, "high": 900, "step": 1.5}, ".step = 1.5: must be a whole number > 0"),
        (K, {"type": "int", "low": 300, "high": 900, "step": -1}, ".step = -1: must be a whole number > 0"),
        (K, {"type": "int", "low": 300, "high": 900, "step": 601}, ".step = 601: must be <= high - low, which is 600"),
        (RATE, {"type": "float", "low": 0.1, "high": 0.5, "step": 0.41}, ".step = 0.41: must be <= high - low"),
        (RATE, {"type": "float", "low": 0.1, "high": 0.5, "step": math.inf}, ".step = inf: must be a number > 0"),
        (RATE, {"type": "float", "low": 0.1, "high": 0.5, "step": math.nan}, ".step = nan: must be a number > 0"),
        (RATE, {"type": "float", "low": 0.1, "high": math.inf}, ".high = inf: must be a finite number"),
        (RATE, {"type": "float", "low": math.nan, "high": 1}, ".low = nan: must be a finite number"),
        (K, {"type": "int", "low": 300, "high": math.inf}, ".high = inf: must be a finite number"),
        (K, {"type": "int", "low": True, "high": 300}, ".low = True: must be a number"),
        (K, {"type": "int", "low": [1], "high": 300}, ".low = [1]: must be a number"),
        ("seed", {"type": "int", "low": 0, "high": 2**64}, f".high = {2**64}: must be <= {2**64 - 1}"),
        (K, {"type": "float", "low": 300, "high": 900}, f".type = 'float': {K} is a whole number; use int"),
        (K, {"type": ["int"]}, "type must be one of float, int, categorical"),
        (K, {"type": "categorical", "choices": [300, "many"]}, ".choices = 'many': must be a whole number"),
        (K, {"type": "categorical", "choices": [300, 400.5]}, ".choices = 400.5: must be a whole number"),
        (K, {"type": "categorical", "choices": [300, None]}, ".choices = None: must be a whole number"),
        (K, {"type": "categorical", "choices": [True]}, ".choices = True: must be a whole number"),
        (K, {"type": "categorical", "choices": [[300]]}, ".choices = [300]: must be a whole number"),
        (RATE, {"type": "categorical", "choices": [1e-3, "fast"]}, ".choices = 'fast': must be a number"),
        (RATE, {"type": "categorical", "choices": [0.1, 0]}, ".choices = 0.0: must be > 0"),
        (KIND, {"type": "categorical", "choices": [["fixed"]]}, ".choices = ['fixed']: must be one of "),
        ("training.compile", {"type": "categorical", "choices": [True, 2]}, ".choices = 2: must be true or false"),
        ("model.layers[0].gates", {"type": "categorical", "choices": ["G1"]}, ".choices = 'G1': must be a list"),
        ("model.layers[0]", {"type": "categorical", "choices": [{"kk": 1}]}, "choices.kk: no such setting"),
    ],
)  # fmt: skip
def test_what_a_setting_cannot_take_is_refused_when_the_space_is_read(
    key: str, dimension: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError) as refused:
        Space({key: dimension}, BASE)
    assert words in str(refused.value)
    assert str(refused.value).startswith("space")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "low", "high", "step", "last"),
    [("int", 16, 100, 16, 96), ("int", 16, 64, 16, 64), ("float", 0.1, 0.5, 0.15, 0.4), ("float", 0.1, 0.4, 0.1, 0.4),
     ("int", 7, 7, 3, 7), ("int", "1e2", "1e3", "1e2", 1000), ("float", "1e-3", "1e-2", "1e-3", 0.01)],
)  # fmt: skip
def test_whole_steps_end_at_the_largest_value_that_is_drawn_and_it_is_said(
    kind: str, low: Any, high: Any, step: Any, last: float, draw: Draw, caplog: pytest.LogCaptureFixture
) -> None:
    key = "data.context_length" if kind == "int" else "training.optimizer.learning_rate"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna's own, where it changes the range
        space = Space({key: {"type": kind, "low": low, "high": high, "step": step}}, BASE)
        drawn = {params[key] for params in draws(space, draw, 60)}
    assert space.dimensions[0].high == last
    assert max(drawn) <= last
    assert (f"end at {last}" in caplog.text) == (last != float(high))


def test_conditions_are_of_the_types_of_their_settings_and_can_hold() -> None:
    decay = "training.optimizer.weight_decay"
    rate = {"type": "categorical", "choices": ["1e-3", 1]}
    space = Space({RATE: rate, decay: {"type": "float", "low": 0, "high": 1, "when": {RATE: ["1.0e-3", 1]}}}, BASE)
    assert space.dimensions[0].choices == (0.001, 1.0)
    assert space.dimensions[1].when == ((RATE, (0.001, 1.0)),)
    assert space.dimensions[0].internal("1e-3") == 0.001  # as earlier versions have recorded it
    for condition, words in (
        ({RATE: 0.5}, f"when.{RATE} = 0.5: is none of (0.001, 1.0)"),
        ({RATE: "fast"}, f"when.{RATE} = 'fast': must be a number"),
        ({K: 5000}, f"when.{K} = 5000: is not within 300 and 900"),
    ):
        given = {RATE: rate, K: {"type": "int", "low": 300, "high": 900}}
        with pytest.raises(ConfigError) as refused:
            Space(given | {decay: {"type": "float", "low": 0, "high": 1, "when": condition}}, BASE)
        assert words in str(refused.value)


def test_a_space_in_which_no_draw_is_valid_is_refused_and_one_with_few_is_not() -> None:
    heads = "model.attention.num_heads"
    with pytest.raises(ConfigError, match=r"must divide num_heads = [37]; none of 200 draws from the space is valid"):
        Space({heads: {"type": "categorical", "choices": [3, 7]}}, BASE).refuse_empty()
    Space({heads: {"type": "categorical", "choices": [3, 5, 7, 8]}}, BASE).refuse_empty()


def test_a_combination_that_is_not_allowed_is_refused_when_composed() -> None:
    space = Space(FULL, BASE)
    with pytest.raises(ConfigError, match="k_min"):
        space.compose({"model.attention.controller.k": 1})


RATES = {"training.optimizer.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2}}


def test_trials_and_a_dense_baseline_without_any_step_are_refused(tmp_path: Path) -> None:
    stages = [{"kind": "warmup", "steps": 5}]
    base = dataclasses.asdict(build(TrainConfig, tiny(tmp_path, training__stages=stages)))
    space = Space({"model.attention.sparse": {"type": "categorical", "choices": [True, False]}}, base)
    space.compose({"model.attention.sparse": True})
    with pytest.raises(ConfigError) as refused:
        space.compose({"model.attention.sparse": False})
    assert refused.value.key == "training.stages"
    config = build(SweepConfig, {"train": tiny(tmp_path, training__stages=stages), "space": RATES})
    with pytest.raises(ConfigError) as refused:
        Sweep(config, tmp_path / "sweep", Console(quiet=True))
    assert refused.value.key == "train.training.stages"
    assert "dense_baseline = false" in refused.value.allowed
    assert not (tmp_path / "sweep").exists()
    config.dense_baseline = False
    Sweep(config, tmp_path / "sweep", Console(quiet=True))
