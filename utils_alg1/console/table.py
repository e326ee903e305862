"""Tables as people and programs read them: columns of text that line up in any script, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SPACE = "  "  # between columns


@dataclass
class Column:
    """A column of a table.

    Attributes:
        cells: a text for each row, on one line.
        rank: those with the highest are left out first where there is no room; 0 never is.
    """

    heading: str
    cells: list[str]
    rank: int = 0
    to_the_right: bool = False

    @property
    def texts(self) -> list[str]:
        return [self.heading, *self.cells]


def format_columns(columns: list[Column], width: int | None = None) -> tuple[list[str], list[str]]:
    """The table as lines, the headings first, and the headings of the columns that there is no room for.

    No line is wider than `width` columns of a terminal; None does not limit them. Where even the columns of
    rank 0, or a single one, are wider, the first is cut, and then the lines.
    """
    from rich.cells import cell_len

    columns, left_out = list(columns), []
    widths = [max(map(cell_len, column.texts)) for column in columns]

    def excess() -> int:
        return 0 if width is None else sum(widths) + len(SPACE) * (len(widths) - 1) - width

    while excess() > 0 and len(columns) > 1 and any(column.rank for column in columns):
        least = max(range(len(columns)), key=lambda i: (columns[i].rank, i))
        left_out.append(columns.pop(least).heading)
        del widths[least]
    if excess() > 0:
        widths[0] = max(1, widths[0] - excess())
    cells = [
        [padded(text, size, column.to_the_right) for text in column.texts]
        for column, size in zip(columns, widths, strict=True)
    ]
    lines = [cut(SPACE.join(row).rstrip(), width) for row in zip(*cells, strict=True)]
    return lines, left_out[::-1]


def padded(text: str, size: int, to_the_right: bool = False) -> str:
    """Text that takes `size` columns of a terminal, with spaces beside it; what is wider ends with "…"."""
    from rich.cells import cell_len, set_cell_size

    spare = size - cell_len(text)
    if spare < 0:
        return set_cell_size(text, size - 1) + "…"
    return " " * spare + text if to_the_right else text + " " * spare


def cut(line: str, width: int | None) -> str:
    """The beginning of a line, at most `width` columns of a terminal wide."""
    from rich.cells import cell_len, set_cell_size

    return line if width is None or cell_len(line) <= width else set_cell_size(line, width).rstrip()


def to_csv(names: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows by name as CSV, under a line of names; a value that is None or not there is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
