"""Documents, and what becomes of those that hold no text: skipped and counted, or refused.

- Empty (no byte, or only blanks) is ordinary: every Python tree has empty files, many tables empty rows.
- Bad (binary, not UTF-8, not JSON, null, not text) is not: more than 1 % of all documents refuses the corpus.
"""

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

from gsa.errors import ConfigError
from gsa.settings import nearest

logger = logging.getLogger(__name__)

MOST_BAD = 0.01  # share of all documents
HOPELESS = 10_000  # documents after which a corpus is refused if not one of them holds text
SHOWN = 5


class Document(NamedTuple):
    group: str  # never cut by a split
    text: str
    continues: bool = False  # the file of the document before


class Skipped(NamedTuple):
    """A document without text."""

    error: ConfigError  # which refuses it
    shown: str  # the same, briefly
    empty: bool  # or bad
    required: bool = False  # the request names this very file: it is refused whatever the rules say


class Tally:
    """Counts the documents of a corpus and those that were skipped."""

    def __init__(self) -> None:
        self.total, self.bad, self.empty = 0, 0, 0
        self.first_bad: ConfigError | None = None
        self.shown: list[str] = []

    def take(self, document: Document) -> None:
        self.total += not document.continues

    def skip(self, skipped: Skipped) -> None:
        """Raises ConfigError where none of the first many documents holds text: reading on would not help."""
        self.total += 1
        self.empty += skipped.empty
        self.bad += not skipped.empty
        if not skipped.empty and self.first_bad is None:
            self.first_bad = skipped.error
        if len(self.shown) < SHOWN:
            self.shown.append(skipped.shown)
        if self.bad == self.total == HOPELESS:
            self.refuse()

    def refuse(self) -> None:
        """Raises ConfigError, naming the first, where more documents are bad than may be skipped."""
        if self.first_bad is not None and self.bad > MOST_BAD * self.total:
            first = self.first_bad
            counted = f"{self.bad} of {self.total} documents are bad, and no more than {MOST_BAD:.0%} are skipped"
            raise ConfigError(first.key, first.value, f"{first.allowed}; {counted}")

    def log(self) -> None:
        """Say in one line what was skipped, if anything was."""
        count = self.bad + self.empty
        if count:
            named = ", ".join(self.shown) + (", …" if count > len(self.shown) else "")
            logger.info("skipped %d of %d documents: %s", count, self.total, named)


def row(value: object, key: str, owner: object, column: str, place: str, shown: str) -> Document | Skipped:
    """A row's text as a document of its own group.

    Args:
        value: what the text column holds.
        key, owner: the setting that names the rows' source, and its value.
        column: name of the text column.
        place: of the row in its source, as `line 3`.
        shown: the source's short name.
    """
    reason = ""
    if value is None:
        reason = f"{column} is null"
    elif not isinstance(value, str):
        reason = f"{column} holds {type(value).__name__}, not text"
    elif not value.strip():
        reason = f"{column} is empty"
    else:
        try:
            return Document(hashlib.sha256(value.encode()).hexdigest()[:16], value)
        except UnicodeEncodeError:
            reason = f"{column} holds half of a surrogate pair, which is no character"
    empty = isinstance(value, str) and not value.strip()
    return Skipped(ConfigError(key, owner, f"{place}: {reason}"), f"{shown} {place}: {reason}", empty)


def empty_file(path: Path | str, shown: str, required: bool) -> Skipped:
    return Skipped(ConfigError("data.corpus.files", str(path), "is empty"), f"{shown} is empty", True, required)


def missing_column(column: str, known: list[str], where: str) -> ConfigError:
    """Refuses a text column that is not among those of a row or a table."""
    allowed = f"must be one of {', '.join(known)}{nearest(column, known)} ({where})"
    return ConfigError("data.corpus.text_column", column, allowed)
