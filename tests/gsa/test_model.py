"""The whole model: what the layers promise holds through it; how it is built, trained, decoded and refused."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from gsa.attention.cache import Cache
from gsa.attention.config import AttentionConfig, Stage
from gsa.attention.controller import ControllerConfig, Uncertainty
from gsa.attention.selection import SelectionConfig
from gsa.attention.statistics import means
from gsa.errors import ConfigError, RequestError
from gsa.model import Block, GSAForCausalLM, LayerConfig, ModelConfig
from gsa.sampling import sample
from gsa.settings import check
from tests.draw import CONTROLLERS, INDEXERS, Draw


def tokens_for(draw: Draw, batch: int, length: int) -> Tensor:
    return draw.integers(0, 10, batch, length)


def config_of(layers: list[LayerConfig] | None = None, **attention: Any) -> ModelConfig:
    """Three layers of default attention, but for what is given."""
    return ModelConfig(num_layers=3, vocab_size=11, attention=AttentionConfig(**attention), layers=layers or [])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_future_tokens_change_nothing(draw: Draw, controller: str, training: bool) -> None:
    model = draw.model(controller=controller).train(training)
    tokens, starts = tokens_for(draw, 2, 18), draw.starts(2, 18)
    s = draw.random.randint(1, 17)
    changed = tokens.clone()
    changed[:, s:] = (tokens[:, s:] + draw.integers(1, 10, 2, 18 - s)) % 11
    before, after = model(tokens, starts=starts), model(changed, starts=starts)
    assert_close(after[:, :s], before[:, :s], rtol=0, atol=1e-9)
    assert not torch.equal(after[:, s:], before[:, s:])


def test_a_row_depends_on_no_other_row_and_no_padding(draw: Draw) -> None:
    for controller in CONTROLLERS:
        model = draw.model(controller=controller)
        tokens = tokens_for(draw, 3, 12)
        alone = model(tokens[:1])
        assert_close(model(tokens)[:1], alone)
        assert_close(model(torch.cat((tokens, tokens_for(draw, 3, 4)), dim=1))[:1, :12], alone)
        padded = torch.cat((tokens_for(draw, 3, 4), tokens), dim=1)
        starts = torch.where(torch.arange(16) < 4, 0, 4).expand(3, 16)
        assert_close(model(padded, starts=starts)[:1, 4:], alone)


def test_packed_documents_give_what_each_gives_alone(draw: Draw) -> None:
    for controller in CONTROLLERS:
        model = draw.model(controller=controller)
        tokens, starts = tokens_for(draw, 1, 20), draw.starts(1, 20)
        packed = model(tokens, starts=starts)
        for start in starts.unique().tolist():
            document = starts[0] == start
            assert_close(packed[:, document], model(tokens[:, document]))


@pytest.mark.parametrize("indexer", INDEXERS)
@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.slow
def test_prefill_then_decode_equals_one_forward(draw: Draw, controller: str, indexer: str) -> None:
    model = draw.model(controller=controller, indexer=indexer)
    tokens, starts = tokens_for(draw, 2, 24), draw.random.choice([None, draw.starts(2, 24)])
    full, cache = model(tokens, starts=starts), Cache(4, draw.random.choice([None, 24, 30]))
    for call in draw.splits(24):
        logits = model(tokens[:, call], starts=None if starts is None else starts[:, call], cache=cache)
        assert_close(logits, full[:, call], rtol=0, atol=1e-10)
        assert cache.length == call.stop


def test_prefill_then_decode_equals_one_forward_in_fp32_at_initial_weights(draw: Draw) -> None:
    model = GSAForCausalLM(config_of(controller=ControllerConfig(k=6, k_min=2, k_max=9))).eval()
    tokens = tokens_for(draw, 2, 24)
    full, cache = model(tokens), Cache(3)
    for call in draw.splits(24):
        assert_close(model(tokens[:, call], cache=cache), full[:, call], rtol=0, atol=1e-5)


def test_a_cache_can_be_taken_back(draw: Draw) -> None:
    """To before tokens that were tried, whatever windows they opened."""
    model = draw.model(share=draw.random.choice([1, 2, 4]))
    tokens, cache = tokens_for(draw, 2, 20), Cache(4, 20)
    full = model(tokens)
    model(tokens[:, :11], cache=cache)
    for tried in (3, 9):
        before = cache.snapshot()
        model(tokens_for(draw, 2, tried), cache=cache)
        cache.restore(before)
    assert_close(model(tokens[:, 11:], cache=cache), full[:, 11:], rtol=0, atol=1e-10)
    with pytest.raises(RequestError, match="only one with a capacity"):
        Cache(4).snapshot()


def test_a_cache_without_room_is_refused_by_name(draw: Draw) -> None:
    model, cache = draw.model(), Cache(4, 5)
    model(tokens_for(draw, 2, 4), cache=cache)
    with pytest.raises(RequestError, match="2 more tokens after 4 exceed its capacity, 5"):
        model(tokens_for(draw, 2, 2), cache=cache)


@pytest.mark.parametrize("capacity", [None, 12])
def test_a_call_without_starts_goes_on_with_the_document_of_the_cache(draw: Draw, capacity: int | None) -> None:
    model = draw.model()
    tokens, cache = tokens_for(draw, 2, 9), Cache(4, capacity)
    starts = torch.where(torch.arange(9) < 3, 0, 3).expand(2, 9)
    model(tokens[:, :6], starts=starts[:, :6], cache=cache)
    assert_close(model(tokens[:, 6:], cache=cache), model(tokens, starts=starts)[:, 6:])


def test_no_token_and_one_token_work(draw: Draw) -> None:
    for controller in CONTROLLERS:
        model = draw.model(controller=controller)
        for stage in ("dense", "warmup", "sparse"):
            for length in (0, 1):
                tokens = tokens_for(draw, 2, length)
                result = model.run(tokens, stage=stage, indexer_loss=True, measure=True)
                assert result.logits.shape == (2, length, 11)
                assert result.logits.isfinite().all()


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("stage", ["dense", "warmup", "sparse"])
def test_each_loss_reaches_its_own_parameters_and_no_others(draw: Draw, stage: Stage, controller: str) -> None:
    model = draw.model(controller=controller)
    names = [name for name, _ in model.named_parameters()]
    indexer = {id(p) for p in model.indexer_parameters()}
    of_indexer = {name for name, p in model.named_parameters() if id(p) in indexer}
    assert of_indexer == {name for name in names if ".indexer." in name or ".controller." in name}
    result = model.run(tokens_for(draw, 2, 16), stage=stage, indexer_loss=True)

    def reached(loss: Tensor) -> set[str]:
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
        return {name for name, gradient in zip(names, found, strict=True) if gradient is not None}

    assert reached(result.logits.square().sum()) == set(names) - of_indexer
    if stage == "dense":
        assert result.indexer_loss is None
    elif stage == "warmup" or model.config.attention_of(3).sparse:
        assert result.indexer_loss is not None
        assert reached(result.indexer_loss) == of_indexer


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
def test_activation_checkpointing_changes_no_result_and_no_gradient(draw: Draw, stage: Stage) -> None:
    for controller in CONTROLLERS:
        model = draw.model(controller=controller)
        tokens = tokens_for(draw, 2, 13)
        found: list[tuple[Any, ...]] = []
        for checkpointed in (False, True):
            model.zero_grad()
            result = model.run(tokens, stage=stage, indexer_loss=True, checkpoint_activations=checkpointed)
            assert result.indexer_loss is not None
            (result.logits.square().mean() + result.indexer_loss).backward()
            gradients = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]
            found.append((result.logits, result.indexer_loss, gradients))
            if result.uncertainty is not None:
                found[-1] += (result.uncertainty,)
        assert_close(found[1], found[0])


def test_forward_moves_no_buffer_and_update_references_moves_those_of_training(draw: Draw) -> None:
    model = draw.model(controller="variance")
    tokens = tokens_for(draw, 2, 13)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert model.eval().run(tokens).uncertainty is None
    uncertainty = model.train().run(tokens, indexer_loss=True).uncertainty
    assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    assert uncertainty is not None
    model.update_references(uncertainty)
    for block, (total, count) in zip(model.blocks, uncertainty, strict=True):
        assert isinstance(block, Block)
        controller = block.attention.controller
        assert isinstance(controller, Uncertainty) == bool(count > 0)
        if isinstance(controller, Uncertainty):
            assert count == 2 * math.ceil(13 / block.attention.config.selection.share)
            assert_close(controller.reference, total / count)


def test_statistics_come_by_layer(draw: Draw) -> None:
    model = draw.model()
    output = model.run(tokens_for(draw, 2, 9), measure=True)
    statistics = means(output.statistics)
    assert {"k_mean", "mass_kept", "first_token_mass", "selected_fraction"} <= set(statistics)
    assert all(values.shape == (4,) for values in statistics.values())
    assert output.max_activation is not None
    assert output.max_activation.shape == (4,)
    assert ((statistics["mass_kept"] > 0) & (statistics["mass_kept"] <= 1 + 1e-6)).all()


def test_initial_outputs_are_small_and_tied_embeddings_are_one_tensor() -> None:
    for tied in (True, False):
        config = config_of()
        config.tie_embeddings = tied
        model = GSAForCausalLM(config)
        assert (model.head.weight is model.embedding.weight) == tied
        assert float(model(torch.arange(11)[None]).detach().abs().max()) < 5
        assert_close(float(model.embedding.weight.detach().std()), 0.02, rtol=0.2, atol=0)


@pytest.mark.slow
def test_greedy_generation_takes_the_likeliest_token_of_a_full_forward_each_time(draw: Draw) -> None:
    for controller in CONTROLLERS:
        model = draw.model(controller=controller)
        expected = tokens_for(draw, 2, 5)
        generated = model.generate(expected, max_new_tokens=12)
        for _ in range(12):
            expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), dim=1)
        assert torch.equal(generated, expected)


@pytest.mark.slow
def test_generation_repeats_with_its_seed_and_leaves_the_mode_alone(draw: Draw) -> None:
    model = draw.model()
    prompt = tokens_for(draw, 2, 3)
    for training in (True, False):
        model.train(training)
        first, again, other = (model.generate(prompt, 30, temperature=1.0, seed=seed) for seed in (1, 1, 2))
        assert model.training == training
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.equal(first[:, :3], prompt)
    assert torch.equal(model.generate(prompt, 0), prompt)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"max_new_tokens": -1},
    ],
)
def test_generation_refuses_options_out_of_bounds(draw: Draw, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        draw.model().generate(tokens_for(draw, 1, 3), **options)


def test_generation_refuses_an_empty_prompt(draw: Draw) -> None:
    with pytest.raises(RequestError, match="prompt is empty"):
        draw.model().generate(tokens_for(draw, 1, 0))


def test_sampling_draws_from_the_whole_nucleus_and_nothing_else(draw: Draw) -> None:
    for _ in range(5):
        probabilities = (2 * draw.normal(6)).softmax(0)
        top_p = draw.random.uniform(0.05, 0.95)
        nucleus: set[int] = set()
        for token in probabilities.argsort(descending=True).tolist():
            if sum(float(probabilities[i]) for i in nucleus) < top_p:
                nucleus.add(token)
        logits = (probabilities.log() * 0.5).expand(4000, 6)
        drawn = sample(logits, 0.5, top_p, draw.generator)
        assert drawn.shape == (4000, 1)
        likely = {i for i in nucleus if probabilities[i] > 0.01}
        assert likely <= set(drawn.flatten().tolist()) <= nucleus


def test_sampling_follows_the_temperature(draw: Draw) -> None:
    logits = draw.normal(5)
    for temperature in (0.5, 1.0, 2.0):
        drawn = sample(logits.expand(20_000, 5), temperature, 1.0, draw.generator).flatten()
        frequencies = torch.bincount(drawn, minlength=5).double() / 20_000
        assert_close(frequencies, (logits / temperature).softmax(0), rtol=0, atol=0.025)


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-40])
def test_sampling_at_the_lowest_temperatures_takes_the_likeliest_token(draw: Draw, temperature: float) -> None:
    logits = 3 * draw.normal(50, 7, dtype=torch.float32)
    logits[:, 2] += logits.amax(-1)  # no near ties
    logits[:, 2] += 20
    assert (sample(logits, temperature, 1.0, draw.generator) == 2).all()


def test_a_layers_own_settings_replace_the_common_ones() -> None:
    layers = [LayerConfig(), LayerConfig(k=300, share=8, gates=["G4"], local_window=2, sink_tokens=3), LayerConfig()]
    config = config_of(layers)
    first, second, third = (config.attention_of(i) for i in range(3))
    assert first == third == config.attention
    assert (second.controller.k, second.selection.share, second.gates.places) == (300, 8, ["G4"])
    assert (second.selection.local_window, second.selection.sink_tokens) == (2, 3)
    assert second.controller.k_max == config.attention.controller.k_max


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (config_of(num_heads=4, num_kv_heads=3), "model.attention.num_kv_heads"),
        (config_of(head_dim=7), "model.attention.head_dim"),
        (config_of(controller=ControllerConfig(k_min=9, k=9, k_max=8)), "model.attention.controller.k_min"),
        (config_of(selection=SelectionConfig(share=6)), "model.attention.selection.share"),
        (config_of(selection=SelectionConfig(reuse=1)), "model.layers[0].reuse"),
        (config_of([LayerConfig(), LayerConfig(k=8)]), "model.layers[1].k"),
        (config_of([LayerConfig(k=0)]), "model.layers[0].k"),
        (config_of([LayerConfig(ratio=1.5)]), "model.layers[0].ratio"),
        (config_of([LayerConfig(), LayerConfig(share=3)]), "model.layers[1].share"),
        (config_of([LayerConfig(gates=["G7"])]), "model.layers[0].gates"),
        (config_of([LayerConfig(reuse=1)]), "model.layers[0].reuse"),
        (config_of([LayerConfig(sparse=False), LayerConfig(reuse=1)]), "model.layers[1].reuse"),
        (config_of([LayerConfig(), LayerConfig(local_window=-1)]), "model.layers[1].local_window"),
        (config_of([LayerConfig(), LayerConfig(sink_tokens=-1)]), "model.layers[1].sink_tokens"),
        (config_of([LayerConfig()] * 4), "model.layers"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(config: ModelConfig, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(config, "model")
    assert refused.value.key == key
    assert key in str(refused.value)


def test_a_model_without_vocabulary_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        GSAForCausalLM(ModelConfig())


@pytest.mark.parametrize(
    "config",
    [
        config_of(sparse=False, selection=SelectionConfig(reuse=1)),
        config_of([LayerConfig(sparse=False, reuse=1)]),
        config_of([LayerConfig(reuse=0), LayerConfig(), LayerConfig(reuse=2)], selection=SelectionConfig(reuse=1)),
        config_of([LayerConfig(reuse=0)], selection=SelectionConfig(reuse=1)),
        config_of([LayerConfig(), LayerConfig(sparse=False, reuse=1)]),
    ],
)
def test_a_model_that_passes_the_check_can_be_built_and_run(config: ModelConfig) -> None:
    check(config, "model")
    model = GSAForCausalLM(config)
    for stage in ("dense", "warmup", "sparse"):
        assert model.run(torch.arange(11)[None], stage=stage, indexer_loss=True).logits.isfinite().all()
