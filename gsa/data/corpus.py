"""Where the text comes from: a stream of documents, whatever holds them.

- `python_stdlib`: the source of the running Python's standard library, one document a file.
- `text`: UTF-8 files, one document a file. `json`: JSON lines, `parquet`: tables, one document a row.
- `hub`: a dataset of the Hugging Face hub, or a local folder of one, one document a row.
- Text and JSON files may be compressed.
- Everything streams: memory does not grow with the text.
- A split never cuts through a group: a package of the standard library, a file, or a row.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from gsa.data.document import Document, Skipped, Tally
from gsa.data.files import find_files
from gsa.data.hub_rows import hub_rows
from gsa.data.json_rows import json_rows
from gsa.data.parquet_rows import parquet_rows
from gsa.data.reading import Read
from gsa.data.text_files import python_files, standard_library, text_files
from gsa.errors import ConfigError
from gsa.progress import progress
from gsa.reach import why_no_hub
from gsa.settings import setting

SOURCES = ("python_stdlib", "text", "json", "parquet", "hub")
FOR_ALL = 0o666  # mode of lock files: another user of the cache needs them too


@dataclasses.dataclass
class CorpusConfig:
    source: str = setting("python_stdlib", "where the text comes from", choices=SOURCES)
    files: list[str] = setting(
        list, "paths or globs of the files, .gz, .bz2, .xz and .zst among them (text, json, parquet)"
    )
    name: str | None = setting(None, "dataset on the Hugging Face hub, or a local folder of one (hub)")
    subset: str | None = setting(None, "configuration of the dataset (hub)")
    revision: str | None = setting(None, "commit, tag or branch of the dataset (hub)")
    split: str = setting("train", "split of the dataset that is read (hub)")
    text_column: str = setting("text", "column that holds the text (json, parquet, hub)")
    max_bytes: int | None = setting(None, "read about this many bytes of text at most; null reads all", ge=1)
    on_bad_document: str = setting(
        "skip",
        "bad documents (binary, not UTF-8, not JSON, null): skip up to 1 % of all, or fail at the first; skip also "
        "skips any number of empty ones",
        choices=("skip", "fail"),
    )
    held_out_fraction: float = setting(0.05, "share of the groups that is held out, at least one", gt=0, lt=1)

    def check(self, prefix: str) -> None:
        if self.source in ("text", "json", "parquet") and not self.files:
            raise ConfigError(f"{prefix}.files", self.files, f"must name files where source is {self.source}")
        if self.source == "hub" and not self.name:
            raise ConfigError(f"{prefix}.name", self.name, "must name a dataset where source is hub")


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
    paths = _paths(config)
    known = memory / f"{_identity(config, paths)}.json"
    found = _read_survey(known)
    if found is None:
        memory.mkdir(parents=True, exist_ok=True)
        with FileLock(known.with_suffix(".lock"), mode=FOR_ALL):
            found = _read_survey(known)
            if found is None:
                found = _survey(config, sum(path.stat().st_size for path in paths))
                unfinished = known.with_suffix(".unfinished")
                unfinished.write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
                unfinished.rename(known)
    return found


def remembered(config: CorpusConfig, memory: Path) -> Path:
    """The file in which the survey of a text is remembered."""
    return memory / f"{_identity(config, _paths(config))}.json"


def _read_survey(path: Path) -> Survey | None:
    try:
        return Survey(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None  # not there, or not written to its end by a version that wrote it in place


def _survey(config: CorpusConfig, size: int) -> Survey:
    digest, tally = Digest(), Tally()
    count, first, groups = 0, "", 0
    # the hub does not say how much there is
    with progress("reading the text", min(size, config.max_bytes or size) or None) as read:
        for document in documents(config, tally, read):
            digest.add(document)
            count += 1
            if not groups or (groups == 1 and document.group != first):
                groups += 1
            if not first or _place(document.group) < _place(first):
                first = document.group
    tally.refuse()
    if not digest.bytes:
        empty = f": its {tally.empty} documents are empty" if tally.empty else ""
        raise ConfigError("data.corpus.source", config.source, f"holds no text{empty}")
    if groups < 2:
        raise ConfigError(
            "data.corpus.files", config.files or config.name, "is one document: a held-out split needs at least two"
        )
    tally.log()
    return Survey(digest.value, count, digest.bytes, first, groups)


class Digest:
    """SHA-256 of every group and text, in order."""

    def __init__(self) -> None:
        self.bytes = 0  # of text
        self._hash = hashlib.sha256()

    def add(self, document: Document) -> int:
        """Take a document up; returns the bytes of its text."""
        encoded = document.text.encode()
        self._hash.update(f"{len(encoded)} {document.group}\n".encode())
        self._hash.update(encoded)
        self.bytes += len(encoded)
        return len(encoded)

    @property
    def value(self) -> str:
        return self._hash.hexdigest()


def documents(config: CorpusConfig, tally: Tally | None = None, read: Read = lambda _: None) -> Iterator[Document]:
    """Every document that holds text, in a fixed order, up to `max_bytes`.

    Args:
        tally: counts the documents, and those that are skipped.
        read: is told of bytes as they are read, of files or, from the hub, of text.

    Raises:
        RequestError: a file is missing or cannot be read; `on_bad_document` is fail and a document holds no text, or so
            does a file that is named by its own path. File and line are named.
    """
    size = 0
    tally = tally or Tally()
    for document in _stream(config, read):
        if isinstance(document, Skipped):
            if document.required or config.on_bad_document == "fail":
                raise document.error
            tally.skip(document)
            continue
        tally.take(document)
        yield document
        size += len(document.text.encode())
        if config.max_bytes is not None and size >= config.max_bytes:
            return


def _stream(config: CorpusConfig, read: Read) -> Iterator[Document | Skipped]:
    if config.source == "python_stdlib":
        return python_files(standard_library(), read)
    if config.source == "hub":
        assert config.name is not None  # `check` has seen to it
        return hub_rows(config.name, config.subset, config.split, config.revision, config.text_column, read)
    files = find_files(config.files)
    if config.source == "text":
        return text_files(files, read)
    rows = json_rows if config.source == "json" else parquet_rows
    return rows(files, config.text_column, read)


def _paths(config: CorpusConfig) -> list[Path]:
    if config.source == "hub":
        return []
    return standard_library() if config.source == "python_stdlib" else [file.path for file in find_files(config.files)]


def _place(group: str) -> float:
    """A group's place in [0, 1), by hash."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8]) / 2**64


def _identity(config: CorpusConfig, paths: list[Path]) -> str:
    """What must not have changed for a survey to hold: the settings, and each file's size and time of change."""
    settings = dataclasses.asdict(config) | {"held_out_fraction": None}
    if config.on_bad_document == "skip":
        del settings["on_bad_document"]  # surveys made before there was this setting hold
    parts: list[Any] = [settings]
    if config.source == "hub":
        from datasets import load_dataset_builder
        from datasets.exceptions import DatasetsError

        try:
            builder = load_dataset_builder(config.name, config.subset, revision=config.revision)
        except (DatasetsError, OSError, ValueError) as error:
            reason = why_no_hub(error)
            raise ConfigError("data.corpus.name", config.name, f"cannot be loaded: {reason}") from error
        parts.append(builder.cache_dir)  # names the version and the hash of the data files
    else:
        parts += [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
        parts.append(sys.version if config.source == "python_stdlib" else "")
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
