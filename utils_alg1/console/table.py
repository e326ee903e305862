"""Tables: text columns aligned by display width, also for wide characters, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

COLUMN_GAP = "  "


@dataclass
class Column:
    """A column of a table.

    Attributes:
        heading: the text above the cells.
        cells: one single-line text per row.
        rank: the columns of the highest rank are dropped first if the table is too wide; rank 0 is kept.
        align_right: whether the cells are aligned to the right.
    """

    heading: str
    cells: list[str]
    rank: int = 0
    align_right: bool = False

    @property
    def texts(self) -> list[str]:
        return [self.heading, *self.cells]


def format_columns(columns: list[Column], width: int | None = None) -> tuple[list[str], list[str]]:
    """Format a table, dropping columns that do not fit.

    If the columns of rank 0 alone are too wide, the first column is truncated, and then the lines.

    Args:
        columns: the columns from left to right.
        width: the maximum width of a line in terminal columns; None is unlimited.

    Returns:
        The lines, headings first, and the headings of the dropped columns.
    """
    from rich.cells import cell_len

    columns, dropped = list(columns), []
    widths = [max(map(cell_len, column.texts)) for column in columns]

    def excess() -> int:
        return 0 if width is None else sum(widths) + len(COLUMN_GAP) * (len(widths) - 1) - width

    while excess() > 0 and len(columns) > 1 and any(column.rank for column in columns):
        index = max(range(len(columns)), key=lambda i: (columns[i].rank, i))
        dropped.append(columns.pop(index).heading)
        del widths[index]
    if excess() > 0:
        widths[0] = max(1, widths[0] - excess())
    cells = [
        [pad(text, size, column.align_right) for text in column.texts]
        for column, size in zip(columns, widths, strict=True)
    ]
    lines = [truncate(COLUMN_GAP.join(row).rstrip(), width) for row in zip(*cells, strict=True)]
    return lines, dropped[::-1]


def pad(text: str, size: int, align_right: bool = False) -> str:
    """Pad text with spaces to `size` terminal columns; wider text is truncated and ends with "…"."""
    from rich.cells import cell_len, set_cell_size

    padding = size - cell_len(text)
    if padding < 0:
        return set_cell_size(text, size - 1) + "…"
    return " " * padding + text if align_right else text + " " * padding


def truncate(line: str, width: int | None) -> str:
    """Truncate a line to `width` terminal columns; None leaves it unchanged."""
    from rich.cells import cell_len, set_cell_size

    return line if width is None or cell_len(line) <= width else set_cell_size(line, width).rstrip()


def to_csv(names: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Format rows as CSV with a header line of names; None and missing values are empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
