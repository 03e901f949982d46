"""Packed windows of tokens: tokenized once, memory-mapped, in an order that depends on the seed alone.

- A document is its start token and its tokens; documents stand one after another, and windows cut them where they fall.
- Attention stays within a document unless `attend_across_documents` says otherwise.
- Tokens are cached in a folder named by the content of the text and the tokenizer's settings. Many processes may
  prepare the same text: one does the work.
- The position in the data is one number, the sequences consumed: every worker derives its share from it.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

from gsa.data.corpus import FOR_ALL, CorpusConfig, remembered, survey
from gsa.data.tokenized import SURVEY, ChangedError, token_type, write_copy
from gsa.data.tokenizer import Tokenizer, TokenizerConfig
from gsa.errors import ConfigError
from gsa.settings import setting

FORMAT = "gsa-tokens-1"
COPY = re.compile("[0-9a-f]{24}")  # the name of a tokenized copy's folder


@dataclasses.dataclass
class DataConfig:
    corpus: CorpusConfig = setting(CorpusConfig, "text")
    tokenizer: TokenizerConfig = setting(TokenizerConfig, "tokenizer")
    context_length: int = setting(256, "tokens of a sequence, T", ge=1)
    attend_across_documents: bool = setting(False, "let tokens attend to earlier documents of their sequence")
    prepared: str | None = setting(None, "tokenized copy in STORAGE/data that is used as it is; null reads the corpus")

    def check(self, prefix: str) -> None:
        if self.prepared is not None and not COPY.fullmatch(self.prepared):
            allowed = "must be the name of a folder in STORAGE/data: 24 hexadecimal digits"
            raise ConfigError(f"{prefix}.prepared", self.prepared, allowed)


class Batch(NamedTuple):
    tokens: Tensor  # [B, T]
    targets: Tensor  # [B, T], the token after each
    starts: Tensor  # [B, T], the first position of each token's document

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class Windows:
    """A split as windows of T tokens and their targets, which do not overlap.

    Args:
        tokens: every token of the split.
        start: the number of the start token.
        config: gives T and whether attention crosses documents.
    """

    def __init__(self, tokens: npt.NDArray[np.unsignedinteger], start: int, config: DataConfig) -> None:
        self.tokens, self.start, self.config = tokens, start, config

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.config.context_length

    def at(self, context_length: int) -> "Windows":
        """The same tokens in windows of another length."""
        config = dataclasses.replace(self.config, context_length=context_length)
        found = Windows(self.tokens, self.start, config)
        if not len(found):
            allowed = f"a split has only {len(self.tokens)} tokens: must be < {len(self.tokens)}"
            raise ConfigError("training.stages.context_length", context_length, allowed)
        return found

    def batch(self, windows: Iterable[int]) -> Batch:
        length = self.config.context_length
        rows = np.stack([self.tokens[i * length : (i + 1) * length + 1] for i in windows]).astype(np.int64)
        tokens, targets = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
        return Batch(tokens, targets, self._starts(tokens))

    def _starts(self, tokens: Tensor) -> Tensor:
        if self.config.attend_across_documents:
            return torch.zeros_like(tokens)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return torch.where(tokens == self.start, positions, 0).cummax(1).values


class Shuffled:
    """Windows in an endless order, each epoch shuffled anew; the order depends on the seed alone."""

    def __init__(self, windows: Windows, seed: int) -> None:
        self.windows, self.seed = windows, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def batch(self, first: int, count: int) -> Batch:
        """Sequences `first` to `first + count` of the order."""
        return self.windows.batch(self._window(n) for n in range(first, first + count))

    def _window(self, sequence: int) -> int:
        epoch, place = divmod(sequence, len(self.windows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.windows))
        return int(self._order[place])


@dataclasses.dataclass(frozen=True)
class Prepared:
    train: Windows
    held_out: Windows
    tokenizer: Tokenizer
    fingerprint: str  # of text, tokenizer, split and packing
    folder: Path  # of the tokens; what else is derived from them alone may be cached there

    def at(self, context_length: int | None) -> "Prepared":
        """The same text in windows of another length; None is the same length.

        Raises:
            ConfigError: a split is too short for one of them.
        """
        if context_length is None:
            return self
        train, held_out = (split.at(context_length) for split in (self.train, self.held_out))
        return dataclasses.replace(self, train=train, held_out=held_out)


def prepare(config: DataConfig, cache: Path) -> Prepared:
    """Tokenized text, from the cache where it is there.

    Args:
        config: what to prepare.
        cache: folder of the cache, shared by all processes that prepare this text.

    Raises:
        RequestError: the text cannot be read, is too short for one sequence in either split, or cannot be split;
            `data.prepared` names no copy, or one of other settings.
    """
    key = _existing(config, cache) if config.prepared is not None else _tokenized(config, cache)
    folder = cache / key
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    splits = []
    for split in ("train", "held_out"):
        tokens = np.memmap(folder / f"{split}.bin", dtype=token_type(tokenizer), mode="r")
        windows = Windows(tokens, tokenizer.start, config)
        if not len(windows):
            name = "training" if split == "train" else "held-out"
            allowed = f"the {name} text has only {len(tokens)} tokens: must be < {len(tokens)}"
            raise ConfigError("data.context_length", config.context_length, allowed)
        splits.append(windows)
    return Prepared(splits[0], splits[1], tokenizer, _fingerprint(key, config), folder)


def cached_copy(cache: Path, fingerprint: str, config: DataConfig) -> str | None:
    """The tokenized copy in a cache that `prepare` would give this fingerprint, as a value of `data.prepared`.

    Args:
        cache: as of `prepare`.
        fingerprint: of an earlier run's data.
        config: gives how the earlier run packed the text.
    """
    return next((name for name in _copies(cache) if _fingerprint(name, config) == fingerprint), None)


def _copies(cache: Path) -> list[str]:
    return sorted(path.parent.name for path in cache.glob("*/tokenizer.json") if COPY.fullmatch(path.parent.name))


def _fingerprint(key: str, config: DataConfig) -> str:
    packing = f"{key} {config.context_length} {config.attend_across_documents}"
    return hashlib.sha256(packing.encode()).hexdigest()[:32]


def _key(digest: str, config: DataConfig) -> str:
    """The name of the copy of this text: of its content, its split and the tokenizer's settings."""
    settings = [FORMAT, digest, config.corpus.held_out_fraction, dataclasses.asdict(config.tokenizer)]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]


def _existing(config: DataConfig, cache: Path) -> str:
    assert config.prepared is not None
    if config.prepared not in _copies(cache):
        raise ConfigError("data.prepared", config.prepared, f"no such tokenized copy in {cache}")
    about = cache / config.prepared / SURVEY  # copies of earlier versions have none
    if about.exists() and _key(json.loads(about.read_text(encoding="utf-8"))["digest"], config) != config.prepared:
        allowed = "was made with another data.tokenizer or data.corpus.held_out_fraction: set them as they were"
        raise ConfigError("data.prepared", config.prepared, allowed)
    return config.prepared


def _tokenized(config: DataConfig, cache: Path) -> str:
    found = survey(config.corpus, cache / "surveys")
    key = _key(found.digest, config)
    folder = cache / key
    if not folder.exists():
        with FileLock(cache / f"{key}.lock", mode=FOR_ALL):
            if not folder.exists():
                try:
                    write_copy(config.corpus, config.tokenizer, found, folder)
                except ChangedError:
                    remembered(config.corpus, cache / "surveys").unlink(missing_ok=True)
                    raise
    return key
