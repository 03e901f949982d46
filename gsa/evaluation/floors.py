"""What a language model must beat: a bigram model of the same tokens, on the same held-out text."""

import json
import math
import os

import numpy as np
import numpy.typing as npt

from gsa.data.packing import Prepared
from gsa.evaluation.loss import EvaluationConfig, held_out_sequences

FORMAT = "gsa-bigram-1"
CHUNK = 1 << 22  # tokens counted at once

Counts = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]  # sorted keys, and how often each occurred


def bigram_bits_per_byte(data: Prepared, config: EvaluationConfig) -> float:
    """Bits per byte of held-out text under a bigram model counted on all the training text.

    Witten-Bell interpolation (Witten and Bell, 1991): p(b | a) = (c(ab) + n(a)·p(b)) / (c(a) + n(a)), where c(ab)
    counts the pair, c(a) the pairs that begin with a, n(a) the different tokens seen after a, and p(b) is the
    unigram frequency with one added to every count. Nothing is tuned.

    Counting takes minutes for a large text, so the result is kept beside the tokens, in a file whose name holds all
    that it depends on besides them.
    """
    cached = data.folder / f"bigram-{data.held_out.config.context_length}-{config.sequences}.json"
    try:
        held = json.loads(cached.read_bytes())
    except (FileNotFoundError, ValueError):
        held = None
    if isinstance(held, dict) and held.get("format") == FORMAT and isinstance(held.get("bits_per_byte"), float):
        return float(held["bits_per_byte"])
    bits = _count(data, config)
    unfinished = cached.with_name(f".{cached.name}.{os.getpid()}")
    unfinished.write_text(json.dumps({"format": FORMAT, "bits_per_byte": bits}), encoding="utf-8")
    unfinished.rename(cached)
    return bits


def _count(data: Prepared, config: EvaluationConfig) -> float:
    vocab = data.tokenizer.vocab_size
    keys, counts = _pairs(data.train.tokens, vocab)
    first = keys // vocab
    total = np.bincount(first, weights=counts, minlength=vocab)
    different = np.bincount(first, minlength=vocab)
    unigram = 1.0 + np.bincount(keys % vocab, weights=counts, minlength=vocab)
    unigram /= unigram.sum()
    bits, text_bytes = 0.0, 0
    for window in held_out_sequences(data, config):
        batch = data.held_out.batch([window])
        a, b = batch.tokens[0].numpy(), batch.targets[0].numpy()
        pair = a * vocab + b
        place = np.searchsorted(keys, pair).clip(max=len(keys) - 1)
        seen = np.where(keys[place] == pair, counts[place], 0)
        interpolated = (seen + different[a] * unigram[b]) / np.maximum(total[a] + different[a], 1)
        p = np.where(total[a] > 0, interpolated, unigram[b])  # nothing known of what follows a
        bits -= float(np.log(p).sum()) / math.log(2)
        text_bytes += int(data.tokenizer.token_bytes[b].sum())
    return bits / max(text_bytes, 1)


def _pairs(tokens: npt.NDArray[np.unsignedinteger], vocab: int) -> Counts:
    keys, counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for begin in range(0, max(0, len(tokens) - 1), CHUNK):
        part = tokens[begin : begin + CHUNK + 1].astype(np.int64)
        new, often = np.unique(part[:-1] * vocab + part[1:], return_counts=True)
        every = np.concatenate((keys, new))
        keys, place = np.unique(every, return_inverse=True)
        counts = np.bincount(place, weights=np.concatenate((counts, often))).astype(np.int64)
    return keys, counts
