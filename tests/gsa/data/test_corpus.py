"""Documents come whole, in order and from every source, are split by group, and bad text is refused by name."""

import json
import random
from pathlib import Path

import pytest

from gsa.data import corpus, reading
from gsa.data.corpus import CorpusConfig, Survey, documents, survey
from gsa.errors import ConfigError
from gsa.settings import check
from tests.draw import Draw
from tests.text import write_files


def text_of(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def test_text_files_come_whole_and_once_each(draw: Draw, tmp_path: Path) -> None:
    paths = write_files(tmp_path, draw.random.randrange(1000))
    for files in (paths, [str(tmp_path / "*.txt")], [*paths, str(tmp_path / "*.txt")]):
        found = list(documents(CorpusConfig("text", files)))
        assert [d.text for d in found] == [text_of(p) for p in paths]
        assert len({d.group for d in found}) == len(paths)


def test_a_long_file_comes_in_pieces_of_one_group(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = write_files(tmp_path, draw.random.randrange(1000), files=1, lines=300)
    monkeypatch.setattr(reading, "PIECE", draw.random.randint(3, 500))
    found = list(documents(CorpusConfig("text", [path])))
    assert len(found) > 1
    assert len({d.group for d in found}) == 1
    assert "".join(d.text for d in found).replace("\n", "") == text_of(path).replace("\n", "")


def test_rows_come_from_json_lines_and_parquet_and_dataset_folders(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = ["a b", "c\nd", "é"]
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"code": t}) + "\n" for t in texts))
    pyarrow.parquet.write_table(pyarrow.table({"code": texts}), tmp_path / "rows.parquet")
    for config in (
        CorpusConfig("json", [str(folder / "rows.jsonl")], text_column="code"),
        CorpusConfig("parquet", [str(tmp_path / "rows.parquet")], text_column="code"),
        CorpusConfig("hub", name=str(folder), text_column="code"),
    ):
        assert [d.text for d in documents(config)] == texts


@pytest.mark.slow
def test_the_standard_library_is_split_by_package(tmp_path: Path) -> None:
    found = survey(CorpusConfig(), tmp_path)
    groups = {d.group for d in documents(CorpusConfig())}
    assert {"json", "argparse.py", "asyncio"} <= groups
    held_out = {group for group in groups if found.held_out(group, 0.05)}
    assert 0 < len(held_out) < len(groups) / 5


def test_max_bytes_stops_early(draw: Draw, tmp_path: Path) -> None:
    paths = write_files(tmp_path, draw.random.randrange(1000))
    limit = draw.random.randint(1, 3000)
    found = list(documents(CorpusConfig("text", paths, max_bytes=limit)))
    sizes = [len(d.text.encode()) for d in found]
    assert sum(sizes[:-1]) < limit
    assert len(found) == len(paths) or sum(sizes) >= limit


def test_a_groups_side_of_the_split_does_not_depend_on_other_groups(draw: Draw) -> None:
    groups = [f"group {draw.random.random()}" for _ in range(2000)]
    fraction = draw.random.uniform(0.05, 0.5)
    for first in random.sample(groups, 2):
        held = [g for g in groups if Survey("", 0, 0, first, 2).held_out(g, fraction) and g != first]
        assert held == [g for g in groups if corpus._place(g) < fraction and g != first]
    assert abs(len(held) / 2000 - fraction) < 0.06


def test_a_corpus_that_is_moved_is_the_same_corpus(draw: Draw, tmp_path: Path) -> None:
    seed, found = draw.random.randrange(1000), []
    for folder in (tmp_path / "here", tmp_path / "there" / "deeper"):
        config = CorpusConfig("text", write_files(folder, seed))
        known = survey(config, tmp_path / "memory")
        found.append((known, [known.held_out(d.group, 0.3) for d in documents(config)]))
    assert found[0] == found[1]


def test_at_least_one_group_is_held_out(draw: Draw, tmp_path: Path) -> None:
    config = CorpusConfig("text", write_files(tmp_path / "t", draw.random.randrange(1000), files=2))
    found = survey(config, tmp_path)
    held = [found.held_out(d.group, 1e-9) for d in documents(config)]
    assert sorted(held) == [False, True]


def test_a_survey_is_remembered_until_a_file_changes(draw: Draw, tmp_path: Path) -> None:
    config = CorpusConfig("text", write_files(tmp_path / "t", draw.random.randrange(1000)))
    first = survey(config, tmp_path / "memory")
    assert survey(config, tmp_path / "memory") == first
    Path(config.files[0]).write_text("something else")
    changed = survey(config, tmp_path / "memory")
    assert changed.digest != first.digest
    assert changed.digest == survey(config, tmp_path / "other memory").digest


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"ok\nbin\0ary\n", "is binary (a zero byte in line 2)"),
        (b"ok\nok\nbad \xff here\n", "line 3 is not UTF-8"),
        (b"ok\ncut \xe6\xbc", "line 2 is not UTF-8"),
    ],
)
def test_bad_text_is_refused_by_file_and_line(tmp_path: Path, content: bytes, words: str) -> None:
    for source in ("text", "json"):
        path = tmp_path / f"bad.{source}"
        path.write_bytes(content.replace(b"ok", b'{"text": "ok"}') if source == "json" else content)
        with pytest.raises(ConfigError) as refused:
            survey(CorpusConfig(source, [str(path)]), tmp_path)
        assert words in str(refused.value)
        assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CorpusConfig("text", ["missing.txt"]), "missing.txt"),
        (CorpusConfig("text", ["no/*.match"]), "no/*.match"),
        (CorpusConfig("parquet", [__file__]), "parquet"),
        (CorpusConfig("json", [__file__]), "line 1 is not JSON"),
        (CorpusConfig("hub", name="./no-such-dataset"), "no-such-dataset"),
        (CorpusConfig("text", [__file__]), "at least two"),
    ],
)
def test_unreadable_sources_are_refused_by_name(tmp_path: Path, config: CorpusConfig, words: str) -> None:
    with pytest.raises(ConfigError, match="data.corpus") as refused:
        survey(config, tmp_path)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_mistyped_column_is_refused_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"content": "a", "number": 1}\n{"content": "b", "number": 2}\n')
    with pytest.raises(ConfigError, match="did you mean 'content'"):
        survey(CorpusConfig("json", [str(path)], text_column="contnt"), tmp_path)
    with pytest.raises(ConfigError, match="line 1: number holds int, not text"):
        survey(CorpusConfig("json", [str(path)], text_column="number"), tmp_path)


@pytest.mark.parametrize("config", [CorpusConfig("text"), CorpusConfig("hub"), CorpusConfig("csv")])
def test_an_incomplete_source_is_refused_before_anything_is_read(config: CorpusConfig) -> None:
    with pytest.raises(ConfigError, match="data.corpus"):
        check(config, "data.corpus")
