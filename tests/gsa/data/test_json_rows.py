"""Of JSON only the text column matters; rows are named by line, and may come in arrays or span lines."""

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import fsspec
import pytest

from gsa.data import json_rows
from gsa.data.corpus import CorpusConfig, documents, survey
from gsa.data.document import Document, Skipped
from gsa.errors import ConfigError
from tests.draw import Draw


def texts(path: Path, content: str | list[Any], column: str = "text") -> list[str]:
    """The text of a JSON file with this content; a list is one row a line."""
    lines = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(lines, encoding="utf-8")
    return [d.text for d in documents(CorpusConfig("json", [str(path)], text_column=column))]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_what_other_columns_hold_and_when_does_not_matter(path: Path) -> None:
    """A reader that infers the columns' types from the first rows refused these."""
    others: list[dict[str, Any]] = [{"meta": {"url": None}, "n": 1} for _ in range(8000)]
    others += [{"meta": {"url": "u", "more": [1]}, "n": "1", "late": i} for i in range(1000)]
    others += [{}, {"meta": 3}, {"n": [{}]}]
    rows = [{"text": f"2026-01-{i % 30 + 1:02} {i}"} | other for i, other in enumerate(others)]
    assert texts(path, rows) == [row["text"] for row in rows]
    assert texts(path, [{"text": "2026-01-01"}, {"text": "2026-01-02"}]) == ["2026-01-01", "2026-01-02"]


def test_json_of_a_hub_dataset_is_read_as_other_json(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"row {i} {'x' * 2000}", "meta": {"url": None}} for i in range(6000)]
    # types are inferred from less than that
    rows += [{"text": f"late {i}", "meta": {"url": "u"}, "late": i} for i in range(3)]
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), 1))
    assert [d.text for d in documents(CorpusConfig("hub", name=str(folder)))] == [row["text"] for row in rows]
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n{"text": 3}'))
    with pytest.raises(
        ConfigError, match=r"name = '.*/dataset': train\.jsonl\.gz line 2: text holds int, not text; 1 of"
    ):
        survey(CorpusConfig("hub", name=str(folder)), tmp_path)


def test_json_elsewhere_is_read_by_its_url() -> None:
    with fsspec.open("memory://rows.jsonl.gz", "wb") as file:
        file.write(gzip.compress(b'\n{"text": "a"}\n{"text": null}\n'))
    first, second = json_rows.json_rows([("memory://rows.jsonl.gz", False)], "text", lambda _: None)
    assert isinstance(first, Document)
    assert first.text == "a"
    assert isinstance(second, Skipped)
    assert str(second.error) == "data.corpus.files = 'memory://rows.jsonl.gz': line 3: text is null"


def test_a_row_without_text_is_named_by_file_and_line(path: Path) -> None:
    good = json.dumps({"text": "good"}) + "\n"
    for row, words in (
        ('{"text": null}', "text is null"),
        ('{"text": 3}', "text holds int, not text"),
        ('{"text": ["a"]}', "text holds list, not text"),
        ('{"text": "a\\ud800"}', "text holds half of a surrogate pair"),
        ('{"text": " "}', "text is empty"),
        ('{"txt": "a"}', "must be one of txt; did you mean 'txt'?"),
        ('["text"]', "holds list, not an object"),
        ("3", "holds int, not an object"),
        ('{"text": "cut', "is not JSON"),
        ('{"n": ' + "9" * 5000 + "}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("a\0", "is binary (a zero byte in line 3)"),
    ):
        path.write_text(f"{good}\n{row}\r\n{good * 200}", encoding="utf-8")
        config = CorpusConfig("json", [str(path)])
        assert [d.text for d in documents(config)] == ["good"] * 201
        config.on_bad_document = "fail"
        with pytest.raises(ConfigError) as refused:
            list(documents(config))
        for part in (words, str(path), "line 3"):
            assert part in str(refused.value)
    path.write_bytes(f"{good}\n".encode() + b'{"text": "\xff"}')
    with pytest.raises(ConfigError, match=r"rows\.jsonl': line 3 is not UTF-8"):
        list(documents(config))


@pytest.mark.parametrize("indent", [None, 1])
def test_arrays_and_rows_that_span_lines_are_read_in_pieces(
    draw: Draw, path: Path, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "HEAD", draw.random.randint(300, 600))
    expected = [f"é [{i}], \n {{" * draw.random.randint(1, 9) for i in range(100)]
    rows = [{"id": i, "text": text} for i, text in enumerate(expected)]
    assert texts(path, json.dumps(rows, indent=indent)) == expected
    assert texts(path, "\ufeff \n" + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n") == expected
    if indent:
        assert texts(path, "\n".join(json.dumps(row, indent=indent) for row in rows)) == expected


@pytest.mark.parametrize("cut", ['{"text": "a"', '[\n{"text": "a"},\n{"text": "b"}', '[\n{"text": "a"},\n{"text": "b'])
def test_json_that_breaks_off_across_lines_is_refused_by_line(path: Path, cut: str) -> None:
    config = CorpusConfig("json", [str(path)])
    path.write_text(cut)
    with pytest.raises(ConfigError, match=r"rows\.jsonl': .*line [13]"):
        survey(config, path.parent)


def test_a_row_of_an_array_is_named_by_the_line_in_which_it_begins(path: Path) -> None:
    path.write_text('[\n\n {\n"text": "a"\n}, {"text":\n null}]')
    config = CorpusConfig("json", [str(path)], on_bad_document="fail")
    with pytest.raises(ConfigError, match=r"rows\.jsonl': line 5: text is null"):
        list(documents(config))


def test_the_first_rows_that_are_skipped_are_named_in_the_log(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, str | None]] = [{"text": f"row {i}"} for i in range(300)]
    rows[7] = {"txt": "row"}
    rows[250] = {"text": None}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.INFO, "gsa"):
        survey(CorpusConfig("json", [str(path)]), path.parent)
    expected = "skipped 2 of 300 documents: rows.jsonl line 8: has no text, rows.jsonl line 251: text is null"
    assert caplog.messages == [expected]
