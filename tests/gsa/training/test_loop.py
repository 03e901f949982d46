"""Training trains what its stage says, and nothing about how it is run changes what comes out."""

import math
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore

from gsa.config import TrainConfig, build
from gsa.data.packing import prepare
from gsa.errors import ConfigError, RequestError, RunError
from gsa.model import GSAForCausalLM, LayerConfig, ModelConfig
from gsa.training import checkpoint
from gsa.training.loop import Trainer, total_steps
from gsa.training.step import TrainingStep
from gsa.training.steps import PREFIX, steps
from tests.draw import CONTROLLERS, Draw
from tests.gsa.training.test_schedule import adamw_of_three_groups
from tests.text import tiny

Logged = list[tuple[int, dict[str, float]]]
UNTIMED = {"tokens_per_second"}  # and what depends on the time


def trainer_of(data: dict[str, Any], folder: Path) -> Trainer:
    config = build(TrainConfig, yaml.safe_load(yaml.safe_dump(data)))
    return Trainer(config, prepare(config.data, Path(config.storage) / "data"), folder)


def train(data: dict[str, Any], folder: Path) -> tuple[Trainer, Logged]:
    trainer = trainer_of(data, folder)
    logged: Logged = []
    trainer.train(lambda step, metrics: logged.append((step, dict(metrics))))
    return trainer, logged


