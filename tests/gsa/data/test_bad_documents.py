"""Documents without text are skipped, counted and named, up to 1 % of them; or the first is refused."""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gsa.data import corpus, document
from gsa.data.corpus import CorpusConfig, documents, survey
from gsa.data.document import Document, Skipped, Tally
from gsa.errors import ConfigError


def write_tree(folder: Path, good: int, empty: int = 0, bad: int = 0) -> CorpusConfig:
    """A tree of text files, those without text first, named by one glob."""
    contents = [b""] * empty + [b"a\0b"] * bad + [b"text %d\n" % i for i in range(good)]
    for i, content in enumerate(contents):
        (folder / f"{i // 100}").mkdir(exist_ok=True)
        (folder / f"{i // 100}/{i:04}.txt").write_bytes(content)
    return CorpusConfig("text", [f"{folder}/**/*.txt"])


def test_empty_files_of_a_tree_are_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = write_tree(tmp_path, good=20, empty=7)
    (tmp_path / "0/0003.txt").write_text(" \n\t\n")
    with caplog.at_level(logging.INFO, "gsa"):
        found = survey(config, tmp_path / "memory")
    assert [d.text for d in documents(config)] == [f"text {i}\n" for i in range(20)]
    assert found.documents == 20
    assert caplog.messages == [
        "skipped 7 of 27 documents: " + "".join(f"000{i}.txt is empty, " for i in range(5)) + "…"
    ]


@pytest.mark.parametrize(("good", "bad", "taken"), [(99, 1, True), (98, 1, False), (298, 3, True), (296, 3, False)])
def test_up_to_one_percent_of_bad_documents_are_skipped(tmp_path: Path, good: int, bad: int, taken: bool) -> None:
    config = write_tree(tmp_path, good, bad=bad)
    if taken:
        assert survey(config, tmp_path / "memory").documents == good
        return
    with pytest.raises(ConfigError) as refused:
        survey(config, tmp_path / "memory")
    assert refused.value.value == str(tmp_path / "0/0000.txt")
    count = f"{bad} of {good + bad} documents are bad, and no more than 1% are skipped"
    assert refused.value.allowed == f"is binary (a zero byte in line 1); {count}"
    assert not list(tmp_path.glob("memory/*.json"))


def test_fail_refuses_the_first_document_without_text(tmp_path: Path) -> None:
    config = dataclasses.replace(write_tree(tmp_path, good=300, empty=1, bad=1), on_bad_document="fail")
    with pytest.raises(ConfigError, match=r"0000\.txt': is empty$"):
        survey(config, tmp_path / "memory")
    (tmp_path / "0/0000.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"0001\.txt': is binary \(a zero byte in line 1\)$"):
        survey(config, tmp_path / "memory")


def test_a_file_that_the_request_names_must_hold_text(tmp_path: Path) -> None:
    config = write_tree(tmp_path, good=300, empty=1, bad=1)
    for name, words in (("0/0000.txt", "is empty"), ("0/0001.txt", "is binary")):
        for files in ([*config.files, f"{tmp_path}/{name}"], [f"{tmp_path}/{name}", *config.files]):
            with pytest.raises(ConfigError, match=f"{name}': {words}"):
                survey(dataclasses.replace(config, files=files), tmp_path / "memory")


def test_a_corpus_of_nothing_but_empty_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.corpus\.source = 'text': holds no text: its 3 documents are empty"):
        survey(write_tree(tmp_path, good=0, empty=3), tmp_path / "memory")


@pytest.mark.slow
def test_rows_of_every_source_follow_the_same_rules(tmp_path: Path) -> None:
    texts = [f"row {i}" for i in range(198)]
    column: list[str | None] = [*texts[:100], None, "", " \n", *texts[100:]]
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps({"n": 1, "code": text}) + "\n" for text in column))
    table = pyarrow.table({"n": [1] * len(column), "code": column})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=50)
    tables = tmp_path / "tables"
    tables.mkdir()
    pyarrow.parquet.write_table(table, tables / "rows.parquet", row_group_size=50)
    for config, value, place in (
        (CorpusConfig("json", [f"{folder}/*"]), f"{folder}/rows.jsonl", "line 101"),
        (CorpusConfig("parquet", [f"{tmp_path}/*.parquet"]), f"{tmp_path}/rows.parquet", "row 101"),
        (CorpusConfig("hub", name=str(folder)), str(folder), "rows.jsonl line 101"),
        (CorpusConfig("hub", name=str(tables)), str(tables), "row 101"),
    ):
        config.text_column = "code"
        assert [d.text for d in documents(config)] == texts
        assert [d.group for d in documents(config)] == [hashlib.sha256(t.encode()).hexdigest()[:16] for t in texts]
        config.on_bad_document = "fail"
        with pytest.raises(ConfigError) as refused:
            list(documents(config))
        assert (refused.value.value, refused.value.allowed) == (value, f"{place}: code is null")
        config.text_column = "cod"
        with pytest.raises(ConfigError, match="did you mean 'code'"):
            list(documents(config))


def test_of_parquet_only_the_text_column_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    wide = pyarrow.table({"text": ["a", "b"], "n": ["x" * 100_000] * 2, "dotted.text": ["c", "d"]})
    pyarrow.parquet.write_table(wide, path, compression="none", use_dictionary=False, write_statistics=False)
    data = path.read_bytes()
    start = data.index(b"x" * 1000)
    path.write_bytes(data[:start] + b"\xff" * 200_004 + data[start + 200_004 :])  # what else it holds is damaged
    for column, texts in (("text", ["a", "b"]), ("dotted.text", ["c", "d"])):
        assert [d.text for d in documents(CorpusConfig("parquet", [str(path)], text_column=column))] == texts
    with pytest.raises(ConfigError, match=r"rows\.parquet': cannot be read as parquet"):
        survey(CorpusConfig("parquet", [str(path)], text_column="n"), tmp_path)


def test_the_standard_library_may_be_held_to_the_same() -> None:
    with pytest.raises(ConfigError, match=r"python_stdlib': .*__init__\.py is empty$"):
        list(documents(CorpusConfig(on_bad_document="fail")))


def test_a_corpus_is_given_up_when_nothing_of_much_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "HOPELESS", 50)
    bad = Skipped(
        ConfigError("data.corpus.text_column", "txt", "must be one of text"), "row 1: has no txt", empty=False
    )
    tally = Tally()
    for _ in range(49):
        tally.skip(bad)
    with pytest.raises(ConfigError, match="must be one of text; 50 of 50 documents are bad"):
        tally.skip(bad)
    tally = Tally()
    tally.take(Document("a", "text"))
    tally.take(Document("a", "more of it", continues=True))
    for _ in range(100):
        tally.skip(bad)
    with pytest.raises(ConfigError, match="100 of 101"):
        tally.refuse()


def test_a_corpus_surveyed_by_an_earlier_version_is_known(tmp_path: Path) -> None:
    """What names a survey is what it was before `on_bad_document` was a setting."""
    config = write_tree(tmp_path, good=3)
    settings = {"source": "text", "files": config.files, "name": None, "subset": None, "revision": None}
    settings |= {"split": "train", "text_column": "text", "max_bytes": None, "held_out_fraction": None}
    files = sorted(tmp_path.glob("*/*.txt"))
    parts = [settings, *([str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files), ""]
    assert corpus._identity(config, files) == hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    strict = dataclasses.replace(config, on_bad_document="fail")
    assert corpus._identity(strict, files) != corpus._identity(config, files)
