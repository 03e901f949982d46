"""What decoding keeps of the tokens that were seen: keys, values, indexer keys and open windows, by layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from gsa.errors import RequestError


class Room:
    """Space for a fixed number of tokens, and where on the GPU the next ones go."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.seen: Tensor | None = None  # [1] int64: tokens held; a CUDA graph's replays move it on
        self.positions: Tensor | None = None  # [T] of the tokens of this forward

    def take(self, tokens: int, device: torch.device) -> Tensor:
        """The positions [T] of the next tokens."""
        if self.seen is None:
            self.seen = torch.zeros(1, dtype=torch.long, device=device)
        self.positions = self.seen + torch.arange(tokens, device=device)
        self.seen += tokens
        return self.positions


class LayerCache:
    """One layer's share of a `Cache`."""

    def __init__(self, room: Room | None = None) -> None:
        self.room = room
        self.tensors: dict[str, Tensor] = {}
        self.leader: Tensor | None = None  # [B, S] selection of the open window's first query

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Where the next tokens stand, [T]."""
        if self.room is not None:
            assert self.room.positions is not None  # the `Cache` has moved on to them
            return self.room.positions
        held = self.tensors["key"].shape[1] if "key" in self.tensors else 0
        return torch.arange(held, held + tokens, device=device)

    def extend(self, name: str, new: Tensor) -> Tensor:
        """Append [B, T, …] along time and return all that is held; with a room, all of it, [B, capacity, …]."""
        held = self.tensors.get(name)
        if self.room is None:
            self.tensors[name] = new if held is None else torch.cat((held, new), dim=1)
        else:
            assert self.room.positions is not None
            if held is None:
                self.tensors[name] = new.new_zeros(new.shape[0], self.room.capacity, *new.shape[2:])
            self.tensors[name].index_copy_(1, self.room.positions, new)
        return self.tensors[name]

    def keep_leader(self, leader: Tensor | None) -> None:
        """Hold the selection of the window that is open now, in place where there is a room."""
        if self.room is not None and self.leader is not None and leader is not None:
            self.leader.copy_(leader)
        else:
            self.leader = leader


class Snapshot(NamedTuple):
    """What a cache with a capacity held at one time; the tokens themselves stay where they are."""

    length: int
    seen: Tensor
    leaders: list[Tensor | None]


class Cache:
    """Grows by the tokens of each forward; pass it to every call of one generation.

    A forward over several tokens and forwards one token at a time give the same outputs.

    Args:
        num_layers: of the model.
        capacity: room for that many tokens is taken at once and nothing is copied when tokens come. No shape and no
            host decision then depends on the number of tokens held: a forward of T tokens can be captured in a CUDA
            graph and replayed for the next T, after a warm-up that `restore` takes back.
    """

    def __init__(self, num_layers: int, capacity: int | None = None) -> None:
        self.room = None if capacity is None else Room(capacity)
        self.layers = [LayerCache(self.room) for _ in range(num_layers)]
        self.starts: Tensor | None = None  # [B, S] first key of each cached token's document
        self.length = 0  # tokens that forwards brought; a CUDA graph's replays bring more

    def extend_starts(self, starts: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
        """Record where the new tokens' documents start: [B, T] places counted from the first cached token.

        Without `starts` the new tokens continue the last cached document.

        Returns:
            [B, S], those of all cached tokens, or of all that there is room for.

        Raises:
            RequestError: there is no room for the tokens.
        """
        if self.room is not None and self.length + tokens > self.room.capacity:
            raise RequestError(
                f"cache: {tokens} more tokens after {self.length} exceed its capacity, {self.room.capacity}"
            )
        if starts is None:
            last = torch.zeros(batch, 1, dtype=torch.long, device=device)
            if self.starts is not None and self.length:
                last = self.starts[:, -1:]
                if self.room is not None and self.room.seen is not None:
                    last = self.starts.index_select(1, (self.room.seen - 1).clamp_min(0))
            starts = last.expand(batch, tokens)
        self.length += tokens
        if self.room is not None:
            if self.starts is None:
                self.starts = torch.zeros(batch, self.room.capacity, dtype=torch.long, device=device)
            self.starts.index_copy_(1, self.room.take(tokens, device), starts)
            return self.starts
        self.starts = starts if self.starts is None else torch.cat((self.starts, starts), dim=1)
        return self.starts

    def snapshot(self) -> Snapshot:
        """Remember how many tokens are held, for `restore`.

        Raises:
            RequestError: the cache has no capacity, or holds nothing yet.
        """
        if self.room is None or self.room.seen is None:
            raise RequestError("cache: only one with a capacity that holds tokens can be taken back")
        leaders = [None if layer.leader is None else layer.leader.clone() for layer in self.layers]
        return Snapshot(self.length, self.room.seen.clone(), leaders)

    def restore(self, snapshot: Snapshot) -> None:
        """Forget the tokens that came since, in place: what a CUDA graph has captured sees it too."""
        assert self.room is not None
        assert self.room.seen is not None
        self.length = snapshot.length
        self.room.seen.copy_(snapshot.seen)
        for layer, leader in zip(self.layers, snapshot.leaders, strict=True):
            layer.keep_leader(leader)
