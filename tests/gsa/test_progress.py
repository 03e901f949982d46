"""Long work shows what is done, how fast, and what is left: in a bar on a terminal, in lines elsewhere."""

import io
import logging
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from gsa import progress as module
from gsa.data.corpus import CorpusConfig
from gsa.data.packing import DataConfig, prepare
from gsa.data.tokenizer import TokenizerConfig
from gsa.progress import progress
from tests.text import write_files

PLAIN = Console(file=io.StringIO())


def test_lines_come_every_some_seconds_with_speed_and_time_left(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO, "gsa"), progress("tokenizing", 150_000_000, PLAIN) as done:
        for _ in range(25):
            now += 1
            done(2_000_000)
    assert caplog.messages == [
        "tokenizing: 20.0 of 150.0 MB, 2.0 MB/s, about 65 s left",
        "tokenizing: 40.0 of 150.0 MB, 2.0 MB/s, about 55 s left",
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO, "gsa"), progress("reading", None, PLAIN) as done:
        now += 10
        done(3_000_000)
    assert caplog.messages == ["reading: 3.0 MB, 0.3 MB/s"]


def test_a_terminal_shows_a_bar(caplog: pytest.LogCaptureFixture) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with caplog.at_level(logging.INFO, "gsa"), progress("tokenizing", 4_000_000, console) as done:
        done(1_000_000)
    assert "tokenizing" in screen.getvalue()
    assert "1.0/4.0 MB" in screen.getvalue()


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_all_bytes_of_a_text_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)
    files = write_files(tmp_path / "text", 1, lines=2000)
    size = sum(Path(file).stat().st_size for file in files) / 1e6
    config = DataConfig(CorpusConfig("text", files, held_out_fraction=0.3), TokenizerConfig(kind, vocab_size=280), 24)
    with caplog.at_level(logging.INFO, "gsa"):
        prepare(config, tmp_path / "cache")
    last = {}
    for message in caplog.messages:
        if found := re.fullmatch(r"(.*): (.*) of (.*) MB, .* MB/s, about 0 s left", message):
            last[found[1]] = (found[2], found[3])
    assert size > 0.1
    whole = (f"{size:.1f}", f"{size:.1f}")
    assert last["reading the text"] == last["tokenizing"] == whole
    assert ("training the tokenizer" in last) == (kind == "bpe")
    caplog.clear()
    with caplog.at_level(logging.INFO, "gsa"):
        prepare(config, tmp_path / "cache")
    assert caplog.messages == []
