"""Where the text comes from: a stream of documents, whatever holds them.

- `python_stdlib`: the source of the running Python's standard library, one document a file.
- `text`: UTF-8 files, one document a file. `json`: JSON lines, `parquet`: tables, one document a row.
- `hub`: a dataset of the Hugging Face hub, or a local folder of one, one document a row.
- Everything streams: memory does not grow with the text.
- A split never cuts through a group: a package of the standard library, a file, or a row.
"""

import codecs
import dataclasses
import glob
import hashlib
import json
import os
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gsa.errors import ConfigError, RequestError, one_line
from gsa.paths import of_user
from gsa.settings import nearest, setting

SOURCES = ("python_stdlib", "text", "json", "parquet", "hub")
PIECE = 1 << 18  # bytes after which a long file goes on as another document of its group


@dataclasses.dataclass
class CorpusConfig:
    source: str = setting("python_stdlib", "where the text comes from", choices=SOURCES)
    files: list[str] = setting(list, "paths or globs of the files (text, json, parquet)")
    name: str | None = setting(None, "dataset on the Hugging Face hub, or a local folder of one (hub)")
    subset: str | None = setting(None, "configuration of the dataset (hub)")
    revision: str | None = setting(None, "commit, tag or branch of the dataset (hub)")
    split: str = setting("train", "split of the dataset that is read (hub)")
    text_column: str = setting("text", "column that holds the text (json, parquet, hub)")
    max_bytes: int | None = setting(None, "read about this many bytes of text at most; null reads all", ge=1)
    held_out_fraction: float = setting(0.05, "share of the groups that is held out, at least one", gt=0, lt=1)

    def check(self, prefix: str) -> None:
        if self.source in ("text", "json", "parquet") and not self.files:
            raise ConfigError(f"{prefix}.files", self.files, f"must name files where source is {self.source}")
        if self.source == "hub" and not self.name:
            raise ConfigError(f"{prefix}.name", self.name, "must name a dataset where source is hub")


class Document(NamedTuple):
    group: str  # never cut by a split
    text: str


@dataclasses.dataclass(frozen=True)
class Survey:
    """What one pass over the text tells: enough to name it and to split it."""

    digest: str  # SHA-256 of every group and text, in order
    documents: int
    bytes: int
    first_group: str  # the group with the smallest hash, held out in any case
    groups: int  # 1, or 2 for "more than one"

    def held_out(self, group: str, fraction: float) -> bool:
        """Whether a group is held out: by a hash of its name alone, so that more text moves no group."""
        return group == self.first_group or _place(group) < fraction


def survey(config: CorpusConfig, memory: Path) -> Survey:
    """Read the text once; the result is remembered in `memory` for as long as the files stay as they are.

    Raises:
        RequestError: the text cannot be read, is empty, or is one group, which no split may cut.
    """
    known = memory / f"{_identity(config)}.json"
    if known.exists():
        return Survey(**json.loads(known.read_text(encoding="utf-8")))
    digest, count, size, first, groups = hashlib.sha256(), 0, 0, "", 0
    for document in documents(config):
        encoded = document.text.encode()
        digest.update(f"{len(encoded)} {document.group}\n".encode())
        digest.update(encoded)
        count, size = count + 1, size + len(encoded)
        if not groups or (groups == 1 and document.group != first):
            groups += 1
        if not first or _place(document.group) < _place(first):
            first = document.group
    if not size:
        raise ConfigError("data.corpus.source", config.source, "holds no text")
    if groups < 2:
        raise ConfigError(
            "data.corpus.files", config.files or config.name, "is one document: a held-out split needs at least two"
        )
    found = Survey(digest.hexdigest(), count, size, first, groups)
    memory.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
    return found


def documents(config: CorpusConfig) -> Iterator[Document]:
    """Every document that is not empty, in a fixed order, up to `max_bytes`.

    Raises:
        RequestError: a file is missing, empty, binary or not UTF-8, or a row holds no text; it is named.
    """
    size = 0
    for document in _stream(config):
        if config.max_bytes is not None and size >= config.max_bytes:
            return
        size += len(document.text.encode())
        yield document


def files_of(config: CorpusConfig) -> list[Path]:
    """The files that `files` names, sorted, each once.

    Raises:
        ConfigError: a path or glob names none.
    """
    found: dict[Path, None] = {}
    for pattern in config.files:
        pattern = of_user(pattern)
        there = os.path.exists(pattern)  # a file of that very name, a[1].txt for example
        paths = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) and not there else [pattern]
        named = [path for path in map(Path, paths) if path.is_file()]
        if not named:
            raise ConfigError("data.corpus.files", pattern, "no such file")
        found |= dict.fromkeys(named)
    return list(found)


