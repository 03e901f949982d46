"""Tables for a terminal of any width: columns that do not fit beside each other follow below, nothing is cut."""

import dataclasses
import re
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

MEASURED = 100_000  # characters: no table is wider


@dataclasses.dataclass(frozen=True)
class Column:
    """One column, with its values from the first row on."""

    header: str
    values: list[str]
    right: bool = False  # numbers are aligned to the right


def header_of(name: str) -> str:
    """A name as a header, one word a line: values decide the width."""
    return re.sub(r"(?<=\.)", "\n", name).replace("_", "\n")


def show_columns(
    console: Console, title: str, first: Sequence[Column], rest: Sequence[Column], key: Sequence[Column] | None = None
) -> None:
    """Print a table, cut into several where the console is too narrow.

    Args:
        console: where to.
        title: of the first.
        first: columns that the first begins with.
        rest: those that may follow below.
        key: columns that each of the others begins with; `None` are those of the first.
    """
    begin, left = list(first), list(rest)
    while True:
        count = next((n for n in range(len(left), 0, -1) if _fits(console, [*begin, *left[:n]])), min(len(left), 1))
        shown = [*begin, *left[:count]]
        table = _table(shown, whole=_fits(console, shown))
        table.title = title or None
        console.print(table)
        title, begin, left = "", list(first if key is None else key), left[count:]
        if not left:
            return


def _fits(console: Console, columns: Sequence[Column]) -> bool:
    anywhere = console.options.update(max_width=MEASURED)
    return Measurement.get(console, anywhere, _table(columns)).maximum <= console.width


def _table(columns: Sequence[Column], whole: bool = True) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True, title_justify="left")
    for column in columns:
        table.add_column(
            Text(column.header), justify="right" if column.right else "left", no_wrap=whole, overflow="fold"
        )
    for row in zip(*(column.values for column in columns), strict=True):
        table.add_row(*map(Text, row))
    return table
