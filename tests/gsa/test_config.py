"""Settings come from files and overrides, are found by the nearest name, and are checked before anything starts."""

import contextlib
import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gsa.config import (
    TrainConfig,
    assign,
    build,
    expand,
    flatten,
    load_config,
    merge,
    read_yaml,
    replaced,
    to_yaml,
)
from gsa.errors import ConfigError, RequestError
from gsa.schema import all_keys, field_of
from tests.draw import Draw

ROOT = Path(__file__).parents[2]


def refusal(*overrides: str) -> str:
    with pytest.raises(RequestError) as refused:
        build(TrainConfig, {}, list(overrides))
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/train").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_training_file_loads(path: Path) -> None:
    assert load_config(path).name == path.stem


def test_yaml_gives_back_an_equal_configuration() -> None:
    config = load_config(ROOT / "configs/train/tiny.yaml", ["model.layers[1].share=4"])
    assert build(TrainConfig, yaml.safe_load(to_yaml(config))) == config


def test_every_setting_has_a_meaning_and_a_default_that_holds() -> None:
    build(TrainConfig, {})
    for key in all_keys(TrainConfig):
        assert field_of(TrainConfig, key).metadata["doc"], key


def test_overrides_of_layers_see_the_number_of_layers_whatever_the_order() -> None:
    for overrides in (
        ["model.layers[last].k=300", "model.num_layers=6"],
        ["model.num_layers=6", "model.layers[last].k=300"],
    ):
        config = build(TrainConfig, {}, overrides)
        assert [layer.k for layer in config.model.layers[-2:]] == [300, 300]
        assert len(config.model.layers) == 6


def test_overrides_reach_single_and_several_layers() -> None:
    config = build(
        TrainConfig,
        {},
        ["model.num_layers=4", "model.layers[*].share=8", "model.layers[1:3].k=300", "model.layers[0].gates=[G3]"],
    )
    layers = config.model.layers
    assert [layer.share for layer in layers] == [8, 8, 8, 8]
    assert [layer.k for layer in layers] == [None, 300, 300, None]
    assert layers[0].gates == ["G3"]


def named(selector: str, num_layers: int, owner: str = "model") -> list[int]:
    """The layers that a key names."""
    data = {"model": {"num_layers": num_layers}}
    keys = expand(TrainConfig, {"train": data} if owner == "train.model" else data, f"{owner}.layers[{selector}].k")
    layers = [int(key.removeprefix(f"{owner}.layers[").removesuffix("].k")) for key in keys]
    assert keys == [f"{owner}.layers[{i}].k" for i in layers]
    return layers


@given(st.integers(3, 200), st.sampled_from(["model", "train.model"]))
@pytest.mark.slow
def test_thirds_are_a_partition_of_the_layers_in_order(num_layers: int, owner: str) -> None:
    first, middle, last = (named(third, num_layers, owner) for third in ("first", "middle", "last"))
    assert first + middle + last == list(range(num_layers)) == named("*", num_layers) == named(":", num_layers)
    assert len(first) == len(last) == num_layers // 3 >= 1


@given(st.lists(st.integers(0, 30), min_size=2, unique=True), st.integers(31, 40))
def test_a_list_names_its_layers_and_slices_in_it_are_pythons(layers: list[int], num_layers: int) -> None:
    assert named(", ".join(map(str, layers)), num_layers) == layers
    a, b = sorted(layers[:2])
    assert named(f"{a}:{b},{b}", num_layers) == list(range(a, b + 1))
    assert named(f"{a - num_layers}:", num_layers) == list(range(num_layers))[a - num_layers :]


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        ("firt", "did you mean 'first'"),
        ("", "must be layers' numbers and slices"),
        ("0,", "must be layers' numbers and slices"),
        ("-1", "must be layers' numbers and slices"),
        ("1.5", "must be layers' numbers and slices"),
        ("\u00b2", "must be layers' numbers and slices"),
        ("0:2:1", "must be layers' numbers and slices"),
        ("0,4", "4 names none of the 4 layers"),
        ("0,4:9", "4:9 names none of the 4 layers"),
        ("2:2", "2:2 names none of the 4 layers"),
        ("0,1,0", "names a layer twice"),
        ("0:3,2", "names a layer twice"),
    ],
)
def test_a_selector_that_names_no_layers_is_refused(selector: str, words: str) -> None:
    assert words in refusal("model.num_layers=4", f"model.layers[{selector}].k=300")


