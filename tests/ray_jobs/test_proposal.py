"""A space by layer: few dimensions whatever the depth, valid whatever was measured, and settled where it is clear."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from gsa.attention.controller import KINDS
from gsa.config import TrainConfig, build, expand, load_config, lookup
from gsa.data.packing import prepare
from gsa.evaluation.layers import SHARES
from gsa.training import checkpoint
from gsa.training.loop import make_model
from ray_jobs.cli import main
from ray_jobs.proposal import group, propose_space, selector
from ray_jobs.space import Space
from tests.draw import Draw
from tests.text import tiny


def configuration(draw: Draw, num_layers: int) -> TrainConfig:
    k_min = draw.random.randint(1, 300)
    overrides = {
        "model.num_layers": num_layers,
        "data.context_length": draw.random.choice([8, 256, 8192]),
        "model.attention.controller.kind": draw.random.choice(list(KINDS)),
        "model.attention.controller.k_min": k_min,
        "model.attention.controller.k": k_min,
        "model.attention.controller.k_max": k_min + draw.random.choice([0, 1, 5000]),
        "model.attention.gates.places": draw.random.choice([[], ["G2"], ["G1", "G2"]]),
    }
    return build(TrainConfig, {}, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])


def diagnostics(draw: Draw, config: TrainConfig) -> list[dict[str, float]]:
    """Anything that could be measured of the layers."""
    layers = []
    for i in range(config.model.num_layers):
        visible = config.data.context_length / 2
        fraction = draw.random.uniform(0.01, 1)
        row = {"k_mean": fraction * visible, "selected_fraction": fraction, "mass_kept": draw.random.random()}
        row["first_token_mass"] = draw.random.choice([0.001, 0.3])
        if draw.random.random() < 0.8:
            row |= {"k_99": draw.random.randint(1, config.data.context_length), "u32": draw.random.uniform(1, 9)}
            row |= {f"share_{share}_lost": draw.random.choice([-0.1, 0.001, 0.03, 0.4]) for share in SHARES}
            if i:
                row["reuse_1_lost"] = draw.random.choice([-0.1, 0.004, 0.3])
        layers.append(row)
    return layers


def test_any_proposal_is_a_small_space_of_valid_configurations(draw: Draw) -> None:
    for _ in range(12):
        config = configuration(draw, draw.random.choice([1, 2, 5, 28]))
        layers, most = diagnostics(draw, config), draw.random.randint(1, 7)
        found = propose_space(layers, config, most)
        assert len(found.reasons) == len(layers)
        if not found.space:
            continue
        data = yaml.safe_load(yaml.safe_dump(found.sweep(config)))
        space = Space(data["space"], data["train"])
        assert len(space.dimensions) == len(found.space) <= most
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=draw.random.randrange(1000)))
        for _ in range(3):
            params = space.sample(study.ask())
            composed = space.compose(space.settings(params))
            assert all(lookup(composed, key) == value for key, value in space.settings(params).items())
            for key, value in found.settings.items():
                assert all(lookup(composed, single) == value for single in expand(TrainConfig, data["train"], key))


def test_every_layer_that_selects_has_its_share_settled_or_searched(draw: Draw) -> None:
    config = configuration(draw, 28)
    layers = diagnostics(draw, config)
    found = propose_space(layers, config)
    keys = [key for key in (*found.space, *found.settings) if key.endswith(".share")]
    named = [target for key in keys for target in expand(TrainConfig, {"model": {"num_layers": 28}}, key)]
    assert sorted(named) == sorted(f"model.layers[{i}].share" for i, row in enumerate(layers) if "k_99" in row)
    for i, row in enumerate(layers):
        free = [share for share in SHARES if row.get(f"share_{share}_lost", 1) < 0.005]
        assert (f"share = {max(free)}" if free else "share") in (found.reasons[i] if "k_99" in row else "share")


def layer(k: int, *lost: float) -> dict[str, float]:
    row = {"k_mean": 100, "selected_fraction": 0.1, "mass_kept": 0.9, "first_token_mass": 0.0, "k_99": k, "u32": 2}
    return row | {f"share_{share}_lost": x for share, x in zip(SHARES, lost, strict=True)}


def test_like_layers_share_a_dimension_whose_range_is_around_what_keeps_the_mass() -> None:
    kind = ["model.num_layers=5", "data.context_length=8192", "model.attention.controller.k_min=1"]
    config = build(TrainConfig, {}, kind)
    narrow, free = layer(100, 0.02, 0.04, 0.3), layer(1000, 0.0, 0.0, 0.001)
    found = propose_space([narrow, free, layer(1000, 0.0, 0.0, 0.1), free, narrow], config)
    assert found.settings == {"model.layers[2].share": 16, "model.layers[1,3].share": 32}
    assert found.space == {
        "model.layers[0,4].share": {"type": "categorical", "choices": [1, 8, 16]},
        "model.layers[0,4].k": {"type": "int", "low": 50, "high": 200, "log": True},
        "model.layers[1:4].k": {"type": "int", "low": 500, "high": 2000, "log": True},
    }
    assert found.reasons[0] == "share 1 or 8 or 16; k from 50 to 200"


def test_groups_are_a_partition_of_like_layers(draw: Draw) -> None:
    for _ in range(50):
        features = {
            name: {i: draw.random.choice([0.0, draw.random.uniform(0, 5)]) for i in range(draw.random.randint(0, 28))}
            for name in ("share", "k", "reuse")
        }
        most = draw.random.randint(1, 8)
        groups = group(features, most)
        assert sum(map(len, groups.values())) <= most
        assert list(groups) == [name for name in features if features[name]][:most]
        for name, found in groups.items():
            assert sorted(i for layers in found for i in layers) == sorted(features[name])
            spans = sorted((min(features[name][i] for i in g), max(features[name][i] for i in g)) for g in found)
            assert all(high <= low for (_, high), (low, _) in zip(spans, spans[1:], strict=False))


def test_a_selector_names_the_layers_it_was_made_of(draw: Draw) -> None:
    for _ in range(50):
        count = draw.random.randint(1, 30)
        layers = sorted(draw.random.sample(range(count), draw.random.randint(1, count)))
        keys = expand(TrainConfig, {"model": {"num_layers": count}}, f"model.layers{selector(layers)}.k")
        assert keys == [f"model.layers[{i}].k" for i in layers]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint of a model with its initial values."""
    config = build(TrainConfig, tiny(tmp_path))
    data = prepare(config.data, tmp_path / "runs/data")
    from gsa.config import to_yaml

    return checkpoint.save(
        tmp_path / "runs/train/tiny",
        1,
        model=make_model(config, data),
        state={"data": data.fingerprint},
        config_yaml=to_yaml(config),
        tokenizer=data.tokenizer,
        metrics={},
        keep=1,
    )


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    output, errors = capsys.readouterr()
    return int(ended.value.code or 0), output, errors


