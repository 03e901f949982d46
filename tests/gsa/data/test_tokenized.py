"""Surveys and copies are there whole or not at all, and what killed processes leave of them is removed."""

import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gsa.data import packing, tokenized
from gsa.data.corpus import CorpusConfig, documents, remembered, survey
from gsa.data.document import Document
from gsa.data.packing import DataConfig, prepare
from gsa.data.tokenizer import TokenizerConfig
from gsa.errors import RequestError
from tests.draw import Draw
from tests.text import write_files


def config_of(folder: Path, draw: Draw) -> DataConfig:
    files = write_files(folder / "text", draw.random.randrange(10_000))
    return DataConfig(CorpusConfig("text", files, held_out_fraction=0.3), TokenizerConfig("byte"), 24)


def unfinished(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob(".*"))


def test_what_killed_processes_leave_is_removed_by_the_next(draw: Draw, tmp_path: Path) -> None:
    config, cache = config_of(tmp_path, draw), tmp_path / "cache"
    prepare(config, cache)
    (copy,) = cache.glob("*/tokenizer.json")
    key = copy.parent.name
    copy.parent.rename(cache / f".{key}.{socket.gethostname()}.123456789")  # as if killed before it was done
    for name in (f".{key}.77", f".{key}.other.host.5", f".{key}.another.5", f".{'0' * 24}.5"):
        (cache / name).mkdir()
        (cache / name / "train.bin").touch()
    for path in (cache / f".{key}.other.host.5/train.bin", cache / f".{key}.other.host.5"):
        os.utime(path, (time.time() - 7200,) * 2)
    prepare(config, cache)
    # of another copy; and perhaps still at work, on another machine
    assert unfinished(cache) == [f".{'0' * 24}.5", f".{key}.another.5"]
    assert (cache / key / "tokenizer.json").exists()


def _prepare_and_be_killed(config: DataConfig, cache: Path) -> None:
    def kill(stream: Iterator[Document]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenized, "_batches", kill)
        prepare(config, cache)


def test_a_process_killed_while_it_tokenizes_leaves_nothing_that_is_used(draw: Draw, tmp_path: Path) -> None:
    config, cache = config_of(tmp_path, draw), tmp_path / "cache"
    killed = multiprocessing.get_context("fork").Process(target=_prepare_and_be_killed, args=(config, cache))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert len(unfinished(cache)) == 1
    prepare(config, cache)
    assert unfinished(cache) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_exception_while_tokenizing_leaves_nothing(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(stream: Iterator[Document]) -> None:
        raise error

    monkeypatch.setattr(tokenized, "_batches", fail)
    with pytest.raises((KeyboardInterrupt, OSError)):
        prepare(config_of(tmp_path, draw), tmp_path / "cache")
    assert unfinished(tmp_path / "cache") == []
    assert not list((tmp_path / "cache").glob("*/tokenizer.json"))


def test_text_that_changes_while_it_is_tokenized_is_refused_once(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be kept under the name of the text that it was."""
    config, cache = config_of(tmp_path, draw), tmp_path / "cache"
    path = Path(config.corpus.files[0])

    def change(corpus: CorpusConfig) -> Iterator[Document]:
        path.write_text("other text\n")
        return documents(corpus)

    with monkeypatch.context() as patched:
        patched.setattr(tokenized, "documents", change)
        with pytest.raises(RequestError, match=r"data\.corpus: the text changed while it was tokenized"):
            prepare(config, cache)
    assert unfinished(cache) == []
    data = prepare(config, cache)
    assert prepare(config, tmp_path / "other cache").fingerprint == data.fingerprint
    # a survey of an earlier version that took the same files for other text
    known = remembered(config.corpus, cache / "surveys")
    known.write_text(known.read_text().replace(survey(config.corpus, cache / "surveys").digest, "0" * 64))
    with pytest.raises(RequestError, match="the text changed"):
        prepare(config, cache)
    assert prepare(config, cache).fingerprint == data.fingerprint


@pytest.mark.parametrize("damage", ["", '{"digest": "a', "{}", "[]"])
def test_a_survey_that_was_not_written_to_its_end_is_made_again(draw: Draw, tmp_path: Path, damage: str) -> None:
    config = config_of(tmp_path, draw).corpus
    found = survey(config, tmp_path / "memory")
    known = remembered(config, tmp_path / "memory")
    known.write_text(damage)
    assert survey(config, tmp_path / "memory") == found
    assert known.read_text() != damage
    assert not list((tmp_path / "memory").glob("*.unfinished"))


def test_lock_files_can_be_used_by_another_user(draw: Draw, tmp_path: Path) -> None:
    previous = os.umask(0o077)
    try:
        prepare(config_of(tmp_path, draw), tmp_path / "cache")
    finally:
        os.umask(previous)
    locks = list((tmp_path / "cache").rglob("*.lock"))
    assert len(locks) == 2  # of the survey, of the copy
    assert all(lock.stat().st_mode & 0o777 == 0o666 for lock in locks)
    assert re.fullmatch(packing.COPY, locks[0].stem)
