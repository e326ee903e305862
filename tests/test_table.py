"""Tables as lines no wider than a terminal, and as CSV."""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from utils_alg1.console.table import format_table, to_csv

HEADINGS = ["run", "loss", "state", "seed"]
ROWS = [["日本語", "1.5", "[red]done", "1"], ["b", "10.25", "-\x1b[2J\n", "2"]]


def test_columns_line_up_in_any_script_and_what_is_not_printable_does_no_harm():
    assert format_table(HEADINGS, ROWS, right=["loss", "seed"]) == [
        "run      loss  state      seed",
        "日本語    1.5  [red]done     1",
        "b       10.25  -\ufffd[2J\ufffd        2",
    ]


@pytest.mark.parametrize(
    "width, head, end",
    [
        (30, "run      loss  state      seed", []),
        (29, "run      loss  state", ["no room for: seed"]),
        (23, "run      loss", ["no room for: state,", "seed"]),
    ],
)
def test_the_last_columns_are_left_out_first(width, head, end):
    lines = format_table(HEADINGS, ROWS, width, right=["loss", "seed"])
    assert (lines[0], lines[3:]) == (head, end)
    assert max(map(cell_len, lines)) <= width


def test_the_first_column_is_folded_behind_its_words_where_it_has_no_room():
    rows = [["2026-11-26_001_a-tag", "1.5"], ["日本語_の", "2"]]
    assert format_table(["run", "loss"], rows, 18, right=["loss"]) == [
        "run          loss",
        "2026-11-26_   1.5",
        "001_a-tag",
        "日本語_の       2",
    ]
    narrow = format_table(["run", "loss"], rows, 8, right=["loss"])  # less than any of its words
    assert max(map(cell_len, narrow)) <= 8
    assert "".join(line[:2].strip() for line in narrow).startswith("run2026-11-26_001_a-tag")


def test_csv_quotes_what_it_must_and_leaves_out_what_is_not_known():
    rows = [{"a": 'say "x", 日本', "b": None}, {"b": 0.5}]
    assert to_csv(["a", "b"], rows) == 'a,b\n"say ""x"", 日本",\n,0.5\n'
