"""Tables of plain lines, drawn by Rich, and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any


def format_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    width: int | None = None,
    right: Collection[str] = (),
) -> list[str]:
    """Format a table as lines, headings first.

    Args:
        headings: of the columns, the most important first.
        rows: the cells. What is not printable in them, a line end too, becomes U+FFFD.
        width: in terminal columns; None is unlimited. From a wider table columns are left out from the right,
            and named in lines at the end; the first two stay, and the first is folded if they are too wide.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table

    cells = [["".join(c if c.isprintable() else "\ufffd" for c in cell) for cell in row] for row in rows]
    sizes = [max(map(cell_len, column)) for column in zip(headings, *cells, strict=True)]
    ends = [sum(sizes[:n]) + 2 * (n - 1) for n in range(1, len(sizes) + 1)]  # two spaces between columns
    width = width or ends[-1]
    shown = max(sum(end <= width for end in ends), min(2, len(ends)))
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None, markup=False, emoji=False)
    table = Table(box=None, pad_edge=False)
    for heading in headings[:shown]:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    first_width = max(1, width - (ends[shown - 1] - sizes[0]))
    table.columns[0].max_width = first_width
    for row in cells:
        table.add_row(fold(row[0], first_width), *row[1:shown])
    console.print(table)
    if shown < len(headings):
        console.print(f"no room for: {', '.join(headings[shown:])}")
    return [line.rstrip() for line in text.getvalue().splitlines()]


def fold(name: str, width: int) -> str:
    """Break a name behind its hyphens and underscores, into lines of so many terminal columns if possible."""
    from rich.cells import cell_len

    lines = [""]
    for piece in re.findall("[^_-]*[_-]?", name):
        if lines[-1] and cell_len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def to_csv(names: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Format rows as CSV with a header line of names; None and missing values are empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
