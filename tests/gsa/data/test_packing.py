"""Windows hold the text in order and once, know where documents start, and follow the seed alone."""

import dataclasses
import multiprocessing
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from gsa.data.corpus import CorpusConfig, documents, survey
from gsa.data.packing import DataConfig, Prepared, Shuffled, Windows, cached_copy, prepare
from gsa.data.tokenizer import TokenizerConfig
from gsa.errors import ConfigError
from gsa.settings import check
from tests.draw import Draw
from tests.text import write_files


def config_of(folder: Path, draw: Draw, length: int = 24, kind: str = "byte") -> DataConfig:
    files = write_files(folder / "text", draw.random.randrange(10_000))
    return DataConfig(CorpusConfig("text", files, held_out_fraction=0.3), TokenizerConfig(kind, vocab_size=280), length)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_both_splits_together_are_the_text_document_by_document(draw: Draw, tmp_path: Path, kind: str) -> None:
    config = config_of(tmp_path, draw, kind=kind)
    data, found = prepare(config, tmp_path / "cache"), survey(config.corpus, tmp_path)
    for windows, held_out in ((data.train, False), (data.held_out, True)):
        texts = [d.text for d in documents(config.corpus) if found.held_out(d.group, 0.3) == held_out]
        starts = np.flatnonzero(windows.tokens == data.tokenizer.start)
        parts = np.split(windows.tokens, starts[1:])
        assert [data.tokenizer.decode(part[1:].tolist()) for part in parts] == texts
        assert all(part[0] == data.tokenizer.start for part in parts)


def test_a_window_is_followed_by_its_targets_and_knows_its_documents(draw: Draw) -> None:
    tokens = draw.integers(0, 4, 1000).numpy().astype(np.uint16)
    length = draw.random.randint(1, 40)
    for across in (False, True):
        windows = Windows(tokens, 4, DataConfig(context_length=length, attend_across_documents=across))
        assert len(windows) == (1000 - 1) // length
        chosen = [draw.random.randrange(len(windows)) for _ in range(5)]
        batch = windows.batch(chosen)
        for row, window in enumerate(chosen):
            for t in range(length):
                place = window * length + t
                assert batch.tokens[row, t] == tokens[place]
                assert batch.targets[row, t] == tokens[place + 1]
                earlier = [s for s in range(t + 1) if tokens[window * length + s] == 4]
                assert batch.starts[row, t] == (0 if across or not earlier else earlier[-1])


def test_an_epoch_has_every_window_once_in_an_order_of_the_seed_alone(draw: Draw) -> None:
    count, seed = draw.random.randint(2, 50), draw.random.randrange(1000)
    windows = Windows(np.arange(count * 3 + 1, dtype=np.uint16), 0, DataConfig(context_length=3))
    orders = []
    for _ in range(2):
        shuffled = Shuffled(windows, seed)
        orders.append([int(shuffled.batch(n, 1).tokens[0, 0]) for n in range(3 * count)])
    assert orders[0] == orders[1]
    assert set(Counter(orders[0]).values()) == {3}
    assert all(len(set(orders[0][e * count : (e + 1) * count])) == count for e in range(3))
    if count > 10:
        assert orders[0][:count] != orders[0][count : 2 * count]
        assert orders[0] != [int(Shuffled(windows, seed + 1).batch(n, 1).tokens[0, 0]) for n in range(3 * count)]


def test_a_batch_is_the_same_wherever_one_begins(draw: Draw) -> None:
    windows = Windows(np.arange(100, dtype=np.uint16), 0, DataConfig(context_length=3))
    first, count = draw.random.randint(0, 80), draw.random.randint(1, 9)
    straight, jumped = Shuffled(windows, 1), Shuffled(windows, 1)
    for n in range(first):
        straight.batch(n, 1)
    assert torch.equal(straight.batch(first, count).tokens, jumped.batch(first, count).tokens)


def test_the_cache_is_used_again_and_not_by_other_settings(draw: Draw, tmp_path: Path) -> None:
    config = config_of(tmp_path, draw)
    first = prepare(config, tmp_path / "cache")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*/*.bin")}
    again = prepare(config, tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*/*.bin")} == files
    fingerprints = {first.fingerprint}
    for change in (
        DataConfig(config.corpus, TokenizerConfig("bpe", vocab_size=270), 24),
        DataConfig(config.corpus, config.tokenizer, 12),
        DataConfig(config.corpus, config.tokenizer, 24, attend_across_documents=True),
    ):
        fingerprints.add(prepare(change, tmp_path / "cache").fingerprint)
    Path(config.corpus.files[0]).write_text("other text\n" * 50)
    fingerprints.add(prepare(config, tmp_path / "cache").fingerprint)
    assert len(fingerprints) == 5


