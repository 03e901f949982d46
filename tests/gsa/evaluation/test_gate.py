"""The gate: what trains passes, whatever its settings; each defect is refused by name, in one line."""

import dataclasses
import pickle
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gsa.attention.controller import Seen, Variance
from gsa.attention.gates import Gate
from gsa.attention.indexer import Indexer, IndexerQueries
from gsa.attention.selection import Queries
from gsa.config import TrainConfig, build, load_config, read_yaml
from gsa.data.packing import Batch, prepare
from gsa.evaluation.dry import dry_step
from gsa.evaluation.gate import GateError, check_trainable, examine
from gsa.evaluation.memory import estimate
from gsa.evaluation.shrink import Small, shrink
from gsa.model import GSAForCausalLM, LayerConfig
from gsa.training.optimizer import make_optimizer
from gsa.training.stages import freeze
from gsa.training.step import TrainingStep, cross_entropy
from ray_jobs.dimensions import read_space
from ray_jobs.space import Space
from tests.draw import CONTROLLERS, Draw
from tests.text import tiny

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
CONTROLLER, SELECTION, GATES = "model.attention.controller", "model.attention.selection", "model.attention.gates"
ONE_KEY = [f"{CONTROLLER}.kind=fixed", f"{CONTROLLER}.k=1", f"{CONTROLLER}.k_min=1", f"{CONTROLLER}.k_max=1"]
CLOSED = [f"{GATES}.gain=0", f"{GATES}.bias=0", f"{GATES}.activation=none"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What was found of a broken model must not be remembered of a whole one."""
    examine.cache_clear()
    yield
    examine.cache_clear()


def config_of(*overrides: str) -> TrainConfig:
    return load_config(ROOT / "configs/train/tiny.yaml", list(overrides))


def refusal(config: TrainConfig) -> GateError:
    with pytest.raises(GateError) as refused:
        check_trainable(config, 257)
    assert "\n" not in str(refused.value)
    return refused.value


@pytest.mark.slow
def test_every_draw_of_the_quickstart_space_passes(draw: Draw) -> None:
    data = read_yaml(ROOT / "configs/sweep/quickstart.yaml")
    space = Space(read_space("space", data["space"]), dataclasses.asdict(build(TrainConfig, data["train"])))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=draw.random.randrange(1000)))
    for _ in range(10):
        check_trainable(space.compose(space.settings(space.sample(study.ask()))), 257)


@pytest.mark.parametrize("context_length", [16, 200, 131072])
def test_random_structures_pass(draw: Draw, context_length: int) -> None:
    for kind in draw.random.sample(CONTROLLERS, 3):
        config = config_of(f"data.context_length={context_length}")
        config.model = draw.model(controller=kind).config
        controller = config.model.attention.controller
        controller.k_min, controller.k, controller.k_max = 2, 4, 4 + draw.random.randrange(30)
        config.model.layers[3].k = None
        config.data.attend_across_documents = draw.random.random() < 0.3
        config.training.checkpoint_activations = draw.random.random() < 0.3
        check_trainable(config, 11)


@pytest.mark.parametrize(
    ("overrides", "check", "key"),
    [
        (["model.attention.num_heads=1", "model.attention.num_kv_heads=1"], None, ""),
        ([f"{SELECTION}.share=1048576"], None, ""),
        ([f"{SELECTION}.local_window=1000000", f"{SELECTION}.sink_tokens=1000000"], None, ""),
        ([f"{SELECTION}.coarse={{block: 1000, candidates: 1}}"], None, ""),
        (["data.context_length=2"], None, ""),
        (["model.attention.hidden_size=1"], None, ""),
        (ONE_KEY, None, ""),  # the dense stage trains what a single key leaves alone
        ([*ONE_KEY, "training.stages=[{kind: sparse, steps: 9}]"], "gradients", f"{CONTROLLER}.k"),
        ([*ONE_KEY, "training.stages=[{kind: dense, steps: 9}, {kind: sparse, steps: 9}]"],
         "gradients", f"{CONTROLLER}.k"),  # nothing trains the indexer
        (["model.attention.indexer.temperature=1e-30"], "gradients", "model.attention.indexer.temperature"),
        (["data.context_length=1"], "gradients", "data.context_length"),
        ([*CLOSED, f"{GATES}.places=[G1]"], None, ""),  # opens by itself
        ([*CLOSED, f"{GATES}.places=[G1, G2]"], "gradients", f"{GATES}.gain"),  # each waits for the other
        ([f"{GATES}.bias=-1e4"], "gradients", f"{GATES}.bias"),
        ([f"{GATES}.bias=1e30", f"{GATES}.activation=silu"], "finite", f"{GATES}.bias"),
        ([*CLOSED, f"{GATES}.places=[]", "model.layers[1].gates=[G1,G2]"], "gradients", f"{GATES}.gain"),
        (["model.layers[1].k=1", *ONE_KEY[:1], ONE_KEY[2], "training.stages=[{kind: sparse, steps: 9}]"],
         "gradients", "model.layers[1].k"),
        ([f"{CONTROLLER}.kind=learned", f"{CONTROLLER}.k_min=64"], "gradients", f"{CONTROLLER}.k_max"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_hostile_settings_pass_or_are_refused_by_key(overrides: list[str], check: str | None, key: str) -> None:
    config = config_of(*overrides)
    if check is None:
        check_trainable(config, 257)
    else:
        error = refusal(config)
        assert (error.check, error.key) == (check, key), str(error)


def test_a_mask_that_shows_the_next_token_is_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    def visible(self: Queries, num_keys: int) -> Tensor:
        keys = torch.arange(num_keys)
        return (keys >= self.starts[..., None]) & (keys <= self.positions[:, None] + 1)

    monkeypatch.setattr(Queries, "visible", visible)
    error = refusal(config_of())
    assert error.check == "causality"
    assert "knows tokens from" in error.found


def test_a_mask_that_forgets_documents_is_a_leak_unless_attention_may_cross_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Queries, "visible", lambda self, n: (torch.arange(n) <= self.positions[:, None])[None])
    error = refusal(config_of())
    assert error.check == "causality"
    assert "the documents before its own" in error.found
    assert error.key is None


@pytest.mark.slow
def test_a_number_of_keys_that_depends_on_later_scores_is_a_leak_and_comes_from_the_controller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def statistic(self: Variance, seen: Seen) -> Tensor:
        return seen.scores.double().var(-1)

    monkeypatch.setattr(Variance, "_statistic", statistic)
    error = refusal(config_of())
    assert (error.check, error.key, error.value) == ("causality", f"{CONTROLLER}.kind", "variance")
    assert "stage 'sparse'" in error.found
    check_trainable(config_of(f"{CONTROLLER}.kind=fixed"), 257)


def test_a_detached_gate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Gate, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.activation(self.projection(hidden)).unflatten(-1, (self.heads, -1)).detach()
        return gate * x, gate.mean()

    monkeypatch.setattr(Gate, "forward", forward)
    error = refusal(config_of("model.layers[1].gates=[]"))
    assert (error.check, error.key) == ("gradients", f"{GATES}.places")
    assert "blocks.0.attention.gates.G1.projection" in error.found


def test_a_loss_that_trains_what_it_must_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Indexer.forward

    def forward(self: Indexer, hidden: Tensor, positions: Tensor) -> tuple[IndexerQueries, Tensor]:
        queries, keys = inner(self, hidden, positions)
        return queries, keys + hidden.mean(-1, keepdim=True)

    monkeypatch.setattr(Indexer, "forward", forward)
    error = refusal(config_of())
    assert (error.check, error.key) == ("gradients", "model.attention.sparse")
    assert "the indexer's loss reaches" in error.found


def test_a_nan_that_only_equal_tokens_make_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Gate.forward

    def forward(self: Gate, hidden: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        spread = (hidden - hidden[:, :1]).detach().abs().amax((1, 2), keepdim=True)[..., None]
        return inner(self, hidden, x * spread / spread)

    monkeypatch.setattr(Gate, "forward", forward)
    error = refusal(config_of())
    assert (error.check, error.key) == ("finite", f"{GATES}.places")


def test_a_frozen_parameter_that_should_train_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = GSAForCausalLM.run

    def run(self: GSAForCausalLM, tokens: Tensor, **options: Any) -> Any:
        output = inner(self, tokens, **options)
        return dataclasses.replace(output, indexer_loss=None)

    monkeypatch.setattr(GSAForCausalLM, "run", run)
    error = refusal(config_of())
    assert error.check == "gradients"
    assert "the loss of stage 'warmup' depends on no parameter" in error.found


def test_a_model_that_cannot_run_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(self: Indexer, queries: IndexerQueries, keys: Tensor) -> Tensor:
        raise RuntimeError("sizes\ndiffer")

    monkeypatch.setattr(Indexer, "scores", scores)
    error = refusal(config_of())
    assert (error.check, error.key) == ("runs", "model.attention.sparse")
    assert "RuntimeError: sizes differ" in error.found


def test_a_structure_is_tried_once() -> None:
    check_trainable(config_of(), 257)
    tried = examine.cache_info().misses
    for override in ("training.optimizer.learning_rate=1", "seed=7", "training.batch_size=64", "model.num_layers=9"):
        check_trainable(config_of(override), 257)
    assert examine.cache_info().misses == tried
    check_trainable(config_of("model.layers[1].gates=[G1]"), 257)
    assert examine.cache_info().misses == tried + 1


def test_it_draws_no_random_numbers_of_the_process() -> None:
    before = torch.get_rng_state()
    check_trainable(config_of(), 257)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_small_copy_keeps_the_structure(draw: Draw) -> None:
    for _ in range(6):
        pick = draw.random.choice
        config = config_of("model.num_layers=12", f"data.context_length={pick([64, 1000, 131072])}")
        config.model.attention.controller = dataclasses.replace(
            config.model.attention.controller, k=300, k_min=20, k_max=4096
        )
        layers = config.model.layers
        for i in range(12):
            options: dict[str, Any] = {
                "k": pick([None, 30, 2048]),
                "share": pick([None, 8]),
                "sparse": pick([None, None, False]),
            }
            below = [r for r in range(1, i + 1) if layers[i - r].sparse is not False]
            layers.append(LayerConfig(**options, reuse=pick([0, 0, *below])))
        small = shrink(config, 257)
        assert small == Small.of(dataclasses.asdict(small))  # which checks it
        assert small.model.attention.num_heads // small.model.attention.num_kv_heads == 2
        for place, layer in enumerate(small.layers):
            real, copy = config.model.attention_of(layer), small.model.attention_of(place)
            assert copy.sparse == real.sparse
            assert (copy.selection.share > 1) == (real.selection.share > 1)
            controller = copy.controller
            assert controller.k_min <= controller.k <= controller.k_max
            assert controller.k < small.context_length / 2
            if real.sparse and real.selection.reuse:
                assert small.layers[place - copy.selection.reuse] == layer - real.selection.reuse


class Alive(TorchDispatchMode):
    """Bytes of all tensors that exist, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.held: set[int] = set()
        self.now = 0
        self.peak: int = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.held:
                size: int = storage.nbytes()
                self.held.add(storage._cdata)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata, size)
        return out

    def _free(self, number: int, size: int) -> None:
        self.held.discard(number)
        self.now -= size


