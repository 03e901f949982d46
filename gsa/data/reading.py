"""Text from files: decompressed, without its byte order mark, in pieces or lines, and known to be UTF-8.

What a file is shows in its first bytes, not in its name: gzip, bzip2, xz and Zstandard are read as what they hold.
"""

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from gsa.errors import ConfigError, one_line

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIECE = 1 << 18  # bytes after which a long file goes on as another document of its group
LONGEST_LINE = 1 << 30  # bytes

Read = Callable[[int], None]  # is told of bytes as they are read from a file
Source = Path | str  # a local file, or the URL of another

ENCODINGS = {  # by byte order mark; that of UTF-32 begins like that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class BadTextError(ConfigError):
    """A file, or a line of one, is not UTF-8 text."""


def pieces(path: Path, read: Read) -> Iterator[str]:
    """A file's text in pieces of whole lines, so that memory does not grow with it.

    Raises:
        BadTextError: it is binary or not UTF-8.
        ConfigError: it cannot be read or decompressed.
    """
    decoder, held, number = codecs.getincrementaldecoder("utf-8")(), "", 1
    with opened(path, read) as file:
        while line := file.readline(PIECE):
            held += decode(line, path, number, decoder)
            number += line.endswith(b"\n")
            if len(held) >= PIECE:
                yield held
                held = ""
    decode(b"", path, number, decoder, final=True)
    yield held


def check_text(path: Path) -> None:
    """Read a file as fast as can be.

    Raises:
        As `pieces`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with opened(path, lambda _: None) as file:
        try:
            while block := file.read(PIECE):
                if b"\0" in block:
                    break
                decoder.decode(block)
            else:
                decoder.decode(b"", True)
                return
        except UnicodeDecodeError:
            pass  # the line is not known yet
    for _ in pieces(path, lambda _: None):
        pass


def lines(path: Source, read: Read) -> Iterator[tuple[int, bytes]]:
    """A file's lines that are not blank, with their numbers from 1.

    Raises:
        BadTextError: it is UTF-16 or UTF-32.
        ConfigError: it cannot be read or decompressed, or a line is longer than a gibibyte.
    """
    with opened(path, read) as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE:
                raise ConfigError("data.corpus.files", str(path), f"line {number} is longer than 1 GiB")
            if not line.isspace():
                yield number, line


def decode(
    line: bytes, path: Source, number: int, decoder: codecs.IncrementalDecoder | None = None, *, final: bool = False
) -> str:
    """The text of a line of a file.

    Raises:
        BadTextError: it is binary or not UTF-8; it is named by file and line.
    """
    if b"\0" in line:
        raise BadTextError("data.corpus.files", str(path), f"is binary (a zero byte in line {number})")
    try:
        return decoder.decode(line, final) if decoder else line.decode()
    except UnicodeDecodeError as error:
        raise BadTextError("data.corpus.files", str(path), f"line {number} is not UTF-8 ({error.reason})") from error


@contextmanager
def opened(path: Source, read: Read) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed and without a byte order mark of UTF-8.

    Raises:
        BadTextError: it is UTF-16 or UTF-32.
        ConfigError: it cannot be read or decompressed.
    """
    try:
        with _CountedFile(path, read) if isinstance(path, Path) else _remote(path) as raw:
            stream = _decompressed(io.BufferedReader(raw, PIECE))
            start = stream.peek(4)[:4]
            for mark, encoding in ENCODINGS.items():
                if start.startswith(mark):
                    raise BadTextError("data.corpus.files", str(path), f"is {encoding}, not UTF-8")
            if start.startswith(codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise ConfigError("data.corpus.files", str(path), f"cannot be read ({reason})") from error


def _remote(url: str) -> io.RawIOBase:
    from datasets.utils.file_utils import xopen  # tries again where the network fails

    return cast(io.RawIOBase, xopen(url, "rb"))


def _zstandard(file: io.BufferedReader) -> object:
    from pyarrow import CompressedInputStream

    return CompressedInputStream(file, "zstd")


DECOMPRESSORS: list[tuple[bytes, Callable[[io.BufferedReader], object]]] = [  # by how a file begins
    (rb"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2File),
    (rb"\xfd7zXZ\0", lzma.LZMAFile),
    (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", _zstandard),
]


def _decompressed(file: io.BufferedReader) -> io.BufferedReader:
    start = file.peek(10)
    for pattern, decompress in DECOMPRESSORS:
        if re.match(pattern, start):
            return io.BufferedReader(cast(io.RawIOBase, decompress(file)), PIECE)
    return file


class _CountedFile(io.FileIO):
    def __init__(self, path: Path, read: Read) -> None:
        super().__init__(path)
        self._read = read

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        count = super().readinto(buffer)
        self._read(count)
        return count
