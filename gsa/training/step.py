"""The loss of one micro-batch: what DistributedDataParallel and torch.compile wrap."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.attention.config import Stage
from gsa.attention.statistics import Sums
from gsa.data.packing import Batch
from gsa.model import GSAForCausalLM


class Losses(NamedTuple):
    total: Tensor  # what is differentiated
    language: Tensor  # mean cross entropy, nats per token
    indexer: Tensor | None  # mean KL over layers and queries, nats
    uncertainty: Tensor | None  # [L, 2], see ModelOutput
    statistics: Sums  # [L] each, see gsa.attention.statistics
    max_activation: Tensor | None  # [L]


class TrainingStep(nn.Module):
    """Losses of a micro-batch in one stage.

    The language loss trains the model and the indexer's loss the indexer: their gradients share no parameter, so
    their sum trains each by its own.
    """

    def __init__(self, model: GSAForCausalLM, stage: Stage, checkpoint_activations: bool) -> None:
        super().__init__()
        self.model, self.stage, self.checkpoint_activations = model, stage, checkpoint_activations

    def forward(self, batch: Batch, measure: bool) -> Losses:
        output = self.model.run(
            batch.tokens,
            starts=batch.starts,
            stage=self.stage,
            indexer_loss=self.stage != "dense",
            measure=measure,
            checkpoint_activations=self.checkpoint_activations,
        )
        language = cross_entropy(output.logits, batch.targets)
        total = language if self.stage != "warmup" else torch.zeros_like(language)
        if output.indexer_loss is not None:
            total = total + output.indexer_loss
        return Losses(
            total,
            language.detach(),
            output.indexer_loss,
            output.uncertainty,
            output.statistics,
            output.max_activation,
        )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in nats of logits [B, T, V] against targets [B, T], in fp32 or better."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(precise), targets.flatten())
