"""Tokenized copies of a text: each a folder with a tokenizer and the tokens of both splits, made once and whole."""

import dataclasses
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gsa.data.corpus import CorpusConfig, Digest, Survey, documents
from gsa.data.document import Document
from gsa.data.tokenizer import Tokenizer, TokenizerConfig
from gsa.errors import RequestError
from gsa.progress import progress

logger = logging.getLogger(__name__)

SURVEY = "survey.json"  # file of a copy: what text it holds
BATCH_BYTES = 1 << 20  # text encoded at once
ABANDONED = 3600.0  # seconds without a change after which another machine's unfinished copy is held to be abandoned


class ChangedError(RequestError):
    """The text is not, or is no longer, what its survey found."""


def write_copy(corpus: CorpusConfig, tokenizer_config: TokenizerConfig, found: Survey, folder: Path) -> None:
    """Tokenize a text into a folder, which is there when it is complete. Call it with the folder's lock held.

    Raises:
        ChangedError: the text is not what the survey found.
        RequestError: it cannot be read, or cannot train the tokenizer.
    """
    remove_unfinished(folder)
    logger.info("tokenizing %d documents, %.1f MB", found.documents, found.bytes / 1e6)
    unfinished = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        tokenizer = _trained(corpus, tokenizer_config, found)
        tokenizer.save(unfinished / "tokenizer.json")
        (unfinished / SURVEY).write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
        if _write_tokens(corpus, tokenizer, found, unfinished) != found.digest:
            raise ChangedError("data.corpus: the text changed while it was tokenized; run the same command again")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed have left of a copy. Call it with the folder's lock held.

    The lock may not reach to another machine that shares the cache: what one of them still writes stays.
    """
    for path in folder.parent.glob(f".{folder.name}.*"):
        *host, _ = path.name.removeprefix(f".{folder.name}.").split(".")
        elsewhere = host and ".".join(host) != socket.gethostname()  # earlier versions named no machine
        if not elsewhere or time.time() - _changed(path) > ABANDONED:
            shutil.rmtree(path, ignore_errors=True)


def token_type(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    """How tokens are stored."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def _changed(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


def _trained(corpus: CorpusConfig, config: TokenizerConfig, found: Survey) -> Tokenizer:
    with progress("training the tokenizer", min(config.train_bytes, found.bytes)) as done:

        def texts() -> Iterator[str]:
            size = 0
            for document in documents(corpus):
                if size >= config.train_bytes:
                    return
                if not found.held_out(document.group, corpus.held_out_fraction):
                    size += len(document.text)
                    yield document.text
                    done(len(document.text.encode()))

        return Tokenizer.train(config, texts())


def _write_tokens(corpus: CorpusConfig, tokenizer: Tokenizer, found: Survey, folder: Path) -> str:
    """Write both splits; returns the digest of the text."""
    digest = Digest()
    with (
        (folder / "train.bin").open("wb") as train,
        (folder / "held_out.bin").open("wb") as held_out,
        progress("tokenizing", found.bytes) as done,
    ):
        for batch in _batches(documents(corpus)):
            encoded = tokenizer.encode_batch([document.text for document in batch])
            for document, tokens in zip(batch, encoded, strict=True):
                aside = found.held_out(document.group, corpus.held_out_fraction)
                target: BinaryIO = held_out if aside else train
                target.write(np.array([tokenizer.start, *tokens], dtype=token_type(tokenizer)).tobytes())
                done(digest.add(document))
    return digest.value


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