@pytest.fixture
def double() -> Iterator[None]:
    """Models and optimizers in fp64: what is left of a difference is one of meaning, not of rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same(found: tuple[Trainer, Logged], expected: tuple[Trainer, Logged]) -> None:
    assert_close(untimed(found[1]), untimed(expected[1]), rtol=1e-5, atol=1e-6)  # statistics are kept in fp32
    assert_close(weights(found[0]), weights(expected[0]), rtol=1e-7, atol=1e-9)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def untimed(logged: Logged) -> Logged:
    return [(step, {k: v for k, v in metrics.items() if k not in UNTIMED}) for step, metrics in logged]


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_every_stage_moves_what_it_trains_and_nothing_else(draw: Draw, tmp_path: Path, controller: str) -> None:
    for stage in ("dense", "warmup", "sparse"):
        data = tiny(tmp_path, draw.random.randrange(1000), training__stages=[{"kind": stage, "steps": 3}])
        data["model"]["attention"]["controller"]["kind"] = controller
        data["training"]["optimizer"]["weight_decay"] = 0.0
        trainer = trainer_of(data, tmp_path / stage)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train(lambda step, metrics: None)
        indexer = {id(p) for p in trainer.model.indexer_parameters()}
        for name, p in trainer.model.named_parameters():
            trained = stage == "sparse" or (stage == "warmup") == (id(p) in indexer)
            assert (not torch.equal(before[name], p)) == trained, name


@pytest.mark.slow
def test_a_trained_model_predicts_better_than_the_frequencies_of_tokens(draw: Draw, tmp_path: Path) -> None:
    data = tiny(tmp_path, draw.random.randrange(1000), training__stages=[{"kind": "sparse", "steps": 200}])
    trainer, logged = train(data, tmp_path / "a")
    counts = np.bincount(trainer.data.train.tokens, minlength=257) + 1.0
    frequencies = counts / counts.sum()
    unigram = -np.log(frequencies[trainer.data.held_out.tokens]).mean()
    assert logged[0][1]["loss"] > unigram
    assert logged[-1][1]["held_out_loss"] < unigram - 0.1


def test_every_named_metric_is_logged(draw: Draw, tmp_path: Path) -> None:
    _, logged = train(tiny(tmp_path, draw.random.randrange(1000)), tmp_path / "a")
    steps = [step for step, _ in logged]
    assert steps == sorted({*range(2, 13, 2), 4, 8, 12})
    always = {"loss", "tokens_per_second", "gradient_norm", "k_mean", "selected_fraction", "mass_kept"}
    always |= {"first_token_mass", "gate_G1", "gate_G2", "max_activation", "loss_spikes", "learning_rate"}
    held_out = {"held_out_loss", "held_out_bits_per_byte", "held_out_selected_fraction", "layer_1/mass_kept"}
    for step, metrics in logged:
        assert always <= set(metrics)
        assert all(math.isfinite(value) for value in metrics.values())
        assert (held_out <= set(metrics)) == (step % 4 == 0)
        assert ("indexer_kl" in metrics) == (step > 4)
    assert dict(logged)[4]["selected_fraction"] == 1
    assert dict(logged)[12]["selected_fraction"] < 1


def test_the_same_run_twice_is_the_same_to_the_bit_and_another_seed_is_not(draw: Draw, tmp_path: Path) -> None:
    data = tiny(tmp_path, draw.random.randrange(1000))
    first, again = (train(data, tmp_path / name) for name in ("a", "b"))
    assert untimed(first[1]) == untimed(again[1])
    assert_close(weights(first[0]), weights(again[0]), rtol=0, atol=0)
    data["seed"] += 1
    assert untimed(train(data, tmp_path / "c")[1]) != untimed(first[1])


@pytest.mark.usefixtures("double")
@pytest.mark.slow
def test_accumulating_gradients_changes_no_result(draw: Draw, tmp_path: Path) -> None:
    for controller in ("variance", "learned"):
        data = tiny(tmp_path, draw.random.randrange(1000))
        data["model"]["attention"]["controller"]["kind"] = controller
        found = []
        for micro in (1, 2, 4):
            data["training"]["micro_batch_size"] = micro
            found.append(train(data, tmp_path / f"{controller}{micro}"))
        for other in found[1:]:
            assert_same(other, found[0])


def _worker(rank: int, world: int, runs: dict[Path, dict[str, Any]], meeting: Path) -> None:
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world)
    for folder, data in runs.items():
        trainer, logged = train(data, folder)
        if rank == 0:
            torch.save({"weights": weights(trainer), "logged": untimed(logged)}, folder / "result.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("double")
def test_two_workers_equal_one_on_the_same_global_batch(draw: Draw, tmp_path: Path) -> None:
    runs: dict[Path, dict[str, Any]] = {}
    for controller in ("variance", "learned"):
        data = tiny(tmp_path / controller, draw.random.randrange(1000))
        data["model"]["attention"]["controller"]["kind"] = controller
        runs[tmp_path / f"{controller} two"] = data
    spawn(_worker, (2, runs, tmp_path / "meeting"), nprocs=2)
    for folder, data in runs.items():
        alone, logged = train(data, folder.with_name(f"{folder.name} one"))
        both = torch.load(folder / "result.pt", weights_only=True)
        assert_close(both["logged"], untimed(logged), rtol=1e-5, atol=1e-6)
        assert_close(both["weights"], weights(alone), rtol=1e-7, atol=1e-9)


def test_a_run_that_pauses_goes_on_to_the_same_model(draw: Draw, tmp_path: Path) -> None:
    stages = [
        {"kind": "dense", "steps": 4, "context_length": 12},
        {"kind": "warmup", "steps": 3},
        {"kind": "sparse", "steps": 5, "context_length": 40},
    ]
    data = tiny(tmp_path, draw.random.randrange(1000), training__stages=stages)
    whole, logged = train(data, tmp_path / "whole")
    pauses = sorted(draw.random.sample(range(1, 12), 3))
    seen: dict[int, dict[str, float]] = {}
    for until in [*pauses, None]:
        trainer = trainer_of(data, tmp_path / "parts")
        trainer.train(lambda step, metrics: seen.update({step: dict(metrics)}), until)
        assert trainer.step == (until or 12)
        assert "held_out_loss" in seen[trainer.step]
        assert steps(tmp_path / "parts")[-1].name.endswith(f"{trainer.step:09d}")
    assert_close(weights(trainer), weights(whole), rtol=0, atol=0)
    for step, metrics in logged:
        shared = {name: value for name, value in metrics.items() if name not in UNTIMED}
        assert {name: seen[step][name] for name in shared} == shared
    assert trainer.seconds > 0


def test_each_stage_trains_at_its_own_context_length(draw: Draw, tmp_path: Path) -> None:
    lengths = [12, None, 40, 12]
    stages = [{"kind": "dense", "steps": 3, "context_length": length} for length in lengths]
    data = tiny(tmp_path, draw.random.randrange(1000), training__stages=stages)
    trainer = trainer_of(data, tmp_path / "run")
    shapes: list[int] = []
    rows: dict[int, list[tuple[int, ...]]] = {}
    forward = trainer.model.run

    def watched(tokens: Tensor, **options: Any) -> Any:
        if trainer.model.training:
            shapes.append(tokens.shape[1])
            rows.setdefault(tokens.shape[1], []).extend(map(tuple, tokens.tolist()))
        return forward(tokens, **options)

    trainer.model.run = watched  # type: ignore[method-assign]
    trainer.train(lambda step, metrics: None)
    micros = len(shapes) // 12
    assert shapes[::micros] == [length or 24 for length in lengths for _ in range(3)]
    windows = len(trainer.data.at(12).train)
    first = rows[12][: min(windows, len(rows[12]))]
    assert len(set(first)) > len(first) * 0.8  # the second stage of that length goes on where the first one was

    stages[2]["context_length"] = 100_000
    long = tiny(tmp_path / "long", training__stages=stages)
    with pytest.raises(ConfigError, match="context_length = 100000: a split has only"):
        trainer_of(long, tmp_path / "long/run")


def test_resuming_from_any_checkpoint_equals_the_uninterrupted_run(draw: Draw, tmp_path: Path) -> None:
    data = tiny(tmp_path, draw.random.randrange(1000), training__keep_checkpoints=10)
    whole, logged = train(data, tmp_path / "whole")
    for path in steps(tmp_path / "whole"):
        step = int(path.name.removeprefix(PREFIX))
        folder = tmp_path / f"from {step}"
        folder.mkdir()
        (folder / path.name).symlink_to(path)
        resumed, later = train(data, folder)
        assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
        expected = [entry for entry in untimed(logged) if entry[0] >= step]
        assert untimed(later) == expected


def test_a_run_that_was_saved_with_three_groups_of_parameters_goes_on(draw: Draw, tmp_path: Path) -> None:
    """Without weight decay the groups make no difference: it ends where the uninterrupted run does."""
    data = tiny(tmp_path, draw.random.randrange(1000), training__optimizer__weight_decay=0.0)
    whole, _ = train(data, tmp_path / "whole")
    before = trainer_of(data, tmp_path / "parts")
    before.optimizer = adamw_of_three_groups(before.model, before.config.training.optimizer)
    before.train(lambda step, metrics: None, until=10)
    resumed, _ = train(data, tmp_path / "parts")
    assert resumed.step == whole.step
    assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.slow
def test_gradients_are_reduced_once_for_each_optimizer_step(
    draw: Draw, tmp_path: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many micro-batches a step has, compiled or not; the model is so small that one all-reduce holds it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    data = tiny(tmp_path, draw.random.randrange(1000), training__stages=[{"kind": "dense", "steps": 2}])
    data["model"] |= {"num_layers": 1}
    data["training"] |= {"batch_size": 6, "micro_batch_size": 1, "compile": compiled}  # three forwards on each worker
    reduced: list[int] = []

    def count(bucket: Any) -> torch.futures.Future[Tensor]:
        reduced.append(trainer.step)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    # this process is one of two, of which the other only seems to be there
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        trainer = trainer_of(data, tmp_path / "run")
        wrap = trainer._wrap

        def counted(step: TrainingStep) -> nn.Module:
            forward = wrap(step)
            assert trainer.parallel is not None
            trainer.parallel.register_comm_hook(None, lambda state, bucket: count(bucket))
            return forward

        monkeypatch.setattr(trainer, "_wrap", counted)
        trainer.train(lambda step, metrics: None)
    finally:
        dist.destroy_process_group()
    assert reduced == [0, 1]


SCRIPT = """
import json, sys, yaml
from pathlib import Path
from tests.gsa.training.test_loop import trainer_of
trainer = trainer_of(yaml.safe_load(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
trainer.train(lambda step, metrics: print(json.dumps([step, metrics]), flush=True))
"""


@pytest.mark.slow
def test_killed_in_mid_training_and_resumed_equals_the_uninterrupted_run_bit_for_bit(
    draw: Draw, tmp_path: Path
) -> None:
    stages = [{"kind": "dense", "steps": 20}, {"kind": "warmup", "steps": 10}, {"kind": "sparse", "steps": 30}]
    data = tiny(tmp_path, draw.random.randrange(1000), training__stages=stages)
    whole, _ = train(data, tmp_path / "whole")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run.yaml"), str(tmp_path / "killed")]
    kills = 0
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(draw.random.randint(6, 12)):
            process.stdout.readline()
        if process.poll() is None:
            process.kill()  # SIGKILL: no handler runs
        process.stdout.close()
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 2
    last = checkpoint.latest(tmp_path / "killed")
    assert last is not None
    assert last.step == 60
    assert_close(checkpoint.load(last).state_dict(), weights(whole), rtol=0, atol=0)
    first = checkpoint.latest(tmp_path / "whole")
    assert first is not None
    optimizers = [c.state()["optimizer"]["state"] for c in (last, first)]
    assert_close(optimizers[0], optimizers[1], rtol=0, atol=0)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("option", ["checkpoint_activations", pytest.param("compile", marks=pytest.mark.slow)])
def test_activation_checkpointing_and_compilation_change_no_result(
    draw: Draw, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # graphs are captured and differentiated as ever, but need no C++ compiler on this machine
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    data = tiny(tmp_path, draw.random.randrange(1000))
    data["model"]["num_layers"] = 1  # a graph takes seconds for each
    plain = train(data, tmp_path / "plain")
    data["training"][option] = True
    assert_same(train(data, tmp_path / option), plain)


def test_bf16_autocast_trains_close_to_fp32(draw: Draw, tmp_path: Path) -> None:
    data = tiny(tmp_path, draw.random.randrange(1000))
    losses = []
    for precision in ("fp32", "bf16"):
        data["training"]["precision"] = precision
        losses.append(train(data, tmp_path / precision)[1][-1][1]["held_out_loss"])
    assert losses[0] != losses[1]
    assert abs(losses[0] - losses[1]) < 0.1


def test_a_loss_that_is_not_finite_ends_the_run_by_name_and_keeps_its_checkpoints(draw: Draw, tmp_path: Path) -> None:
    data = tiny(tmp_path, draw.random.randrange(1000))
    trainer = trainer_of(data, tmp_path / "a")

    def poison(step: int, metrics: dict[str, float]) -> None:
        if step == 4:
            with torch.no_grad():
                trainer.model.embedding.weight.fill_(math.nan)

    with pytest.raises(RunError, match="loss is nan at step 5; learning rate 0.003"):
        trainer.train(poison)
    last = checkpoint.latest(tmp_path / "a")
    assert last is not None
    assert last.step == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training__batch_size", 8),
        ("seed", 7),
        ("model__intermediate_size", 40),
        ("training__optimizer__learning_rate", 1e-3),
        ("data__context_length", 12),
    ],
)
@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_settings(draw: Draw, tmp_path: Path, key: str, value: float) -> None:
    seed = draw.random.randrange(1000) + 8
    train(tiny(tmp_path, seed), tmp_path / "a")
    with pytest.raises(ConfigError) as refused:
        trainer_of(
            tiny(tmp_path, seed) | {"seed": 7} if key == "seed" else tiny(tmp_path, seed, **{key: value}),
            tmp_path / "a",
        )
    assert refused.value.key == key.replace("__", ".")
    assert "another name" in str(refused.value)


def test_a_run_does_not_go_on_with_other_text(draw: Draw, tmp_path: Path) -> None:
    data = tiny(tmp_path, draw.random.randrange(1000))
    train(data, tmp_path / "a")
    Path(data["data"]["corpus"]["files"][0]).write_text("other text\n" * 100)
    with pytest.raises(RequestError, match="other text"):
        trainer_of(data, tmp_path / "a")


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(draw: Draw, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 100: must be >= the tokenizer's, 257"):
        trainer_of(tiny(tmp_path, 0, model__vocab_size=100), tmp_path / "a")


def test_the_number_of_steps_needs_no_model(draw: Draw, tmp_path: Path) -> None:
    data = tiny(tmp_path, draw.random.randrange(1000))
    data["model"] |= {"intermediate_size": 10**12, "num_layers": 500}  # such a model could not be built
    config = build(TrainConfig, data)
    prepared = prepare(config.data, tmp_path / "cache")
    assert total_steps(config, prepared) == 12
    assert config.model.vocab_size == 257
    config.model.attention.sparse = False
    assert total_steps(config, prepared) == 8
    config.model.vocab_size = 100
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 100: must be >= the tokenizer's, 257"):
        total_steps(config, prepared)


@pytest.mark.parametrize("sparse", [True, False])
def test_a_configuration_knows_whether_its_model_has_an_indexer(draw: Draw, sparse: bool) -> None:
    attention = draw.config()
    attention.sparse = sparse
    for layers in ([], [LayerConfig(sparse=True)], [LayerConfig(sparse=False)], [LayerConfig(sparse=False)] * 2):
        config = ModelConfig(num_layers=2, vocab_size=5, attention=attention, layers=layers)
        assert config.has_indexer == bool(GSAForCausalLM(config).indexer_parameters())


def test_a_dense_model_with_nothing_but_warmup_is_refused_by_its_stages(tmp_path: Path) -> None:
    data = tiny(tmp_path, training__stages=[{"kind": "dense", "steps": 0}, {"kind": "warmup", "steps": 3}])
    build(TrainConfig, data)
    data["model"]["attention"]["sparse"] = False
    with pytest.raises(ConfigError) as refused:
        build(TrainConfig, data)
    assert (refused.value.key, refused.value.value) == ("training.stages", "dense (0 steps), warmup (3 steps)")
