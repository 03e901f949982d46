"""Held-out loss, floors and retrieval, each against the plainest computation of the same number."""

import contextlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from gsa.config import TrainConfig, build
from gsa.data.packing import Prepared, prepare
from gsa.errors import ConfigError
from gsa.evaluation import floors
from gsa.evaluation.floors import bigram_bits_per_byte
from gsa.evaluation.loss import EvaluationConfig, evaluate, held_out_sequences
from gsa.evaluation.retrieval import DEPTHS, LINE, retrieve
from gsa.model import GSAForCausalLM
from gsa.training.loop import make_model
from gsa.training.workers import Workers
from tests.draw import Draw
from tests.text import tiny

ALONE = Workers(0, 1, torch.device("cpu"))


def made(draw: Draw, folder: Path, **changes: Any) -> tuple[TrainConfig, Prepared, GSAForCausalLM]:
    config = build(TrainConfig, tiny(folder, draw.random.randrange(1000), **changes))
    data = prepare(config.data, folder / "cache")
    return config, data, make_model(config, data)


def test_held_out_loss_is_the_mean_over_tokens_and_bits_are_per_byte_of_text(draw: Draw, tmp_path: Path) -> None:
    config, data, model = made(draw, tmp_path, data__tokenizer={"kind": "bpe", "vocab_size": 270})
    metrics = evaluate(model.train(), data, config.evaluation, "sparse", ALONE)
    assert model.training
    nats, tokens, text = 0.0, 0, 0
    for window in held_out_sequences(data, config.evaluation):
        batch = data.held_out.batch([window])
        log_p = model.eval()(batch.tokens, starts=batch.starts).log_softmax(-1)[0]
        for t, target in enumerate(batch.targets[0].tolist()):
            nats, tokens = nats - float(log_p[t, target]), tokens + 1
            text += 0 if target == data.tokenizer.start else len(str(data.tokenizer.inner.id_to_token(target)))
    assert metrics["held_out_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["held_out_bits_per_byte"] == pytest.approx(nats / math.log(2) / text, rel=1e-5)


@pytest.mark.parametrize("stage", ["dense", "warmup", "sparse"])
def test_statistics_are_means_over_layers_and_those_of_the_stage(draw: Draw, tmp_path: Path, stage: Any) -> None:
    config, data, model = made(draw, tmp_path)
    metrics = evaluate(model, data, config.evaluation, stage, ALONE)
    for name in ("selected_fraction", "mass_kept", "k_mean", "first_token_mass", "gate_G1"):
        layers = [metrics[f"layer_{i}/{name}"] for i in range(2)]
        assert metrics[f"held_out_{name}"] == pytest.approx(sum(layers) / 2)
    assert (metrics["held_out_selected_fraction"] == 1) == (stage != "sparse")
    assert metrics["held_out_max_activation"] > 0


def test_evaluation_does_not_depend_on_its_batch_size_nor_on_the_number_of_workers(draw: Draw, tmp_path: Path) -> None:
    config, data, model = made(draw, tmp_path)
    whole = evaluate(model, data, config.evaluation, "sparse", ALONE)
    config.evaluation.batch_size = draw.random.randint(1, 3)
    assert evaluate(model, data, config.evaluation, "sparse", ALONE) == pytest.approx(whole, rel=1e-4)


def test_held_out_sequences_are_spread_and_never_more_than_there_are(draw: Draw, tmp_path: Path) -> None:
    _, data, _ = made(draw, tmp_path)
    available = len(data.held_out)
    for wanted in (1, 2, available, available + 5):
        chosen = held_out_sequences(data, EvaluationConfig(sequences=wanted))
        assert len(set(chosen)) == len(chosen) == min(wanted, available)
        assert 0 <= min(chosen) <= max(chosen) < available


@pytest.mark.parametrize("chunk", [7, 10**6])
def test_the_bigram_floor_is_witten_bells_on_the_evaluated_windows(
    draw: Draw, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floors, "CHUNK", chunk)
    config, data, _ = made(draw, tmp_path)
    tokens = data.train.tokens.tolist()
    pairs, firsts, seconds = Counter(zip(tokens, tokens[1:], strict=False)), Counter(tokens[:-1]), Counter(tokens[1:])
    followers = Counter(a for a, _ in pairs)
    vocab = data.tokenizer.vocab_size

    def p(a: int, b: int) -> float:
        unigram = (seconds[b] + 1) / (len(tokens) - 1 + vocab)
        if not firsts[a]:
            return unigram
        return (pairs[a, b] + followers[a] * unigram) / (firsts[a] + followers[a])

    assert sum(p(tokens[0], b) for b in range(vocab)) == pytest.approx(1)
    bits, text = 0.0, 0
    for window in held_out_sequences(data, config.evaluation):
        batch = data.held_out.batch([window])
        for a, b in zip(batch.tokens[0].tolist(), batch.targets[0].tolist(), strict=True):
            bits, text = bits - math.log2(p(a, b)), text + (b != data.tokenizer.start)
    assert bigram_bits_per_byte(data, config.evaluation) == pytest.approx(bits / text)


def test_the_bigram_floor_is_counted_once_for_a_text_and_its_sequences(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data, _ = made(draw, tmp_path)
    floor = bigram_bits_per_byte(data, config.evaluation)
    again = prepare(config.data, tmp_path / "cache")
    longer = again.at(12)
    fewer = EvaluationConfig(sequences=2)

    def fail(*given: Any) -> None:
        raise AssertionError("counted again")

    with monkeypatch.context() as patched:
        patched.setattr(floors, "_pairs", fail)
        assert bigram_bits_per_byte(again, config.evaluation) == floor
        for other in ((longer, config.evaluation), (again, fewer)):
            with pytest.raises(AssertionError, match="counted again"):
                bigram_bits_per_byte(*other)
    others = [bigram_bits_per_byte(longer, config.evaluation), bigram_bits_per_byte(again, fewer)]
    assert len({floor, *others}) == 3
    (kept,) = data.folder.glob(f"bigram-24-{config.evaluation.sequences}.json")
    for damaged in ("", "{", "[1.5]", '{"format": "other", "bits_per_byte": 1.5}'):
        kept.write_text(damaged)
        assert bigram_bits_per_byte(again, config.evaluation) == floor
    assert [path for path in data.folder.iterdir() if path.name.startswith(".")] == []


class Copier(torch.nn.Module):
    """Knows one thing: what followed the last earlier occurrence of the last six tokens."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.weight = vocab, torch.nn.Parameter(torch.zeros(()))

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        row, logits = tokens[0].tolist(), torch.zeros(1, tokens.shape[1], self.vocab)
        for t in range(6, len(row)):
            for s in range(t - 1, 5, -1):
                if row[s - 5 : s + 1] == row[t - 5 : t + 1]:
                    logits[0, t, row[s + 1]] = 20
                    break
        return logits


def test_retrieval_is_full_for_a_model_that_looks_back_and_none_for_one_that_cannot(draw: Draw, tmp_path: Path) -> None:
    _, data, model = made(draw, tmp_path)
    length = 5 * len(LINE)
    copier: Any = Copier(data.tokenizer.vocab_size)
    results = retrieve(copier, data, length, trials=2)
    assert [r.depth for r in results] == list(DEPTHS)
    assert all(r.accuracy == 1 and r.loss < 0.1 < r.loss_without for r in results)
    blind = retrieve(model, data, length, trials=2)
    assert all(r.accuracy == 0 and abs(r.loss - r.loss_without) < 0.5 for r in blind)


def test_a_context_too_short_for_the_pass_key_is_refused(draw: Draw, tmp_path: Path) -> None:
    _, data, model = made(draw, tmp_path)
    for length in (10, 10**6):
        with pytest.raises(ConfigError, match=f"context_length = {length}"):
            retrieve(model, data, length, trials=1)
