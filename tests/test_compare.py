"""compare.py: runs of every state in one table, sorted, and no wider than the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import QUIET_TRACKERS, TINY, run_process, runner
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

import compare as script
from compare import (
    FINAL_KEYS,
    HEADINGS,
    RESULTS,
    format_rows,
    mark_best,
    read_run,
    sort_rows,
)
from parameters import ModelConfig, specs
from utils_alg1.base.errors import Alg1Error
from utils_alg1.console.table import to_csv
from utils_alg1.run_directory import RunFolder, checkpoint_paths, in_use, lock_run
from utils_alg1.training.checkpoint import read_checkpoint

RECORD, METRICS, FINAL = "meta/full_config.json", "logs/metrics.jsonl", "eval/final.json"
TEXT_A, TEXT_B = "a" * 64, "b" * 64


@pytest.fixture
def compare(capsys, workdir):
    return runner(script.main, capsys)


def make_run(
    name: str, losses: dict[int, float], done: bool = True, text: str = TEXT_A, **values: Any
) -> Path:
    """Create a run directory as train.py does, with the evaluations `losses` (step -> val loss)."""
    run = Path("runs", name)
    for folder in ("meta", "logs", "eval"):
        (run / folder).mkdir(parents=True)
    parameters = {name: spec.default for name, spec in specs().items()} | {"max_iters": 400} | values
    record = {
        "parameters": parameters,
        "origins": dict.fromkeys(parameters, "default"),
        "corpus": {"path": f"data/{text[0]}.txt", "sha256": text, "characters": 9, "vocab_size": 3},
        "runtime": {},
    }
    write(run / RECORD, record)
    with (run / METRICS).open("w") as file:
        for step, loss in losses.items():
            row = {"step": step, "loss/train": max(loss - 0.1, 0), "loss/val": loss, "learning_rate": 1e-3}
            row["tokens"] = 128 * step
            speed = {"step": step, "tokens_per_second": 1000.0 + step}
            before = (
                {"step": step - 1, "loss/train_step": loss} if step else {"step": 0, "gradient_norm": 1.0}
            )
            behind = {"step": step, "loss/train_step": loss}
            for values in (row, speed, before if done else behind):
                file.write(json.dumps(values) + "\n")
    if done:
        step = max(losses)
        best_step = min(losses, key=lambda s: losses[s])
        final = {
            "run_id": name,
            "steps": step,
            "train_loss": max(losses[step] - 0.1, 0),
            "val_loss": losses[step],
            "best_val_loss": losses[best_step],
            "best_step": best_step,
            "best_perplexity": math.exp(losses[best_step]),
            "best_bits_per_character": losses[best_step] / math.log(2),
            "export_val_loss": losses[best_step],
            "tokens": 128 * step,
            "seconds_in_loop": 12.6,
            "tokens_per_second_overall": 2000.0,
        }
        write(run / FINAL, final)
    return run


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def lines_of(result) -> list[list[str]]:
    """Return the cells of each line of the table."""
    assert (result.code, result.err) == (0, "")
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in result.out.splitlines()]


# --- states -------------------------------------------------------------------------------------------


def test_a_finished_run_is_its_results(workdir):
    row = read_run(make_run("2026-01-31_001_my-try", {0: 4.0, 200: 2.0, 400: 2.5}, dropout=0.1))
    expected = {
        "run": "2026-01-31_001_my-try",
        "tag": "my-try",
        "state": "done",
        "resumed": False,
        "best": False,
        "export_val_loss": 2.0,
        "step": 400,
        "best_val_loss": 2.0,
        "best_step": 200,
        "val_loss": 2.5,
        "train_loss": 2.4,
        "best_perplexity": math.exp(2.0),
        "best_bits_per_character": 2.0 / math.log(2),
        "tokens": 51200,
        "tokens_per_second": 2000.0,
        "seconds": 12.6,
        "n_parameters": 201731,
        "text": "a.txt",
        "text_sha256": TEXT_A,
    }
    assert {name: row[name] for name in expected} == expected
    assert row["dropout"] == 0.1 and row["n_embd"] == 64
    assert row.keys() == {*RESULTS, *specs()}


def test_an_interrupted_run_is_what_its_metrics_say(workdir):
    run = make_run("2026-01-31_001", {0: 4.0, 100: 2.0, 200: 3.0}, done=False)
    with (run / METRICS).open("a") as file:
        file.write('{"step": 207, "loss/train_step": 2.9}\n{"step": 208, "loss/tr')  # killed in a write
    row = read_run(run)
    assert (row["state"], row["step"], row["tokens_per_second"]) == ("unfinished", 208, 1200.0)
    assert (row["best_val_loss"], row["best_step"], row["val_loss"], row["train_loss"]) == (
        2.0,
        100,
        3.0,
        2.9,
    )
    assert row["best_perplexity"] == math.exp(2.0) and row["seconds"] is None


def test_a_run_that_has_not_begun_is_unfinished(workdir):
    run = make_run("2026-01-31_001", {}, done=False)
    assert read_run(run)["state"] == "unfinished"
    (run / METRICS).unlink()
    row = read_run(run)
    assert (row["state"], row["step"], row["best_val_loss"]) == ("unfinished", None, None)


def test_a_run_in_use_is_running_whatever_it_holds(workdir):
    run = make_run("2026-01-31_001", {0: 4.0, 100: 2.0})
    with FileLock(run / ".lock"):
        assert read_run(run)["state"] == "running"
        (run / RECORD).unlink()
        assert read_run(run)["state"] == "running"
    assert read_run(run)["state"] == "damaged"


def test_looking_at_a_run_leaves_it_free_and_as_it_was(workdir):
    run = make_run("2026-01-31_001", {0: 4.0})
    before = sorted(run.rglob("*"))
    read_run(run)
    assert sorted(run.rglob("*")) == before
    (run / ".lock").touch()
    read_run(run)
    with FileLock(run / ".lock", timeout=0):
        pass


def test_a_resume_waits_for_somebody_who_looks(workdir, monkeypatch):
    run = make_run("2026-01-31_001", {0: 4.0})
    looking = FileLock(run / ".lock")
    looking.acquire()
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        looking.release()

    monkeypatch.setattr("filelock._api.time.sleep", sleep)
    with lock_run(run):
        assert in_use(run)
    assert len(waits) == 1 and not in_use(run)


def test_a_run_that_stays_in_use_is_refused_after_the_wait(workdir):
    run = make_run("2026-01-31_001", {0: 4.0})
    with FileLock(run / ".lock"), pytest.raises(Alg1Error, match="in use by another process"):
        lock_run(run, timeout=0.01)


def test_a_finished_run_that_went_on_and_was_interrupted_is_unfinished(workdir):
    run = make_run("2026-01-31_001", {0: 4.0, 100: 2.0})
    with (run / METRICS).open("a") as file:
        file.write('{"step": 200, "loss/train": 1.4, "loss/val": 1.5, "learning_rate": 0.001}\n')
    row = read_run(run)
    assert (row["state"], row["step"], row["best_val_loss"], row["seconds"]) == ("unfinished", 200, 1.5, None)


def test_a_resumed_run_is_shown_as_one(compare):
    run = make_run("2026-01-31_001", {0: 4.0, 100: 2.0})
    record = json.loads((run / RECORD).read_text())
    record["origins"]["n_embd"] = "resumed run"
    write(run / RECORD, record)
    assert lines_of(compare())[1][:3] == ["2026-01-31_001", "* 2.0000", "done, resumed"]


DAMAGE = {
    "no record": (RECORD, None),
    "record cut": (RECORD, b'{"parameters": {'),
    "record is a list": (RECORD, b"[]"),
    "record of lists": (RECORD, b'{"parameters": [], "origins": [], "corpus": []}'),
    "record not UTF-8": (RECORD, b"\xff\xfe"),
    "record deep": (RECORD, b'{"parameters": ' + b"[" * 100_000),
    "results empty": (FINAL, b""),
    "results of text": (FINAL, b'{"steps": "a", "val_loss": "b", "best_val_loss": "c"}'),
    "results not a number": (FINAL, b'{"steps": 400, "val_loss": NaN, "best_val_loss": NaN}'),
    "results beyond a float": (
        FINAL,
        b'{"steps": 400, "val_loss": 1, "best_val_loss": 1%s}' % (b"0" * 400),
    ),
    "results without steps": (FINAL, b'{"val_loss": 1, "best_val_loss": 1}'),
    "metrics of zeros": (METRICS, b"\0" * 100 + b"\n"),
    "metrics of negative steps": (METRICS, b'{"step": -1, "loss/train_step": 1}\n'),
    "metrics without a step": (METRICS, b'{"loss/val": 1}\n'),
    "metrics deep": (METRICS, b'{"loss/val": %s}\n' % (b"[" * 100_000 + b"]" * 100_000)),
    "metrics torn before the end": (
        METRICS,
        b'{"step": 1, "loss/tr\n{"step": 2, "loss/val": 1}\n',
    ),
    "metrics of words": (METRICS, b'{"step": 1, "loss/val": }\n'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_shown_as_one_and_never_the_best(name, compare):
    make_run("2026-01-31_001", {0: 4.0, 100: 2.0})
    broken = make_run("2026-01-31_002", {0: 4.0, 100: 1.0})
    path, data = DAMAGE[name]
    (broken / path).unlink()
    if data is not None:
        (broken / path).write_bytes(data)
    table = lines_of(compare())
    assert "* " not in table[1][1] and table[1][2] == "damaged"
    assert table[2][:3] == ["2026-01-31_001", "* 2.0000", "done"]


def test_an_empty_folder_with_the_name_of_a_run_is_damaged(compare):
    Path("runs/2026-01-31_001").mkdir(parents=True)
    Path("runs/notes").mkdir()
    assert lines_of(compare())[1:] == [["2026-01-31_001", "-", "damaged", *["-"] * 12]]


def show_in_every_form(row: dict[str, Any]) -> None:
    sound = dict.fromkeys(row) | {"run": "2026-01-31_002", "state": "done", "resumed": False, "best": False}
    rows = [dict(row), sound]
    mark_best(rows)
    for key in row:
        sort_rows(rows, key, True)
    assert max(map(cell_len, format_rows(rows))) < 400
    assert len(json.loads(json.dumps(rows))) == 2
    to_csv(row, rows)


def test_random_damage_never_ends_the_table(workdir):
    draw = random.Random(0)
    run = make_run("2026-01-31_001", {0: 4.0, 100: 2.0})
    sound = {name: (run / name).read_bytes() for name in (RECORD, METRICS, FINAL)}
    for _ in range(100):
        name = draw.choice(list(sound))
        data = bytearray(sound[name])
        if draw.random() < 0.5:
            data = data[: draw.randrange(len(data))]
        else:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (run / name).write_bytes(data)
        show_in_every_form(read_run(run))
        (run / name).write_bytes(sound[name])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NUMBERS = [
    *((RECORD, "parameters", name) for name, spec in specs().items() if spec.type in (int, float)),
    (RECORD, "corpus", "vocab_size"),
    *((FINAL, key) for key in FINAL_KEYS.values()),
    *((METRICS, i, "step") for i in range(3)),
    (METRICS, 0, "loss/train"),
    (METRICS, 0, "loss/val"),
    (METRICS, 1, "tokens_per_second"),
]
PLACES = [*NUMBERS, (RECORD,), (RECORD, "parameters"), (RECORD, "origins"), (RECORD, "corpus")]
PLACES += [(RECORD, "corpus", "path"), (RECORD, "corpus", "sha256"), (FINAL,), (METRICS, 0), (METRICS, 2)]
PLACES += [(RECORD, "parameters", name) for name, spec in specs().items() if spec.type in (str, bool)]


@pytest.fixture
def read_with(workdir):
    """Read a valid run with one evaluation and another value in one place: a file and the keys in it."""
    run = make_run("2026-01-31_001", {0: 2.0})
    texts = {name: (run / name).read_text() for name in (RECORD, METRICS, FINAL)}

    def read(place: tuple[Any, ...], value: Any) -> dict[str, Any]:
        name, *keys = place
        lines = texts[name].splitlines() if name == METRICS else [texts[name]]
        holder: Any = [[json.loads(line) for line in lines]]
        top, keys = holder, [0, *keys] if name == METRICS else [0, 0, *keys]
        for key in keys[:-1]:
            holder = holder[key]
        holder[keys[-1]] = value
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in top[0]))
        row = read_run(run)
        (run / name).write_text(texts[name])
        return row

    return read


@pytest.mark.parametrize("value", ["", "12", True, -1, -0.5, [1], {"a": 1}], ids=repr)
def test_whatever_is_no_number_where_one_stands_is_damage(read_with, value):
    for place in NUMBERS:
        row = read_with(place, value)
        assert row["state"] == "damaged", place
    show_in_every_form(row)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=JSON)
def test_any_value_in_any_place_is_survived(read_with, place, value):
    row = read_with(place, value)
    if row["state"] != "damaged":
        assert row["state"] == "done" and row["step"] >= 0
    show_in_every_form(row)


def test_a_run_that_diverged_is_sound(read_with):
    assert read_with((RECORD, "parameters", "n_embd"), 128)["n_embd"] == 128
    assert read_with((METRICS, 0, "loss/val"), math.nan)["state"] == "done"


def test_what_train_py_would_refuse_is_damage_and_not_shown(workdir):
    row = read_run(make_run("2026-01-31_001", {0: 2.0}, optimizer="lion"))
    assert (row["state"], row["optimizer"], row["best_val_loss"]) == ("damaged", None, 2.0)


def test_a_record_that_knows_fewer_parameters_is_sound(workdir):
    run = make_run("2026-01-31_001", {0: 2.0})
    record = json.loads((run / RECORD).read_text())
    del record["parameters"]["positions"]
    write(run / RECORD, record)
    assert (read_run(run)["state"], read_run(run)["positions"]) == ("done", None)


# --- the table ----------------------------------------------------------------------------------------


def test_huge_results_keep_the_table_narrow(compare):
    run = make_run("2026-01-31_001", {10: 4.0})
    final = json.loads((run / FINAL).read_text())
    final |= {"val_loss": 1e300, "export_val_loss": 123456789.5}
    final |= {"tokens_per_second_overall": 123_456_789_012, "seconds_in_loop": 1e15}
    write(run / FINAL, final)
    cells = lines_of(compare())[1]
    assert cells[1:8] == ["* 1.23e+08", "done", "10 of 400", "4.0000", "1e+300", "1e+15", "123,456,789,012"]


def test_the_table_is_aligned_and_newest_first(compare):
    make_run("2026-01-31_999_first", {0: 4.0, 400: 2.5}, n_embd=128, optimizer="muon")
    make_run("2026-01-31_1000", {0: 4.0, 400: 2.25})
    make_run("2025-12-01_001_日本語の文", {0: 4.0, 200: 3.125}, done=False)
    assert (
        compare().out
        == """\
