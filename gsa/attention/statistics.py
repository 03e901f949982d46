"""What is measured of attention, as sums: they add up over chunks, batches and workers before any mean is taken.

| mean | of | over |
|---|---|---|
| `k_mean` | keys attended to | queries |
| `selected_fraction` | keys attended to | keys visible |
| `mass_kept` | dense attention's mass on the selected keys, mean over the heads | queries |
| `first_token_mass` | attention's mass on the document's first token | queries but the first |
| `gate_G1` … | the gate's values | tokens |
"""

import math

import torch
from torch import Tensor

from gsa.attention.selection import Queries

Sums = dict[str, Tensor]

_MEANS = {
    "k_mean": ("selected", "queries"),
    "selected_fraction": ("selected", "visible"),
    "mass_kept": ("mass_kept", "queries"),
    "first_token_mass": ("first_token_mass", "later_queries"),
}


def add(total: Sums, more: Sums) -> None:
    """Add sums to others, in place."""
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value


def means(sums: Sums) -> dict[str, Tensor]:
    """The means of the table above, of the shape of the sums; 0 over nothing is 0."""
    pairs = {name: pair for name, pair in _MEANS.items() if pair[0] in sums}
    pairs |= {name: (name, "tokens") for name in sums if name.startswith("gate_")}
    return {name: sums[numerator] / sums[count].clamp_min(1) for name, (numerator, count) in pairs.items()}


@torch.no_grad()
def selection_sums(q: Tensor, keys: Tensor, queries: Queries, visible: Tensor, selected: Tensor) -> Sums:
    """Of C queries q [B, H, C, d] on keys [B, H, S, d] that are `visible` and `selected` [B, C, S]."""
    dense = mean_attention(q, keys, visible)
    used = mean_attention(q, keys, selected)
    to_first = used.gather(2, queries.starts[..., None]).squeeze(2)
    later = queries.positions > queries.starts  # the first token has only itself to attend to
    return {
        "queries": visible.any(-1).sum(),
        "later_queries": later.sum(),
        "visible": visible.sum(),
        "selected": selected.sum(),
        "mass_kept": (dense * selected).sum(),
        "first_token_mass": (to_first * later).sum(),
    }


@torch.no_grad()
def mean_attention(q: Tensor, keys: Tensor, support: Tensor) -> Tensor:
    """Softmax of q·k/√d over the support, averaged over heads: [B, C, S] from q [B, H, C, d] and keys [B, H, S, d]."""
    precise = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        logits = q.to(precise) @ keys.to(precise).transpose(2, 3) / math.sqrt(q.shape[-1])
        # a finite filling: a query that sees nothing has no attention, not NaN
        filled = logits.masked_fill(~support[:, None], torch.finfo(precise).min)
        return (filled.softmax(-1) * support[:, None]).mean(1)
