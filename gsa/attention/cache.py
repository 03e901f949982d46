"""What decoding keeps of the tokens that were seen: keys, values, indexer keys and open windows, by layer."""

import torch
from torch import Tensor


class LayerCache:
    """One layer's share of a `Cache`."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.leader: Tensor | None = None  # [B, S] selection of the open window's first query

    def extend(self, name: str, new: Tensor) -> Tensor:
        """Append [B, T, …] along time and return all that is held."""
        held = self.tensors.get(name)
        self.tensors[name] = new if held is None else torch.cat((held, new), dim=1)
        return self.tensors[name]


class Cache:
    """Grows by the tokens of each forward; pass it to every call of one generation.

    A forward over several tokens and forwards one token at a time give the same outputs.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.starts: Tensor | None = None  # [B, S] first key of each cached token's document

    @property
    def length(self) -> int:
        """The number of tokens seen."""
        return 0 if self.starts is None else self.starts.shape[1]

    def extend_starts(self, starts: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
        """Record where the new tokens' documents start: [B, T] places counted from the first cached token.

        Without `starts` the new tokens continue the last cached document.

        Returns:
            [B, S], those of all cached tokens.
        """
        if starts is None:
            last = torch.zeros(batch, 1, dtype=torch.long, device=device)
            if self.starts is not None and self.length:
                last = self.starts[:, -1:]
            starts = last.expand(batch, tokens)
        self.starts = starts if self.starts is None else torch.cat((self.starts, starts), dim=1)
        return self.starts
