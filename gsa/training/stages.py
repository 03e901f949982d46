"""The stages of training and what each one trains (GSA.md, "Training").

| stage | attention | trains | indexer loss |
|---|---|---|---|
| `dense` | every key | all but the indexer | none |
| `warmup` | every key | the indexer alone | KL over every visible key |
| `sparse` | selected keys | everything | KL over the selected keys |
"""

import dataclasses

from gsa.attention.config import Stage
from gsa.model import GSAForCausalLM
from gsa.settings import setting

STAGES: tuple[Stage, ...] = ("dense", "warmup", "sparse")


@dataclasses.dataclass
class StageConfig:
    kind: str = setting("dense", "which attention, and what is trained", choices=STAGES)
    steps: int = setting(100, "optimizer steps", ge=0)
    context_length: int | None = setting(None, "tokens of a sequence in this stage; null is data.context_length", ge=1)


class Plan:
    """Which stage each optimizer step belongs to.

    A model without any indexer has nothing to warm up: its `warmup` stages have no steps, and its `sparse` stages
    train all that there is.
    """

    def __init__(self, stages: list[StageConfig], has_indexer: bool) -> None:
        self._ends: list[tuple[int, Stage]] = []
        self._lengths: list[tuple[int, int, int | None]] = []  # first step, steps, context length
        end = 0
        for stage in stages:
            if stage.kind == "warmup" and not has_indexer:
                continue
            self._lengths.append((end, stage.steps, stage.context_length))
            end += stage.steps
            self._ends.append((end, next(s for s in STAGES if s == stage.kind)))
        self.total_steps = end

    def stage(self, step: int) -> Stage:
        """The stage of a step counted from 0; past the end, the last one's."""
        for end, stage in self._ends:
            if step < end:
                return stage
        return self._ends[-1][1]

    def context_length(self, step: int) -> int | None:
        """That of a step's stage; None is the data's own."""
        for first, steps, length in self._lengths:
            if step < first + steps:
                return length
        return self._lengths[-1][2]

    def steps_before(self, step: int, context_length: int | None) -> int:
        """How many of the steps before this one have had this context length."""
        return sum(
            min(max(step - first, 0), steps) for first, steps, length in self._lengths if length == context_length
        )


def freeze(model: GSAForCausalLM, stage: Stage) -> None:
    """Let gradients reach what the stage trains, and nothing else."""
    indexer = {id(p) for p in model.indexer_parameters()}
    for parameter in model.parameters():
        of_indexer = id(parameter) in indexer
        parameter.requires_grad_(stage == "sparse" or of_indexer == (stage == "warmup"))
        if not parameter.requires_grad:
            parameter.grad = None