@pytest.mark.parametrize("third", ["first", "middle", "last"])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_fewer_than_three_layers_have_no_thirds(third: str, num_layers: int) -> None:
    words = f"[{third}]': names a third of the layers, and there are only {num_layers}"
    assert words in refusal(f"model.num_layers={num_layers}", f"model.layers[{third}].k=300")


def test_thirds_count_the_layers_of_an_included_file(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("num_layers: 7\n")
    (tmp_path / "run.yaml").write_text("model: {include: model.yaml}\n")
    config = load_config(tmp_path / "run.yaml", ["model.layers[first].share=2", "model.layers[last].share=4"])
    assert [layer.share for layer in config.model.layers] == [2, 2, None, None, None, 4, 4]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_layer=3", "did you mean 'num_layers'"),
        ("training.learning_rate=1e-3", "did you mean 'training.optimizer.learning_rate'"),
        ("optimizr.learning_rate=1e-3", "no such setting"),
        ("model.num_layers=0", "model.num_layers = 0: must be >= 1"),
        ("model.num_layers=two", "model.num_layers = 'two'"),
        ("model.attention.controller.k_min=5000", "model.attention.controller.k_min = 5000: must be <= "),
        ("model.attention.num_kv_heads=3", "must divide num_heads = 4"),
        ("model.attention.gates.places=[G6]", "must be one of G1, G2, G3, G4, G5"),
        ("model.attention.gates.granularity=elements", "did you mean 'element'"),
        ("model.attention.indexer.kind=gated_sigmod", "did you mean 'gated_sigmoid'"),
        ("training.micro_batch_size=3", "training.micro_batch_size = 3: must divide batch_size"),
        ("training.stages=[{kind: dense, steps: 0}]", "training.stages"),
        ("training.stages=[{kind: sparce, steps: 5}]", "did you mean 'sparse'"),
        ("training.optimizer.learning_rate=.nan", "must be a finite number"),
        ("training.optimizer.learning_rate=-1", "must be > 0"),
        ("model.layers[7].k=5", "model.layers = 8: must have <= num_layers"),
        ("model.layers[9:12].k=5", "names none of the 4 layers"),
        ("data[*].k=5", "only model.layers takes [*]"),
        ("name=../up", "name = '../up'"),
        ("name=", "name"),
        ("seed", "must be key=value"),
        ("=3", "must be key=value"),
        ("seed=[1", "is not a YAML value"),
        ("seed={a: 1}", "seed"),
        ("workers.num_workers=0", "must be >= 1"),
        ("data.corpus.source=txt", "did you mean 'text'"),
        ("tracking.uri=${nowhere}", "tracking.uri"),
    ],
)
def test_a_wrong_override_is_refused_by_key_value_and_what_is_allowed(override: str, words: str) -> None:
    assert words in refusal(override)


@pytest.mark.slow
@given(
    key=st.sampled_from(all_keys(TrainConfig)),
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.lists(st.integers(), max_size=2),
)
def test_any_value_of_any_key_is_taken_or_refused(key: str, value: object) -> None:
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    with contextlib.suppress(RequestError):
        build(TrainConfig, {}, [f"{key}={text}"])