def _stream(config: CorpusConfig) -> Iterable[Document]:
    if config.source == "python_stdlib":
        return _python_files(_standard_library())
    if config.source == "text":
        return _text_files(files_of(config))
    return _rows(config)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    unwanted = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if not unwanted & set(p.relative_to(root).parts))


def _python_files(paths: list[Path]) -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in paths:
        with tokenize.open(path) as file:  # honours a coding cookie
            text = file.read()
        if text.strip():
            yield Document(path.relative_to(root).parts[0], text)


def _text_files(paths: list[Path]) -> Iterator[Document]:
    # named from the folder that holds them all: a corpus that is moved is split as before
    root = os.path.commonpath([path.absolute().parent for path in paths])
    for path in paths:
        if not path.stat().st_size:
            raise ConfigError("data.corpus.files", str(path), "is empty")
        for text in _pieces(path):
            if text.strip():
                yield Document(os.path.relpath(path.absolute(), root), text)


def _pieces(path: Path) -> Iterator[str]:
    """A file's text, in pieces of whole lines, however large it is."""
    decoder, held, number = codecs.getincrementaldecoder("utf-8")(), "", 1
    with path.open("rb") as file:
        while line := file.readline(PIECE):
            if b"\0" in line:
                raise ConfigError("data.corpus.files", str(path), f"is binary (a zero byte in line {number})")
            try:
                held += decoder.decode(line)
            except UnicodeDecodeError as error:
                raise ConfigError(
                    "data.corpus.files", str(path), f"line {number} is not UTF-8 ({error.reason})"
                ) from error
            number += line.endswith(b"\n")
            if len(held) >= PIECE:
                yield held
                held = ""
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ConfigError("data.corpus.files", str(path), f"line {number} is not UTF-8 ({error.reason})") from error
    yield held


def _rows(config: CorpusConfig) -> Iterator[Document]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    key = "data.corpus.name" if config.source == "hub" else "data.corpus.files"
    value = config.name if config.source == "hub" else config.files
    try:
        if config.source == "hub":
            rows = load_dataset(
                config.name, config.subset, split=config.split, revision=config.revision, streaming=True
            )
        else:
            paths = [str(path) for path in files_of(config)]
            _refuse_unreadable(paths, config.source)
            escaped = [glob.escape(path) for path in paths]  # the library takes them for globs
            rows = load_dataset(config.source, data_files=escaped, split="train", streaming=True)
        for row in rows:
            yield _row(row, config.text_column)
    except RequestError:
        raise
    except (DatasetsError, ArrowException, OSError, ValueError) as error:
        # the library's own kinds of errors for what it cannot find, reach or parse
        raise ConfigError(key, value, f"cannot be read as {config.source}: {one_line(error)}") from error


def _refuse_unreadable(paths: list[str], source: str) -> None:
    """Name the file and line that the JSON reader would only call a parse error."""
    for path in paths:
        if not Path(path).stat().st_size:
            raise ConfigError("data.corpus.files", path, "is empty")
        if source == "json":
            for _ in _pieces(Path(path)):
                pass


def _row(row: dict[str, Any], column: str) -> Document:
    if column not in row:
        hint = nearest(column, list(row))
        raise ConfigError("data.corpus.text_column", column, f"must be one of {', '.join(row)}{hint}")
    text = row[column]
    if not isinstance(text, str):
        raise ConfigError("data.corpus.text_column", column, f"holds a {type(text).__name__}, not text")
    return Document(hashlib.sha256(text.encode()).hexdigest()[:16], text)


def _place(group: str) -> float:
    """A group's place in [0, 1), by hash."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8]) / 2**64


def _identity(config: CorpusConfig) -> str:
    """What must not have changed for a survey to hold: the settings, and each file's size and time of change."""
    parts: list[Any] = [dataclasses.asdict(config) | {"held_out_fraction": None}]
    if config.source == "hub":
        from datasets import load_dataset_builder
        from datasets.exceptions import DatasetsError

        try:
            builder = load_dataset_builder(config.name, config.subset, revision=config.revision)
        except (DatasetsError, OSError, ValueError) as error:
            reason = one_line(error)
            raise ConfigError("data.corpus.name", config.name, f"cannot be loaded: {reason}") from error
        parts.append(builder.cache_dir)  # names the version and the hash of the data files
    else:
        paths = _standard_library() if config.source == "python_stdlib" else files_of(config)
        parts += [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
        parts.append(sys.version if config.source == "python_stdlib" else "")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
