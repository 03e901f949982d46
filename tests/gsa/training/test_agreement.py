"""A run goes on only where it would train the same: what results is compared, in both directions."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gsa.config import TrainConfig, build, flatten, to_yaml
from gsa.data.tokenizer import Tokenizer, TokenizerConfig
from gsa.errors import ConfigError, RequestError
from gsa.training.agreement import DECISIVE, difference
from gsa.training.checkpoint import Checkpoint, save
from tests.draw import Draw

STAGES = "training.stages=[{kind: dense, steps: 4}, {kind: sparse, steps: 4}]"
LAYERS = "model.layers=[{k: 300}, {share: 8}]"
OTHER = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 0.5, str: lambda v: f"{v}x"}


def between(held: list[str], given: list[str]) -> str | None:
    """The key in which two runs differ; the same, whichever of them began."""
    one, two = build(TrainConfig, {}, held), build(TrainConfig, {}, given)
    there, back = difference(one, two), difference(two, one)
    assert (there is None) == (back is None)
    return there[0] if there else None


@pytest.mark.parametrize(
    ("held", "given", "key"),
    [
        ([STAGES], ["training.stages=[{kind: dense, steps: 4}]"], "training.stages[1].kind"),
        (
            [STAGES],
            [STAGES.replace("steps: 4}]", "steps: 4, context_length: 8}]")],
            "training.stages[1].context_length",
        ),
        ([STAGES], [STAGES.replace("sparse, steps: 4", "sparse, steps: 5")], "training.stages[1].steps"),
        ([LAYERS], ["model.layers=[{k: null}, {share: 8}]"], "model.layers[0].k"),
        ([LAYERS], ["model.layers=[{k: 300}]"], "model.layers[1].share"),
        ([LAYERS], [], "model.layers[0].k"),
        (["model.attention.selection.coarse={block: 8}"], [], "model.attention.selection.coarse.block"),
        (["model.vocab_size=300"], ["model.vocab_size=301"], "model.vocab_size"),
        (["data.corpus.max_bytes=9"], [], "data.corpus.max_bytes"),
        (["seed=1"], [], "seed"),
        (["training.optimizer.warmup_steps=0"], [], "training.optimizer.warmup_steps"),
    ],
)
def test_what_would_train_differently_is_named(held: list[str], given: list[str], key: str) -> None:
    found = between(held, given)
    assert found == key


@pytest.mark.parametrize(
    ("held", "given"),
    [
        (["model.vocab_size=300"], []),
        ([LAYERS], [LAYERS.replace("]", ", {}, {}]")]),
        (["model.layers=[{share: 1}]"], []),
        (["model.attention.controller.k=300"], ["model.layers[*].k=300", "model.attention.controller.k=300"]),
        ([STAGES], [STAGES.replace("]", ", {kind: dense, steps: 0}]")]),
        (["name=a", "storage=b", "evaluation.every=3", "tracking.experiment=x", "workers.num_workers=2"], []),
    ],
)
def test_what_trains_the_same_is_the_same(held: list[str], given: list[str]) -> None:
    assert between(held, given) is None


def test_every_setting_that_decides_is_compared() -> None:
    config = build(TrainConfig, {}, [STAGES, "model.attention.selection.coarse={}"])
    for key, value in flatten(config).items():
        if key.split(".")[0] not in DECISIVE or type(value) not in OTHER or key.startswith("model.layers"):
            continue
        changed = build(TrainConfig, {}, [STAGES, "model.attention.selection.coarse={}"])
        owner: Any = changed
        *above, last = key.replace("[", ".[").split(".")
        for part in above:
            owner = owner[int(part[1:-1])] if part.startswith("[") else getattr(owner, part)
        setattr(owner, last, OTHER[type(value)](value))
        assert difference(config, changed) is not None, key
        assert difference(changed, config) is not None, key


def test_a_checkpoint_holds_a_run_to_its_settings_and_includes_no_file(tmp_path: Path, draw: Draw) -> None:
    model = draw.model(dtype=torch.float32)
    began = build(TrainConfig, {}, [STAGES, "name=007"])
    (tmp_path / "secret.yaml").write_text("name: secret\n")

    def written(step: int, config_yaml: str) -> Checkpoint:
        tokenizer = Tokenizer.train(TokenizerConfig("byte"), [])
        options: dict[str, Any] = {"model": model, "state": {}, "tokenizer": tokenizer, "metrics": {}, "keep": 9}
        return Checkpoint.open(save(tmp_path, step, config_yaml=config_yaml, **options))

    found = written(1, to_yaml(began))
    assert found.config() == began
    found.refuse_other(began)
    with pytest.raises(ConfigError, match=r"training\.stages\[1\]\.kind = None: was 'sparse' when the run in .* began"):
        found.refuse_other(build(TrainConfig, {}, ["training.stages=[{kind: dense, steps: 4}]"]))
    assert written(2, "name: old\n").config() == build(TrainConfig, {"name": "old"})  # what is new has its default
    for step, (text, words) in enumerate(
        (
            (f"include: {tmp_path}/secret.yaml\n", "include: no such setting"),
            ("- 1\n", "must hold a mapping"),
            ("a: &a [*a]\n", "cannot be read as settings"),
            ("tracking: {uri: '${oc.env:HOME}'}\n", "is not replaced"),
        ),
        3,
    ):
        with pytest.raises(RequestError, match=words):
            written(step, text).config()