def peak_of_training(config: TrainConfig, vocab_size: int) -> int:
    """Two steps of each stage, the second of which is measured."""
    config.model.vocab_size = vocab_size
    shape = (config.training.micro_batch_size, config.data.context_length)
    half = config.training.precision == "bf16"
    with Alive() as alive:
        model = GSAForCausalLM(config.model).train()
        optimizer = make_optimizer(model, config.training.optimizer)
        tokens = torch.randint(vocab_size, shape)
        starts = torch.arange(shape[1]).expand(shape) // 100 * 100
        for stage in ("dense", "warmup", "sparse"):
            freeze(model, stage)
            step = TrainingStep(model, stage, config.training.checkpoint_activations)
            for measure in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    losses = step(Batch(tokens, tokens, starts), measure)
                losses.total.backward()
                del losses
                optimizer.step()
                optimizer.zero_grad()
    peak: int = alive.peak
    return peak


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.context_length=192", f"{GATES}.places=[G1,G2,G3,G4,G5]", "model.attention.num_kv_heads=4"],
        ["data.context_length=192", "training.checkpoint_activations=true", "model.num_layers=3"],
        ["data.context_length=300", "training.precision=bf16", "model.attention.query_chunk=64"],
        ["model.attention.hidden_size=512", "model.intermediate_size=1024", "data.context_length=64"],
        ["model.attention.indexer.num_heads=8", "data.context_length=256"],
    ],
)
@pytest.mark.slow
def test_the_estimate_is_within_a_third_of_what_is_alive(overrides: list[str]) -> None:
    config = config_of("evaluation.batch_size=1", *overrides)
    config.training.micro_batch_size = 2
    estimated, peak = estimate(config, 3000, CPU).total, peak_of_training(config, 3000)
    assert 0.75 < estimated / peak < 1.33, f"{estimated} estimated, {peak} alive"


