"""Held-out loss and the diagnostics that come with it."""

import dataclasses
import math

import numpy as np
import torch

from gsa.attention.config import Stage
from gsa.attention.statistics import Sums, add, means
from gsa.data.packing import Prepared
from gsa.evaluation.mode import evaluating
from gsa.model import GSAForCausalLM
from gsa.settings import setting
from gsa.training.step import cross_entropy
from gsa.training.workers import Workers


@dataclasses.dataclass
class EvaluationConfig:
    every: int = setting(100, "optimizer steps between evaluations; the last step is always evaluated", ge=1)
    sequences: int = setting(64, "held-out sequences, evenly spaced over the held-out text", ge=1)
    batch_size: int = setting(8, "sequences at once", ge=1)
    latency_length: int | None = setting(
        None, "tokens at which attention is timed where a run ends or pauses; on a CPU it is modelled; null: not", ge=1
    )


@torch.no_grad()
def evaluate(
    model: GSAForCausalLM, data: Prepared, config: EvaluationConfig, stage: Stage, workers: Workers
) -> dict[str, float]:
    """Evaluate on held-out text, the sequences shared out among the workers.

    Runs in evaluation mode and in the model's own precision: training and `gsa eval` measure the same.

    Returns:
        `held_out_loss` in nats per token, `held_out_bits_per_byte` of the text, and the attention's statistics on
        the same text (`held_out_selected_fraction` and others, means over layers) with their values by layer
        (`layer_0/mass_kept`, …).
    """
    chosen = held_out_sequences(data, config)
    total = torch.zeros(3, dtype=torch.double)  # nats, tokens, bytes
    sums: Sums = {}
    largest = torch.zeros(model.config.num_layers)
    bytes_of = torch.from_numpy(np.asarray(data.tokenizer.token_bytes)).long()
    mine = chosen[workers.rank :: workers.world]
    with evaluating(model), model.autocast():
        for first in range(0, len(mine), config.batch_size):
            batch = data.held_out.batch(mine[first : first + config.batch_size])
            on_device = batch.to(workers.device)
            output = model.run(on_device.tokens, starts=on_device.starts, stage=stage, measure=True)
            nats = cross_entropy(output.logits, on_device.targets).double().cpu() * batch.targets.numel()
            total += torch.stack((nats, torch.tensor(batch.targets.numel()), bytes_of[batch.targets].sum()))
            assert output.max_activation is not None
            largest = torch.maximum(largest, output.max_activation)
            add(sums, output.statistics)
    nats, tokens, text_bytes = workers.sum(total).tolist()
    metrics = {
        "held_out_loss": nats / tokens,
        "held_out_bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
    }
    metrics["held_out_max_activation"] = float(workers.largest(largest).max())
    for name, values in means({name: workers.sum(total) for name, total in sorted(sums.items())}).items():
        metrics[f"held_out_{name}"] = float(values.nanmean())
        metrics |= {f"layer_{i}/{name}": v for i, v in enumerate(values.tolist()) if not math.isnan(v)}
    return metrics


def held_out_sequences(data: Prepared, config: EvaluationConfig) -> list[int]:
    """The windows of the held-out text that are evaluated: the same for every model of a sweep."""
    available = len(data.held_out)
    count = min(config.sequences, available)
    return [i * available // count for i in range(count)]
