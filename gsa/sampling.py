"""Drawing the next token from logits."""

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """One token a row, [B, 1], from logits [B, V].

    Temperature 0 takes the highest logit. Otherwise nucleus sampling (Holtzman et al., arXiv 1904.09751): among the
    most likely tokens, the fewest that together hold `top_p` of the probability.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # differences from the highest, in fp64: the lowest temperatures overflow nothing
    scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
    probabilities, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    nucleus = probabilities.masked_fill(before >= top_p, 0)
    return order.gather(-1, torch.multinomial(nucleus, 1, generator=generator))