def test_a_file_includes_others_and_its_own_keys_win(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/small.yaml").write_text("num_layers: 2\nattention: {num_heads: 4, head_dim: 8}\n")
    (tmp_path / "run.yaml").write_text("model: {include: model/small.yaml, attention: {head_dim: 16}}\n")
    config = load_config(tmp_path / "run.yaml")
    assert (config.model.num_layers, config.model.attention.num_heads, config.model.attention.head_dim) == (2, 4, 16)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [1", "is not YAML"),
        ("- 1", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("include: missing.yaml", "missing.yaml: no such configuration file"),
        ("include: run.yaml", "includes itself"),
        ("include: 3", "must be the path of a YAML file"),
        ("model: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("model: 3", "model = 3: must be a mapping"),
        ("model: [1]", "model = [1]: must be a mapping"),
        ("model: null", "model = None: must be a mapping"),
        ("training: {stages: 3}", "training.stages = 3: must be a list"),
        ("training: {stages: [3]}", "training.stages[0] = 3: must be a mapping"),
        ("model: {layers: {k: 3}}", "model.layers = {'k': 3}: must be a list"),
        ("2: 3", "no such setting"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(RequestError) as refused:
        load_config(tmp_path / "run.yaml")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_and_a_binary_file_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\0")
    for path in (tmp_path / "none.yaml", tmp_path / "run.yaml", tmp_path):
        with pytest.raises(RequestError, match=path.name):
            read_yaml(path)


def test_flat_parameters_name_each_scalar_once() -> None:
    config = load_config(ROOT / "configs/train/tiny.yaml", ["model.layers[1].share=4"])
    flat = flatten(config)
    assert flat["model.layers[1].share"] == 4
    assert flat["training.stages[0].kind"] == "dense"
    assert not any(dataclasses.is_dataclass(v) or isinstance(v, list | dict) for v in flat.values())


@given(st.recursive(st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8))
def test_merging_nothing_or_itself_changes_nothing(data: object) -> None:
    tree = {"a": data}
    assert merge(tree, {}) == tree
    assert merge({}, tree) == tree
    assert merge(tree, tree) == tree


def test_errors_survive_the_way_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ConfigError("a.b", 3, "must be < 3")))  # noqa: S301 - our own bytes
    assert (error.key, error.value, error.allowed, str(error)) == ("a.b", 3, "must be < 3", "a.b = 3: must be < 3")


@pytest.mark.slow
def test_a_replaced_configuration_is_what_building_makes_of_it(draw: Draw) -> None:
    """Or is left to it; and what the one refuses, the other does."""
    base = build(TrainConfig, {"model": {"num_layers": 3}})
    data = dataclasses.asdict(base)
    choices: dict[str, list[Any]] = {
        "training.optimizer.learning_rate": [1e-3, 1, "0.1", -1.0, float("nan")],
        "model.attention.controller.kind": ["fixed", "ratio", "nothing"],
        "model.attention.controller.k": [512, 300.0, "700", 10**6, True],
        "model.attention.gates.places": [[], ["G1", "G2"], ["G9"], "G1"],
        "model.layers[2].share": [1, 8, None],
        "model.layers[0].k": [300, 1],
        "data.corpus.files": [["a.txt"], []],
        "training.stages": [[{"kind": "dense", "steps": 3}], [{"kind": "no"}]],
        "model.vocab_size": [None, 300],
    }
    fast = 0
    for _ in range(150):
        settings = {key: draw.random.choice(choices[key]) for key in draw.random.sample(sorted(choices), 3)}
        expected: Any
        try:
            plain = copy.deepcopy(data)
            for key, value in settings.items():
                assign(TrainConfig, plain, key, value)
            expected = build(TrainConfig, plain)
        except RequestError as error:
            expected = str(error)
        try:
            found: Any = replaced(base, settings)
        except RequestError as error:
            found = str(error)
        if found is not None:
            fast += 1
            assert found == expected, settings
    assert fast > 20
    assert base == build(TrainConfig, {"model": {"num_layers": 3}})