@pytest.mark.parametrize("overrides", [[], [f"{GATES}.places=[G1,G2,G3,G4,G5]"], ["model.tie_embeddings=false"]])
def test_parameters_are_counted_exactly(overrides: list[str]) -> None:
    config = config_of(*overrides)
    config.model.vocab_size = 3000
    held = sum(parameter.nbytes for parameter in GSAForCausalLM(config.model).parameters())
    assert estimate(config, 3000, CPU).parameters == held


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("overrides", [[], ["data.context_length=64", "model.attention.query_chunk=16"]])
def test_an_evaluation_is_estimated_in_the_precision_it_runs_in(precision: str, overrides: list[str]) -> None:
    config = config_of("evaluation.batch_size=16", f"training.precision={precision}", *overrides)
    config.training.micro_batch_size, config.model.vocab_size = 1, 3000
    with Alive() as alive:
        model = GSAForCausalLM(config.model, precision).eval()
        tokens = torch.randint(3000, (16, config.data.context_length))
        starts = torch.zeros_like(tokens)
        with torch.no_grad(), model.autocast():
            cross_entropy(model.run(tokens, starts=starts, measure=True).logits, tokens)
    estimated = estimate(config, 3000, CPU)
    held = estimated.parameters + estimated.workspace
    assert estimated.gradients == estimated.activations == 0  # the evaluation needs most
    assert 0.75 < held / alive.peak < 1.33, f"{held} estimated, {alive.peak} alive"


