"""From text to token numbers: bytes, or byte-level BPE, both of the `tokenizers` library.

- Any text can be encoded, and decoding gives it back.
- One special token begins every document; text that spells its name is ordinary text.
"""

import dataclasses
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gsa.errors import ConfigError, RequestError
from gsa.settings import setting

START = "<|document|>"


@dataclasses.dataclass
class TokenizerConfig:
    kind: str = setting("bpe", "byte: one token a byte; bpe: byte-level BPE", choices=("byte", "bpe"))
    vocab_size: int = setting(4096, "tokens, the start token among them (bpe)", ge=257, le=1_000_000)
    train_bytes: int = setting(20_000_000, "bytes of training text that BPE is trained on", ge=1)


class Tokenizer:
    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self.inner = inner
        self.inner.encode_special_tokens = True  # a document that spells a special token does not become one
        start = inner.token_to_id(START)
        if start is None:
            raise RequestError(f"the tokenizer has no token {START}")
        self.start: int = start

    @classmethod
    def train(cls, config: TokenizerConfig, texts: Iterable[str]) -> "Tokenizer":
        """A tokenizer of this text; `byte` has nothing to learn.

        Raises:
            ConfigError: the text has too few different pairs for so large a vocabulary.
        """
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bytes_only = models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
        inner = tokenizers.Tokenizer(bytes_only if config.kind == "byte" else models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        if config.kind == "byte":
            inner.add_special_tokens([START])
            return cls(inner)
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size, initial_alphabet=alphabet, special_tokens=[START], show_progress=False
        )
        inner.train_from_iterator(texts, trainer)
        if inner.get_vocab_size() < config.vocab_size:
            allowed = f"must be <= {inner.get_vocab_size()}: the text has no more pairs to merge"
            raise ConfigError("data.tokenizer.vocab_size", config.vocab_size, allowed)
        return cls(inner)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Raises RequestError where the file is no tokenizer."""
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{path}: is not a tokenizer ({error})") from error
        except Exception as error:
            raise RequestError(f"{path}: is not a tokenizer ({error})") from error

    def save(self, path: Path) -> None:
        path.write_text(self.inner.to_str(), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        return int(self.inner.get_vocab_size())

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """How many bytes of text each token stands for, [V]; the start token for none."""
        pieces = (str(self.inner.id_to_token(i)) for i in range(self.vocab_size))  # a character a byte
        return np.array([0 if i == self.start else len(piece) for i, piece in enumerate(pieces)], dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        return list(self.inner.encode(text).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.inner.encode_batch_fast(texts)]

    def decode(self, tokens: list[int]) -> str:
        return str(self.inner.decode(tokens, skip_special_tokens=False))