run                        export_val_loss  state       n_embd  optimizer        step  best_val_loss  \
val_loss  seconds  tok/s  parameters  n_layer  n_head  block_size  batch_size  learning_rate
2026-01-31_1000                   * 2.2500  done            64      adamw         400         2.2500  \
  2.2500       13  2,000     201,731        4       4          32           4          0.001
2026-01-31_999_first                2.5000  done           128       muon         400         2.5000  \
  2.5000       13  2,000     796,675        4       4          32           4          0.001
2025-12-01_001_日本語の文         ~ 3.1250  unfinished      64      adamw  201 of 400         3.1250  \
  3.1250        -  1,200     201,731        4       4          32           4          0.001
* the lowest of these runs
~ not of the export: the lowest of the evaluations, which read a part of the val text
"""
    )


def test_losses_on_different_texts_are_not_compared(compare):
    make_run("2026-01-31_001", {0: 1.0})
    make_run("2026-01-31_002", {0: 2.0}, text=TEXT_B)
    make_run("2026-01-31_003", {0: 3.0}, text=TEXT_B)
    table = lines_of(compare())
    assert [row[1] for row in table[1:4]] == ["3.0000", "* 2.0000", "* 1.0000"]
    assert [row[2] for row in table[:4]] == ["text", "b.txt", "b.txt", "a.txt"]
    assert table[4] == ["* the lowest on its text"]


def test_equal_losses_are_equally_the_best_and_zero_is_a_loss(compare):
    make_run("2026-01-31_001", {0: 0.0})
    make_run("2026-01-31_002", {0: 0.0})
    assert [row[1] for row in lines_of(compare())[1:3]] == ["* 0.0000", "* 0.0000"]


def test_what_shaped_the_training_and_differs_has_a_column(compare):
    make_run("2026-01-31_001", {0: 1.0}, seed=1, eval_interval=7, run_tag="x")
    make_run("2026-01-31_002", {0: 1.0}, seed=2, eval_interval=8, run_tag="y")
    head = lines_of(compare())[0]
    assert "seed" in head and "eval_interval" not in head and "run_tag" not in head and "dropout" not in head


def order_by(compare, *flags) -> list[str]:
    return [row[0][-1] for row in lines_of(compare(*flags))[1:] if row[0][0] not in "*~"]


def test_sorting_puts_the_best_first_and_the_unknown_last(compare):
    make_run("2026-01-31_001", {0: 4.0, 400: 2.0}, learning_rate=0.3)
    make_run("2026-01-31_002", {0: 3.0}, done=False, learning_rate=0.1)
    make_run("2026-01-31_003", {}, done=False, learning_rate=0.2)
    assert order_by(compare) == ["3", "2", "1"]
    assert order_by(compare, "--reverse") == ["1", "2", "3"]
    assert order_by(compare, "--sort", "val_loss") == ["1", "2", "3"]
    assert order_by(compare, "--sort", "val_loss", "--reverse") == ["2", "1", "3"]
    assert order_by(compare, "--sort", "tokens_per_second") == ["1", "2", "3"]
    assert order_by(compare, "--sort", "learning_rate") == ["2", "3", "1"]
    assert order_by(compare, "--sort", "state") == ["1", "3", "2"]
    assert order_by(compare, "--sort", "best") == ["1", "3", "2"]


def test_a_loss_of_an_evaluation_never_beats_that_of_an_export(compare):
    make_run("2026-01-31_001", {0: 4.0, 400: 2.0})
    make_run("2026-01-31_002", {0: 4.0, 400: 2.5})
    make_run("2026-01-31_003", {0: 1.5}, done=False)
    make_run("2026-01-31_004", {0: 1.0})  # of an earlier version
    final = Path("runs/2026-01-31_004", FINAL)
    values = json.loads(final.read_text())
    del values["export_val_loss"]
    write(final, values)
    table = lines_of(compare("--sort", "export_val_loss"))
    assert [(row[0][-1], row[1]) for row in table[1:5]] == [
        ("1", "* 2.0000"),
        ("2", "2.5000"),
        ("4", "~ 1.0000"),
        ("3", "~ 1.5000"),
    ]
    assert table[5:] == [
        ["* the lowest of these runs"],
        ["~ not of the export: the lowest of the evaluations, which read a part of the val text"],
    ]
    rows = json.loads(compare("--json").out)
    assert [(row["export_val_loss"], row["best"]) for row in rows] == [
        (None, False),
        (None, False),
        (2.5, False),
        (2.0, True),
    ]


def test_runs_without_an_export_are_compared_by_their_evaluations(compare):
    make_run("2026-01-31_001", {0: 1.5}, done=False)
    make_run("2026-01-31_002", {0: 1.0}, done=False)
    assert [row[1] for row in lines_of(compare())[1:3]] == ["* ~ 1.0000", "~ 1.5000"]


def test_losses_on_different_parts_of_a_text_are_not_compared(compare):
    make_run("2026-01-31_001", {0: 1.0})
    make_run("2026-01-31_002", {0: 2.0}, val_split=0.05)
    table = lines_of(compare())
    assert [row[1] for row in table[1:3]] == ["* 2.0000", "* 1.0000"]
    assert table[3] == ["* the lowest on its val part"]


def test_what_is_sorted_by_has_a_column(compare):
    make_run("2026-01-31_001", {0: 4.0, 400: 2.0}, batch_size=8)
    make_run("2026-01-31_002", {0: 4.0, 100: 2.5}, done=False)
    assert "tokens" not in lines_of(compare())[0]
    table = lines_of(compare("--sort", "tokens"))
    assert table[0][:4] == ["run", "export_val_loss", "tokens", "state"]
    assert [row[2] for row in table[1:3]] == ["12,800", "51,200"]
    for heading in ("tok/s", "state", "n_layer"):  # which the table has anyway, further to the right
        assert lines_of(compare("--sort", heading))[0][2] == heading
        assert lines_of(compare("--sort", heading))[0].count(heading) == 1
    for heading in ("run", "export_val_loss", "best"):
        assert lines_of(compare("--sort", heading))[0][:3] == ["run", "export_val_loss", "state"]


def test_every_heading_sorts_like_the_name_of_its_value(compare):
    make_run("2026-01-31_001", {0: 4.0, 400: 2.0}, learning_rate=0.3, n_layer=2)
    make_run("2026-01-31_002", {0: 3.0, 400: 2.5}, learning_rate=0.1)
    line = compare().out.splitlines()[0]
    headings = [heading.strip() for heading in line.split("  ") if heading.strip()]
    known = {"export_val_loss", "best_val_loss", "val_loss", "tok/s", "parameters", "seconds", "run"}
    assert known <= set(headings)
    names = {heading: name for name, heading in HEADINGS.items()}
    for heading in headings:
        result = compare("--sort", heading)
        assert result.code == 0, heading
        assert result.out == compare("--sort", names.get(heading, heading)).out
    assert order_by(compare, "--sort", "best val loss") == ["1", "2"]
    assert order_by(compare, "--sort", "best val loss", "--reverse") == ["2", "1"]


def test_an_unknown_column_names_the_nearest(compare):
    make_run("2026-01-31_001", {0: 1.0})
    result = compare("--sort", "val_los")
    assert (result.code, result.out) == (2, "")
    message, hint = result.err.splitlines()
    assert message == "error: --sort val_los: no such column; did you mean val_loss?"
    assert hint.startswith("hint: run, tag, state") and hint.endswith("or any parameter of train.py")
    assert "did you mean learning_rate?" in compare("--sort", "learning-rate").err
    assert "unknown flag --sorted; did you mean --sort?" in compare("--sorted", "x").err


def test_a_tag_chooses_runs(compare):
    make_run("2026-01-31_001_search-0", {0: 1.0})
    make_run("2026-01-31_002_Search-1", {0: 2.0})
    make_run("2026-01-31_003", {0: 0.5})
    assert [row[0] for row in lines_of(compare("--tag", "search"))[1:3]] == [
        "2026-01-31_002_Search-1",
        "2026-01-31_001_search-0",
    ]
    assert "* 1.0000" in compare("--tag", "search").out  # the best of those that are shown
    result = compare("--tag", "seach")
    assert result.code == 2 and result.err == (
        "error: no run in runs has 'seach' in its tag\nhint: --tag left out lists them all\n"
    )


@pytest.mark.parametrize(
    "folder, why",
    [
        ("runs", ": no such folder"),
        ("empty", ""),
        ("file", ": no such folder"),
        ("no\0name", ": no such folder"),
    ],
)
def test_without_a_run_there_is_one_line_with_the_fix(folder, why, compare):
    Path("empty").mkdir()
    Path("file").touch()
    result = compare("--runs-dir", folder)
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        f"error: there is no run in {folder}{why}\n"
        "hint: start one: python train.py, or name another --runs-dir\n"
    )


def test_json_and_csv_hold_every_value(compare):
    make_run("2026-01-31_001_é", {0: 4.0, 400: 2.0}, dropout=0.25)
    make_run("2026-01-31_002", {}, done=False)
    rows = json.loads(compare("--json").out)
    assert [row["run"] for row in rows] == ["2026-01-31_002", "2026-01-31_001_é"]
    assert rows[1]["best"] is True and rows[1]["dropout"] == 0.25 and rows[0]["val_loss"] is None
    table = list(csv.DictReader(io.StringIO(compare("--csv").out)))
    assert [row["run"] for row in table] == ["2026-01-31_002", "2026-01-31_001_é"]
    assert (table[1]["val_loss"], table[1]["dropout"], table[0]["val_loss"]) == ("2.0", "0.25", "")
    assert list(table[0]) == list(rows[0]) == [*RESULTS, *specs()]
    assert compare("--json", "--csv").code == 2


def test_a_value_never_breaks_a_line(compare):
    run = make_run("2026-01-31_001", {0: 1.0})
    make_run("2026-01-31_002", {0: 1.0}, text=TEXT_B)
    record = json.loads((run / RECORD).read_text())
    record["corpus"]["path"] = "a\nb\x1b[31m" + "x" * 100
    write(run / RECORD, record)
    out = compare().out
    assert len(out.splitlines()) == 4 and "\x1b" not in out and "a\ufffdb\ufffd[31mxxx" in out and "…" in out


# --- terminals ----------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch):
    def of_width(columns: int) -> None:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))

    return of_width


@pytest.mark.parametrize("columns", [33, 60, 100, 132, 400])
def test_a_narrow_terminal_breaks_no_word(columns, compare, terminal):
    make_run("2026-01-31_001_a-long-tag-with-日本語-in-it", {0: 4.0, 400: 2.0}, seed=3, text=TEXT_B)
    make_run("2026-01-31_002", {0: 3.0}, done=False)
    whole = max(map(cell_len, compare().out.splitlines()))
    terminal(columns)
    out = compare().out.splitlines()
    assert max(map(cell_len, out)) <= columns
    assert out[0].startswith("run") and "export_val_loss" in out[0] and "* ~ 3.0000" in out[1]
    words = re.split(r"[\s_-]+", " ".join(out))
    assert "…" not in words and {"日本語", "long", "in", "it", "with", "001", "002"} <= set(words)
    assert any("no room for: " in line for line in out[3:]) == (columns < whole)
    if columns == 100:  # what tells the runs apart stays longer than what they share
        assert "seed" in out[0] and "text" in out[0] and "n_layer" not in out[0]
        assert "n_layer" in " ".join(out[3:])


def test_no_terminal_obeys_the_name_of_a_run(compare, terminal):
    make_run("2026-01-31_001_\x1b[2J\x9b", {0: 4.0})
    assert "2026-01-31_001_\x1b[2J\x9b" in compare("--csv").out
    terminal(80)
    assert "2026-01-31_001_␛[2J\ufffd" in compare("--csv").out
    assert "2026-01-31_001_\\u001b[2J\ufffd" in compare("--json").out
    assert "2026-01-31_001_\ufffd[2J\ufffd" in compare().out


def test_without_a_terminal_nothing_is_left_out(compare, monkeypatch):
    make_run("2026-01-31_001", {0: 4.0})
    monkeypatch.setenv("COLUMNS", "20")
    assert lines_of(compare())[0][-1] == "learning_rate"


# --- with real runs -----------------------------------------------------------------------------------


def test_runs_of_train_py_as_they_are(train, compare, text_file, monkeypatch):
    from utils_alg1.report import page as page_module

    monkeypatch.setattr("utils_alg1.report.pictures.draw_loss_curve", lambda *_: None)
    monkeypatch.setattr("utils_alg1.report.pictures.draw_attention", lambda *_: b"")
    monkeypatch.setattr(page_module, "build_page", lambda *_: "")
    assert train("--data", text_file, *TINY, *QUIET_TRACKERS, "--run-tag", "one", "--n-layer", 2).code == 0
    (first,) = json.loads(compare("--json").out)
    assert (first["state"], first["resumed"], first["tag"], first["step"]) == ("done", False, "one", 6)
    assert train("--resume", "latest", "--max-iters", 8).code == 0
    (resumed,) = json.loads(compare("--json").out)
    final = json.loads(Path("runs", resumed["run"], "eval/final.json").read_text())
    assert (resumed["state"], resumed["resumed"], resumed["step"]) == ("done", True, 8)
    assert (resumed["n_layer"], resumed["n_parameters"]) == (2, final["n_parameters"])
    for name, key in FINAL_KEYS.items():
        assert resumed[name] == final[key]
    for name in ("best_perplexity", "best_bits_per_character"):
        assert resumed[name] == final[name]

    run = Path("runs", resumed["run"])
    (run / FINAL).unlink()  # as while it was training
    unfinished = read_run(run)
    newest = read_checkpoint(checkpoint_paths(RunFolder(run).checkpoint_dir)[-1])
    assert (unfinished["state"], unfinished["n_parameters"]) == ("unfinished", final["n_parameters"])
    assert unfinished["seconds"] == newest.progress.seconds > 0
    damaged = checkpoint_paths(RunFolder(run).checkpoint_dir)[-1]
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert (read_run(run)["state"], read_run(run)["seconds"]) == ("unfinished", None)


def test_the_seconds_are_those_of_the_newest_checkpoint_and_of_no_copy(workdir):
    import torch

    from utils_alg1.network.tensor_file import write_tensors

    run = make_run("2026-01-31_001", {0: 2.0}, done=False)
    folder = RunFolder(run).checkpoint_dir
    folder.mkdir(parents=True)
    for name, seconds in {
        "step_000000003.safetensors": 3.0,
        "step_000000004.safetensors": 4.0,
        "step_000000004-copy.safetensors": 99.0,
        "step_5.safetensors": 99.0,
        "step_000000006.safetensors.aside": 99.0,
    }.items():
        write_tensors(folder / name, {"a": torch.zeros(1)}, {"progress": {"seconds": seconds}})
    assert read_run(run)["seconds"] == 4.0


@pytest.mark.parametrize(
    "options", [{}, {"n_layer": 3, "positions": "rotary"}, {"qk_norm": True, "zero_init": True, "n_head": 2}]
)
def test_the_weights_are_counted_as_the_network_has_them(options):
    from model import BigramLanguageModel

    config = ModelConfig(
        **{"n_embd": 16, "n_head": 4, "n_layer": 1, "block_size": 7, "vocab_size": 5} | options
    )
    model = BigramLanguageModel(config)
    assert config.n_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_script_as_a_process_needs_no_torch(compare):
    make_run("2026-01-31_001", {0: 4.0})
    script_text = "import sys; import compare; compare.main([]); sys.exit('torch' in sys.modules)"
    Path("check.py").write_text(script_text)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = run_process(Path("check.py").resolve(), env=environment)
    assert result.code == 0 and result.out.splitlines()[1].startswith("2026-01-31_001         * 4.0000  done")
