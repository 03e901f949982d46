"""What a file holds is the same text however it is compressed and whether or not it begins with a byte order mark."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from gsa.data import reading, text_files
from gsa.data.corpus import CorpusConfig, documents
from gsa.errors import ConfigError
from tests.draw import Draw
from tests.text import WORDS


def zstandard(data: bytes) -> bytes:
    return bytes(pyarrow.compress(data, codec="zstd", asbytes=True))


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard,
}


def texts(source: str, *paths: Path) -> list[str]:
    return [d.text for d in documents(CorpusConfig(source, [str(path) for path in paths]))]


def rows(draw: Draw, count: int = 2000) -> list[str]:
    return [f"row {i}: " + " ".join(draw.random.choices(WORDS, k=20)) for i in range(count)]


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_compressed_files_hold_what_they_held(
    draw: Draw, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE", 10_000)
    lines = rows(draw)
    content = {
        "text": "".join(f"{line}\n" for line in lines).encode(),
        "json": "".join(json.dumps({"text": line}) + "\n" for line in lines).encode(),
    }
    for source, data in content.items():
        plain, packed, parts = (tmp_path / f"{name}.{source}" for name in ("plain", f"packed.{kind}", "parts"))
        plain.write_bytes(data)
        packed.write_bytes(COMPRESSORS[kind](data))
        # as `cat` joins them, under a name that does not tell
        parts.write_bytes(COMPRESSORS[kind](data[:50_000]) + COMPRESSORS[kind](data[50_000:]))
        expected = texts(source, plain)
        assert "".join(expected) == "".join(lines if source == "json" else [data.decode()])
        assert texts(source, packed) == expected
        assert texts(source, parts) == expected


@pytest.mark.parametrize("source", ["text", "json"])
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_a_compressed_file_that_is_cut_off_is_refused_by_name(
    draw: Draw, tmp_path: Path, kind: str, source: str
) -> None:
    data = COMPRESSORS[kind]("".join(json.dumps({"text": line}) + "\n" for line in rows(draw)).encode())
    (tmp_path / "good.txt").write_text('{"text": "good"}\n')
    for end in (20, len(data) // 2, len(data) - 3):
        (tmp_path / f"bad.txt.{kind}").write_bytes(data[:end])
        with pytest.raises(ConfigError, match=rf"bad\.txt\.{kind}': cannot be read \(.+\)$"):
            list(documents(CorpusConfig(source, [f"{tmp_path}/*.txt*"])))


def test_a_name_alone_compresses_nothing(tmp_path: Path) -> None:
    (tmp_path / "plain.txt.gz").write_text("BZh is a word\n")
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "empty.bz2").write_bytes(bz2.compress(b""))
    assert texts("text", tmp_path / "plain.txt.gz") == ["BZh is a word\n"]
    for path in (tmp_path / "empty.gz", tmp_path / "empty.bz2"):
        with pytest.raises(ConfigError, match="is empty"):
            texts("text", path)


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard])
def test_a_byte_order_mark_at_the_start_is_no_text(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "marked"
    for source, text in (("text", "text\n\ufeff stays\n"), ("json", '{"text": "text\ufeff"}\n{"text": "more"}\n')):
        path.write_bytes(compress(text.encode("utf-8-sig")))
        assert texts(source, path) == ([text] if source == "text" else ["text\ufeff", "more"])
    path.write_bytes(compress(b"\xef\xbb\xbf"))
    for source in ("text", "json"):
        with pytest.raises(ConfigError, match="is empty"):
            texts(source, path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be", "utf-32-be"])
@pytest.mark.parametrize("source", ["text", "json"])
def test_another_encoding_is_named(tmp_path: Path, source: str, encoding: str) -> None:
    path = tmp_path / "other"
    path.write_bytes(("" if encoding in ("utf-16", "utf-32") else "\ufeff").encode(encoding) + '"a"'.encode(encoding))
    with pytest.raises(ConfigError, match=f"other': is {encoding[:6].upper()}, not UTF-8"):
        texts(source, path)


@pytest.mark.parametrize("held", [1, 3, 64])
def test_nothing_of_a_file_is_read_whose_end_is_not_text(
    draw: Draw, tmp_path: Path, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE", 1000)
    monkeypatch.setattr(text_files, "HELD", held)
    text = "".join(f"{line}\n" for line in rows(draw, 100))
    for i in range(100):
        (tmp_path / f"{i:03}.txt").write_text(text if i < 3 else str(i))
    (tmp_path / "001.txt").write_bytes(text.encode() + b"\xff\n")
    found = list(documents(CorpusConfig("text", [f"{tmp_path}/*.txt"])))
    assert "".join(d.text for d in found) == text + text + "".join(str(i) for i in range(3, 100))
    assert {d.group for d in found} == {f"{i:03}.txt" for i in range(100) if i != 1}