def test_a_cached_copy_is_found_by_its_fingerprint_and_used_when_the_text_is_gone(draw: Draw, tmp_path: Path) -> None:
    config, cache = config_of(tmp_path, draw), tmp_path / "cache"
    data = prepare(config, cache)
    other = prepare(dataclasses.replace(config, tokenizer=TokenizerConfig("bpe", vocab_size=270)), cache)
    for path in config.corpus.files:
        Path(path).unlink()
    (cache / ".0123456789abcdef01234567.5").mkdir()  # another process's work in hand
    name = cached_copy(cache, data.fingerprint, config)
    assert name is not None
    assert name != cached_copy(cache, other.fingerprint, config)
    assert cached_copy(cache, data.fingerprint, dataclasses.replace(config, context_length=12)) is None
    assert cached_copy(cache, "0" * 32, config) is None
    assert cached_copy(tmp_path / "nowhere", data.fingerprint, config) is None
    again = prepare(dataclasses.replace(config, prepared=name), cache)
    assert again.fingerprint == data.fingerprint
    assert np.array_equal(again.train.tokens, data.train.tokens)
    assert np.array_equal(again.held_out.tokens, data.held_out.tokens)


def test_a_prepared_copy_that_is_not_there_or_of_other_settings_is_refused(draw: Draw, tmp_path: Path) -> None:
    config, cache = config_of(tmp_path, draw), tmp_path / "cache"
    name = cached_copy(cache, prepare(config, cache).fingerprint, config)
    for changed, words in (
        (dataclasses.replace(config, prepared="0" * 24), f"no such tokenized copy in {cache}"),
        (dataclasses.replace(config, prepared=name, tokenizer=TokenizerConfig("bpe")), r"another data\.tokenizer"),
        (
            dataclasses.replace(
                config, prepared=name, corpus=dataclasses.replace(config.corpus, held_out_fraction=0.4)
            ),
            r"data\.corpus\.held_out_fraction",
        ),
    ):
        with pytest.raises(ConfigError, match=rf"data\.prepared = '.{{24}}': .*{words}"):
            prepare(changed, cache)
    for value in ("surveys", "../x", "", "A" * 24):
        with pytest.raises(ConfigError, match=r"data\.prepared = .*24 hexadecimal digits"):
            check(dataclasses.replace(config, prepared=value), "data")


def _prepare(config: DataConfig, cache: Path) -> str:
    return prepare(config, cache).fingerprint


@pytest.mark.slow
def test_many_processes_prepare_the_same_text_at_once(draw: Draw, tmp_path: Path) -> None:
    config = config_of(tmp_path, draw, kind="bpe")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(_prepare, [(config, tmp_path / "cache")] * 3)
    assert len(set(found)) == 1
    assert len(list((tmp_path / "cache").glob("*/train.bin"))) == 1


def test_a_context_longer_than_the_text_is_refused_with_what_there_is(draw: Draw, tmp_path: Path) -> None:
    config = config_of(tmp_path, draw, length=10**6)
    with pytest.raises(ConfigError, match=r"data\.context_length = 1000000: the training text has only \d+ tokens"):
        prepare(config, tmp_path / "cache")


def _peak_of_preparing(megabytes: int, folder: Path) -> tuple[int, int]:
    line = "for x in range(10): print(x, 'some text of a line')\n"
    folder.mkdir()
    for i in range(2):
        with (folder / f"{i}.txt").open("w") as file:
            for _ in range(megabytes * 500_000 // len(line)):
                file.write(line)
    config = DataConfig(CorpusConfig("text", [str(folder / "*.txt")]), TokenizerConfig("byte"), 64)
    data: Prepared = prepare(config, folder / "cache")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, len(data.train.tokens)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    peaks = []
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # one process, whose peak never falls
        for megabytes in (4, 40):
            peak, tokens = pool.apply(_peak_of_preparing, (megabytes, tmp_path / str(megabytes)))
            assert tokens > megabytes * 400_000
            peaks.append(peak)
    assert peaks[1] < peaks[0] + 20  # MiB; ten times the text
