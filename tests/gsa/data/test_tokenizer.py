"""Tokenizers lose nothing, count bytes right, and start tokens cannot be forged."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsa.data.tokenizer import START, Tokenizer, TokenizerConfig
from gsa.errors import ConfigError, RequestError

TEXT = ["def f(x):\n    return x + 1\n", "für alle: 漢字 🙂\r\n\t", "import os, sys\n" * 20]
BYTE = Tokenizer.train(TokenizerConfig("byte"), [])
BPE = Tokenizer.train(TokenizerConfig("bpe", vocab_size=300), TEXT)


@pytest.mark.parametrize("tokenizer", [BYTE, BPE])
@settings(max_examples=100, deadline=None)
@given(text=st.text() | st.sampled_from([START, f"a{START}b", *TEXT]))
def test_text_survives_and_its_bytes_are_counted(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.start not in tokens
    assert tokenizer.encode_batch([text, text]) == [tokens, tokens]
    assert int(tokenizer.token_bytes[tokens].sum()) == len(text.encode())
    if tokenizer is BYTE:
        assert len(tokens) == len(text.encode())


def test_bpe_merges_up_to_its_size_and_refuses_more_than_there_is() -> None:
    assert BYTE.vocab_size == 257
    assert BPE.vocab_size == 300
    assert len(BPE.encode(TEXT[2])) < len(TEXT[2]) / 2
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.vocab_size = 5000"):
        Tokenizer.train(TokenizerConfig("bpe", vocab_size=5000), TEXT)


def test_a_tokenizer_is_the_same_after_a_round_trip_to_disk(tmp_path: Path) -> None:
    BPE.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    for text in (*TEXT, START):
        assert loaded.encode(text) == BPE.encode(text)


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"}', "\0"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(RequestError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    with pytest.raises(RequestError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path / "missing.json")
