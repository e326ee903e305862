"""Tables as lines no wider than a terminal, and as CSV."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from utils_alg1.console.table import Column, format_columns, pad, to_csv, truncate


def columns() -> list[Column]:
    return [
        Column("run", ["日本語", "b"]),
        Column("loss", ["1.5", "10.25"], 0, align_right=True),
        Column("state", ["done", "-"], 1),
        Column("seed", ["1", "2"], 2, align_right=True),
        Column("size", ["64", "128"], 2, align_right=True),
    ]


def test_columns_line_up_in_any_script_and_words_stand_left_and_figures_right():
    assert format_columns(columns()) == (
        [
            "run      loss  state  seed  size",
            "日本語    1.5  done      1    64",
            "b       10.25  -         2   128",
        ],
        [],
    )


@pytest.mark.parametrize(
    "width, head, left_out",
    [
        (32, "run      loss  state  seed  size", []),
        (31, "run      loss  state  seed", ["size"]),
        (25, "run      loss  state", ["seed", "size"]),
        (19, "run      loss", ["state", "seed", "size"]),
        (13, "run      loss", ["state", "seed", "size"]),
        (12, "run     loss", ["state", "seed", "size"]),
        (9, "r…   loss", ["state", "seed", "size"]),
        (3, "…", ["state", "seed", "size"]),
    ],
)
def test_the_least_important_are_left_out_first_and_then_the_first_is_cut(width, head, left_out):
    lines, missing = format_columns(columns(), width)
    assert (lines[0], missing) == (head, left_out)
    assert len(lines) == 3 and max(map(cell_len, lines)) <= width


def test_a_wide_letter_is_never_cut_in_half():
    assert pad("日本語", 6) == "日本語"
    assert pad("日本語", 5) == "日本…"
    assert pad("日本語", 4) == "日 …"
    assert pad("日本語", 8, align_right=True) == "  日本語"
    assert truncate("日本語", 6) == truncate("日本語", None) == "日本語"
    assert truncate("日本語", 5) == "日本"


texts = st.text(st.characters(blacklist_categories=("C", "Z", "M")), max_size=8)


@given(st.lists(st.tuples(texts, texts, st.integers(0, 2), st.booleans()), min_size=1), st.integers(1, 60))
def test_no_line_is_wider_than_the_terminal(drawn, width):
    lines, left_out = format_columns(
        [Column(head, [cell], rank, side) for head, cell, rank, side in drawn], width
    )
    assert len(lines) == 2 and max(map(cell_len, lines)) <= width
    assert len(left_out) <= sum(rank > 0 for _, _, rank, _ in drawn)


def test_csv_quotes_what_it_must_and_leaves_out_what_is_not_known():
    rows = [{"a": 'say "x", 日本', "b": None}, {"b": 0.5}]
    assert to_csv(["a", "b"], rows) == 'a,b\n"say ""x"", 日本",\n,0.5\n'
