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
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

from gsa.data.corpus import CorpusConfig, Document, Survey, documents, survey
from gsa.data.tokenizer import Tokenizer, TokenizerConfig
from gsa.errors import ConfigError
from gsa.settings import setting

logger = logging.getLogger(__name__)

FORMAT = "gsa-tokens-1"
BATCH_BYTES = 1 << 20  # text encoded at once


@dataclasses.dataclass
class DataConfig:
    corpus: CorpusConfig = setting(CorpusConfig, "text")
    tokenizer: TokenizerConfig = setting(TokenizerConfig, "tokenizer")
    context_length: int = setting(256, "tokens of a sequence, T", ge=1)
    attend_across_documents: bool = setting(False, "let tokens attend to earlier documents of their sequence")


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
        RequestError: the text cannot be read, is too short for one sequence in either split, or cannot be split.
    """
    found = survey(config.corpus, cache / "surveys")
    settings = [FORMAT, found.digest, config.corpus.held_out_fraction, dataclasses.asdict(config.tokenizer)]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
    folder = cache / key
    if not folder.exists():
        with FileLock(cache / f"{key}.lock"):
            if not folder.exists():
                _tokenize(config, found, folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    splits = []
    for split in ("train", "held_out"):
        tokens = np.memmap(folder / f"{split}.bin", dtype=_dtype(tokenizer), mode="r")
        windows = Windows(tokens, tokenizer.start, config)
        if not len(windows):
            name = "training" if split == "train" else "held-out"
            allowed = f"the {name} text has only {len(tokens)} tokens: must be < {len(tokens)}"
            raise ConfigError("data.context_length", config.context_length, allowed)
        splits.append(windows)
    packing = f"{key} {config.context_length} {config.attend_across_documents}"
    return Prepared(splits[0], splits[1], tokenizer, hashlib.sha256(packing.encode()).hexdigest()[:32], folder)


def _tokenize(config: DataConfig, found: Survey, folder: Path) -> None:
    logger.info("tokenizing %d documents, %.1f MB", found.documents, found.bytes / 1e6)
    fraction = config.corpus.held_out_fraction
    tokenizer = Tokenizer.train(config.tokenizer, _training_text(config, found))
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tokenizer.save(unfinished / "tokenizer.json")
    with (unfinished / "train.bin").open("wb") as train, (unfinished / "held_out.bin").open("wb") as held_out:
        for batch in _batches(documents(config.corpus)):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, tokens in zip(batch, encoded, strict=True):
                target: BinaryIO = held_out if found.held_out(document.group, fraction) else train
                target.write(np.array([tokenizer.start, *tokens], dtype=_dtype(tokenizer)).tobytes())
    unfinished.rename(folder)


def _training_text(config: DataConfig, found: Survey) -> Iterator[str]:
    size = 0
    for document in documents(config.corpus):
        if size >= config.tokenizer.train_bytes:
            return
        if not found.held_out(document.group, config.corpus.held_out_fraction):
            size += len(document.text)
            yield document.text


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in stream:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _dtype(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
