"""Which query attends to which key, 32 queries to a word.

`words` [B, ⌈T/32⌉, S] int32: bit i of `words[b, n, s]` says that query 32·n + i of row b attends to key s. A selection
of 128K queries among 128K keys takes 2 GiB so; as booleans it would take 16. Words hold causality, documents, windows
and everything else that limits a query: whoever reads them needs to know no more.
"""

import torch
from torch import Tensor

WORD = 32  # queries per word


def pack(mask: Tensor) -> Tensor:
    """Words [B, ⌈T/32⌉, S] of a selection [B, T, S] of booleans."""
    batch, length, keys = mask.shape
    words = -(-length // WORD)
    padded = mask.new_zeros(batch, words * WORD, keys)
    padded[:, :length] = mask
    bits = torch.ones(WORD, dtype=torch.int64, device=mask.device) << torch.arange(WORD, device=mask.device)
    packed = (padded.view(batch, words, WORD, keys) * bits[:, None]).sum(2)
    return (packed - ((packed >> 31) << 32)).to(torch.int32)  # the top bit is int32's sign


def unpack(words: Tensor, length: int, first: int = 0) -> Tensor:
    """The selection [B, T, S] of booleans of T = `length` queries, from `first` on."""
    begin, end = first // WORD, -(-(first + length) // WORD)
    shifts = torch.arange(WORD, device=words.device, dtype=torch.int32)[:, None]
    bits = (words[:, begin:end, None] >> shifts) & 1
    return bits.flatten(1, 2)[:, first - begin * WORD :][:, :length].bool()
