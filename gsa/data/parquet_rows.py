"""Rows of parquet tables, one document each; only the text column is read."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gsa.data.document import Document, Skipped, empty_file, missing_column, row
from gsa.data.files import SourceFile
from gsa.data.reading import BadTextError, Read
from gsa.errors import ConfigError, one_line

BATCH = 1024  # rows decoded at once
BUFFER = 1 << 20  # bytes read at once of a column


def parquet_rows(files: Iterable[SourceFile], column: str, read: Read) -> Iterator[Document | Skipped]:
    """The rows of parquet tables, in order.

    Raises:
        ConfigError: a file cannot be read as parquet, or has no such column.
    """
    for path, named in files:
        size, found = path.stat().st_size, False
        for number, value in enumerate(_column(path, column) if size else (), 1):
            found, place = True, f"row {number}"
            if isinstance(value, BadTextError):
                yield Skipped(value, f"{path.name} {value.allowed}", empty=False)
            else:
                yield row(value, "data.corpus.files", str(path), column, place, path.name)
        if not found:
            yield empty_file(path, path.name, named)
        read(size)


def _column(path: Path, column: str) -> Iterator[Any]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, buffer_size=BUFFER) as table:
            if column not in table.schema_arrow.names:
                raise missing_column(column, table.schema_arrow.names, str(path))
            number = 0
            for batch in table.iter_batches(BATCH, columns=[column]):
                for value in batch.column(0):
                    number += 1
                    try:
                        yield value.as_py()
                    except UnicodeDecodeError as error:
                        reason = f"row {number}: {column} is not UTF-8 ({error.reason})"
                        yield BadTextError("data.corpus.files", str(path), reason)
    except (ArrowException, OSError) as error:
        reason = one_line(error)
        raise ConfigError("data.corpus.files", str(path), f"cannot be read as parquet: {reason}") from error
