"""Rows of datasets of the Hugging Face hub, or of local folders of them, one document each.

The `datasets` library finds a dataset's files. JSON is read by our own reader: the library's infers a type for every
column from the first rows, and fails at the row that does not fit.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gsa.data.document import Document, Skipped, missing_column, row
from gsa.data.json_rows import json_rows
from gsa.data.reading import Read, Source
from gsa.errors import ConfigError
from gsa.reach import why_no_hub


def hub_rows(
    name: str, subset: str | None, split: str, revision: str | None, column: str, read: Read
) -> Iterator[Document | Skipped]:
    """The rows of a dataset, in order.

    Args:
        name, subset, split, revision: as in the settings of the corpus.
        column: which holds the text.
        read: is told of the bytes of text.

    Raises:
        ConfigError: the dataset cannot be reached or read, or has no such column.
    """
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        files = _json_files(load_dataset_builder(name, subset, revision=revision), split)
        if files is not None:
            found = _json_rows(files, name, column)
        else:
            only = load_dataset(name, subset, split=split, revision=revision, streaming=True)
            found = _rows(only, name, column)
        for document in found:
            yield document
            read(len(document.text.encode()) if isinstance(document, Document) else 0)
    except ConfigError as error:
        raise _of_dataset(error, name) from error
    except (DatasetsError, ArrowException, OSError, ValueError, TypeError) as error:
        # the library's own kinds of errors for what it cannot find, reach, parse or bring to one type
        raise ConfigError("data.corpus.name", name, f"cannot be read: {why_no_hub(error)}") from error


def _rows(rows: Any, name: str, column: str) -> Iterator[Document | Skipped]:
    known = rows.column_names or list(next(iter(rows), {}))  # what the dataset says, else its first row
    if column not in known:
        raise missing_column(column, known, name)
    for number, found in enumerate(rows.select_columns([column]), 1):
        yield row(found[column], "data.corpus.name", name, column, f"row {number}", name)


def _json_rows(files: list[Source], name: str, column: str) -> Iterator[Document | Skipped]:
    for found in json_rows(((file, False) for file in files), column, lambda _: None):
        yield found._replace(error=_of_dataset(found.error, name)) if isinstance(found, Skipped) else found


def _json_files(builder: Any, split: str) -> list[Source] | None:
    """The files of a split where they are JSON whose rows are the dataset's."""
    from datasets.packaged_modules.json.json import Json

    if not isinstance(builder, Json) or builder.config.field is not None or split not in builder.config.data_files:
        return None
    return [file if "://" in file else Path(file) for file in builder.config.data_files[split]]


def _of_dataset(error: ConfigError, name: str) -> ConfigError:
    """The same of the setting that was given: no file is."""
    if error.key != "data.corpus.files":
        return error
    return ConfigError("data.corpus.name", name, f"{os.path.basename(str(error.value))} {error.allowed}")
