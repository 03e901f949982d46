"""Retrieval: can the model find a fact again that stands far back in its context?

The pass-key task (Mohtashami and Jaggi, arXiv 2305.16300; "needle in a haystack", RULER's simplest): a line with a
random number stands at some depth of held-out text, and the same line begins again at the end.
"""

import dataclasses
import random

import torch

from gsa.data.packing import Prepared
from gsa.errors import ConfigError
from gsa.evaluation.mode import evaluating
from gsa.model import GSAForCausalLM
from gsa.training.step import cross_entropy

LINE = "\n# the pass key is {key}\n"
DIGITS = 5
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Results at one depth, means over the trials."""

    depth: float  # 0: the pass key stands at the start of the context, 1: at its end
    accuracy: float  # share of trials in which greedy decoding gives every token of the number
    loss: float  # nats per token of the number, in its place
    loss_without: float  # the same where the context does not hold it


@torch.no_grad()
def retrieve(
    model: GSAForCausalLM, data: Prepared, context_length: int, trials: int = 20, seed: int = 0
) -> list[Retrieval]:
    """The pass-key task at five depths of a context of `context_length` tokens.

    Runs in evaluation mode and in the model's own precision.

    Raises:
        ConfigError: the context is too short for the pass key, or the held-out text for the context.
    """
    draw = random.Random(seed)
    longest = len(data.tokenizer.encode(LINE.format(key="0" * DIGITS))) * 2 + 8
    if context_length < 2 * longest:
        raise ConfigError("context_length", context_length, f"must be >= {2 * longest} for the pass-key task")
    if len(data.held_out.tokens) < context_length:
        raise ConfigError("context_length", context_length, f"must be <= {len(data.held_out.tokens)} held-out tokens")
    with evaluating(model), model.autocast():
        return [_at_depth(model, data, draw, depth, context_length - longest, trials) for depth in DEPTHS]


def _at_depth(
    model: GSAForCausalLM, data: Prepared, draw: random.Random, depth: float, room: int, trials: int
) -> Retrieval:
    """Results at one depth, in a haystack of `room` tokens."""
    encode, device = data.tokenizer.encode, next(model.parameters()).device
    right, losses = 0, torch.zeros(2, dtype=torch.double)
    for _ in range(trials):
        key, other = (str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS)) for _ in range(2))
        answer = encode(key)
        question = encode(LINE.partition("{")[0])
        begin = draw.randrange(len(data.held_out.tokens) - room + 1)
        haystack = [t for t in data.held_out.tokens[begin : begin + room].tolist() if t != data.held_out.start]
        cut = round(depth * len(haystack))
        for i, said in enumerate((key, other)):
            needle = encode(LINE.format(key=said))
            prompt = [data.held_out.start, *haystack[:cut], *needle, *haystack[cut:], *question]
            tokens = torch.tensor([prompt + answer], device=device)
            logits = model(tokens[:, :-1])[:, -len(answer) :]
            losses[i] += cross_entropy(logits, tokens[:, -len(answer) :]).double().cpu()
            if i == 0:
                # the right tokens before each stand in the prompt: all right means that greedy decoding is
                right += bool((logits.argmax(-1) == tokens[:, -len(answer) :]).all())
    return Retrieval(depth, right / trials, *(losses / trials).tolist())