def test_an_evaluation_on_a_gpu_takes_what_the_kernels_take() -> None:
    gpu = torch.device("cuda")
    config = config_of("data.context_length=4096", "evaluation.batch_size=64", "model.num_layers=1")
    by_precision = {}
    for precision in ("auto", "bf16", "fp32"):
        config.training.precision = precision
        by_precision[precision] = estimate(config, 257, gpu)
        assert (by_precision[precision] == estimate(config, 257, CPU)) == (precision == "fp32")
    assert by_precision["auto"] == by_precision["bf16"]
    # bf16 logits, their logarithms in fp32: at a large vocabulary they are all that counts
    config.training.precision, config.model.vocab_size = "auto", 100_000
    tokens = 64 * 4096
    assert estimate(config, 257, gpu).workspace == pytest.approx(tokens * 100_000 * (2 + 2 * 4), rel=0.01)


def test_what_does_not_fit_is_refused_with_both_numbers_and_the_setting_that_would_help() -> None:
    config = config_of("data.context_length=4096", "model.num_layers=8", "evaluation.batch_size=1")
    needed = estimate(config, 257, CPU).total
    assert check_trainable(config, 257, CPU, memory_bytes=needed).memory.total == needed
    with pytest.raises(GateError) as refused:
        check_trainable(config, 257, CPU, memory_bytes=needed - 1)
    assert (refused.value.check, refused.value.key) == ("memory", "training.checkpoint_activations")
    assert str(refused.value).count("GiB") == 2
    config.training.micro_batch_size = config.training.batch_size = 1
    assert estimate(config, 257, CPU).total < needed / 4


def test_a_longer_stage_counts_at_its_own_length() -> None:
    stages = "training.stages=[{kind: dense, steps: 9}, {kind: sparse, steps: 9, context_length: 4096}]"
    staged, long = config_of(stages), config_of("data.context_length=4096")
    assert estimate(staged, 257, CPU) == estimate(long, 257, CPU)
    assert shrink(staged, 257).model == shrink(long, 257).model


def test_a_gpu_needs_less_than_torch_on_a_cpu_where_the_kernels_run() -> None:
    config = config_of("data.context_length=4096", "evaluation.batch_size=1")
    assert estimate(config, 257, torch.device("cuda")).activations < estimate(config, 257, CPU).activations / 4


def test_a_refusal_crosses_processes() -> None:
    error = GateError("memory", "too much", "training.micro_batch_size", 8)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (str(copy), copy.check, copy.key, copy.value) == (str(error), "memory", error.key, 8)


def test_a_dry_step_takes_real_text_through_every_stage_and_changes_no_setting(draw: Draw, tmp_path: Path) -> None:
    config = build(TrainConfig, tiny(tmp_path, draw.random.randrange(1000)))
    data = prepare(config.data, tmp_path / "cache")
    before = dataclasses.asdict(config)
    assert dry_step(config, data, CPU) is None
    assert dry_step(config, data, CPU, force=True) is None
    assert dataclasses.asdict(config) == before


def test_a_dry_step_without_room_is_a_refusal(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = build(TrainConfig, tiny(tmp_path, draw.random.randrange(1000)))
    data = prepare(config.data, tmp_path / "cache")

    def run(self: GSAForCausalLM, tokens: Tensor, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(GSAForCausalLM, "run", run)
    with pytest.raises(GateError, match="memory: a step on cpu runs out of memory"):
        dry_step(config, data, CPU, force=True)