def test_the_command_writes_a_sweep_and_says_how_to_run_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = str(trained.parents[2])
    code, output, errors = call(capsys, "propose", str(trained), "--storage", storage, "--max-dimensions", "2")
    assert code == 0, errors
    path = Path(storage) / "proposals/tiny-layers.yaml"
    assert "u(32)" in output
    assert f"next: gsa sweep {path}" in output
    data: dict[str, Any] = yaml.safe_load(path.read_text())
    config = build(TrainConfig, data["train"])
    assert config.storage == storage
    assert 1 <= len(Space(data["space"], dataclasses.asdict(config)).dimensions) <= 2


def test_the_command_prints_json_alone(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained.parent / "sweep.yaml"
    code, output, _ = call(capsys, "propose", str(trained), "--storage", str(trained.parents[2]), "--json")
    found = json.loads(output)
    assert code == 0
    assert len(found["layers"]) == len(found["reasons"]) == 2
    assert not out.exists()
    assert not (trained.parents[2] / "proposals").exists()
    call(capsys, "propose", str(trained), "--storage", str(trained.parents[2]), "--json", "--out", str(out))
    assert yaml.safe_load(out.read_text())["space"] == found["space"]


def test_other_text_and_no_checkpoint_are_refused_by_name(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = str(trained.parents[2])
    code, _, errors = call(capsys, "propose", str(trained.parents[2] / "nowhere"), "--storage", storage)
    assert code == 2
    assert "is not a checkpoint" in errors
    config = load_config(trained / "config.yaml")
    Path(config.data.corpus.files[0]).write_text("changed\n")
    code, _, errors = call(capsys, "propose", str(trained), "--storage", storage)
    assert code == 2
    assert "the text of data.corpus" in errors
