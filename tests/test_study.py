"""The file of a study: damaged in places, held by another program, on a file system without locks."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="searching is optional: pip install -e '.[search]'")

import optuna
from faults import without_locks
from test_search import RATES, counted, fake_train, open_study, results, search, trials_of, write_space

from utils_alg1.console.command_line import Options
from utils_alg1.search import salvage
from utils_alg1.search import storage as storage_module
from utils_alg1.search.results import write_results
from utils_alg1.search.space import Plan, make_plan, read_space
from utils_alg1.utils_output import Console

NO_IMPORTANCE = "importance.png is left out: too few trials with different losses, "
__all__ = ["fake_train", "search"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
    pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning"),
]
FILE = Path("searches/space/study.db")
HELD = (
    "error: searches/space/study.db is held by another program\n"
    "hint: end it, or let it continue: a search that was stopped with Ctrl-Z holds it too\n"
)


@pytest.fixture
def flags(search, fake_train) -> list[object]:
    """The flags of a search that has done two trials."""
    flags = ["--space", write_space(learning_rate=RATES), "--no-prune", "--trials"]
    assert search(*flags, 2).code == 0
    return flags


def write_row(statement: str) -> None:
    with contextlib.closing(sqlite3.connect(FILE)) as file:
        assert file.execute(statement).rowcount == 1
        file.commit()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE trial_user_attributes SET value_json = '{garbled' WHERE trial_id = 1 AND key = 'run'",
        "UPDATE trial_params SET distribution_json = '' WHERE trial_id = 1",
        "UPDATE trials SET state = 'COMPLETED' WHERE trial_id = 1",
        "DELETE FROM trial_values WHERE trial_id = 1",
    ],
)
def test_a_garbled_row_costs_its_trial_only(search, flags, statement):
    _, kept = trials_of()
    write_row(statement)
    damaged = FILE.read_bytes()
    result = search(*flags, 3)
    assert result.code == 0, result.err
    assert result.err == (
        "warning: searches/space/study.db was damaged: trial 0 could not be read and is replaced;"
        " the damaged file is searches/space/study.db.damaged\n"
    )
    assert Path("searches/space/study.db.damaged").read_bytes() == damaged
    lost, same, *new = trials_of()
    assert (lost.state.name, [trial.state.name for trial in new]) == ("FAIL", ["COMPLETE"] * 2)
    for name in ("number", "value", "params", "user_attrs", "intermediate_values", "datetime_complete"):
        assert getattr(same, name) == getattr(kept, name)
    assert [row["trial"] for row in results()] == ["1", "2", "3"]
    assert sorted(os.listdir("searches/space")) == sorted(
        [".lock", "best.yaml", "results.csv", "search.log", "study.db", "study.db.damaged", "trials"]
    )
    assert search(*flags, 3).err == ""


def test_garbled_settings_of_a_study_are_taken_to_be_those_of_now(search, flags):
    before = [(trial.number, trial.value) for trial in trials_of()]
    write_row("UPDATE study_user_attributes SET value_json = '{' WHERE key = 'plan'")
    result = search(*flags, 2)
    assert result.code == 0, result.err
    assert result.err.endswith(
        "warning: the settings that the study began with are lost: they are taken to be those of now\n"
    )
    assert [(trial.number, trial.value) for trial in trials_of()] == before
    assert "beta2: 0.999 -> 0.5" in search(*flags, 2, "--beta2", 0.5).err


def test_an_interrupted_trial_of_a_damaged_study_is_resumed(search, flags):
    study = optuna.load_study(study_name="space", storage=f"sqlite:///{FILE}")
    begun = study.ask()
    begun.suggest_float("learning_rate", RATES["low"], RATES["high"], log=True)
    begun.set_user_attr("run", results()[1]["run"])
    write_row("UPDATE trials SET state = 'COMPLETED' WHERE trial_id = 1")
    assert search(*flags, 2).code == 0
    assert [trial.number for trial in counted()] == [1, 2]
    assert counted()[1].value == 0.125  # that of the fake train.py when it resumes


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-4096], "database disk image is malformed"),
        (lambda data: b"another" + data[7:], "file is not a database"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_said_and_kept(search, flags, damage, reason):
    damaged = damage(FILE.read_bytes())
    FILE.write_bytes(damaged)
    result = search(*flags, 3)
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        f"error: searches/space/study.db is damaged: (sqlite3.DatabaseError) {reason}\n"
        "hint: put a copy of it back, or move it away to search anew; the runs stay\n"
    )
    assert FILE.read_bytes() == damaged


LOST = {
    "emptied": lambda: FILE.write_bytes(b""),
    "without its tables": lambda: write_script("DROP TABLE studies; DROP TABLE trials;"),
    "without its study": lambda: write_script("DELETE FROM studies"),
}


def write_script(statements: str) -> None:
    with contextlib.closing(sqlite3.connect(FILE)) as file:
        file.executescript(statements)


@pytest.mark.parametrize("loss", LOST)
def test_a_file_that_has_lost_its_study_is_said(search, flags, loss):
    LOST[loss]()
    for _ in range(2):
        result = search(*flags, 3)
        assert (result.code, result.out) == (2, "")
        assert result.err == (
            "error: searches/space/study.db is damaged: it has trials, and no study space\n"
            "hint: put a copy of it back, or move it away to search anew; the runs stay\n"
        )
    FILE.rename("away.db")
    shutil.rmtree("runs")
    assert search(*flags, 1).code == 0


def test_trials_without_a_study_are_said_even_if_nothing_else_is_left(search, flags):
    shutil.rmtree("searches/space/trials")
    write_script("DELETE FROM studies")
    result = search(*flags, 3)
    assert result.code == 2 and "it has trials, and no study space\n" in result.err


def test_only_the_trials_of_the_study_are_repaired(search, flags):
    other = optuna.create_study(study_name="other", storage=f"sqlite:///{FILE}")
    other.add_trial(optuna.trial.create_trial(value=7.0))
    assert search(*flags, 3).code == 0
    write_row("DELETE FROM trial_values WHERE trial_id = 4")  # of trial 2, behind that of the other study
    result = search(*flags, 3)
    assert result.code == 0 and "was damaged: trial 2 could not be read and is replaced;" in result.err
    assert [trial.number for trial in counted()] == [0, 1, 3]
    assert 7.0 not in [trial.value for trial in counted()]


@pytest.mark.parametrize("call", ["copyfile", "replace"])
def test_a_kill_while_a_file_is_replaced_leaves_a_study(search, flags, monkeypatch, call):
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    write_row("DELETE FROM trial_values WHERE trial_id = 1")
    damaged = FILE.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(salvage.shutil if call == "copyfile" else salvage.os, call, killed)
        search(*flags, 3)
    assert FILE.read_bytes() == damaged
    assert search(*flags, 3).code == 0 and len(counted()) == 3


def held() -> sqlite3.Connection:
    other = sqlite3.connect(FILE, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    return other


def test_a_study_that_another_program_holds_is_said(search, flags, monkeypatch):
    monkeypatch.setattr(storage_module, "BUSY_SECONDS", 0.1)
    with contextlib.closing(held()):
        result = search(*flags, 3)
    assert (result.code, result.out, result.err) == (2, "", HELD)
    assert search(*flags, 3).code == 0 and len(results()) == 3


def test_a_study_that_another_program_takes_meanwhile_is_said(search, flags, monkeypatch):
    monkeypatch.setattr(storage_module, "BUSY_SECONDS", 0.1)
    others: list[sqlite3.Connection] = []
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "check_again", lambda _: others.append(held()))  # as a trial begins
        result = search(*flags, 3)
    (other,) = others
    other.close()
    assert (result.code, result.err) == (2, HELD)
    monkeypatch.setattr(storage_module, "GRACE_SECONDS", 1)
    assert search(*flags, 3).code == 0 and len(results()) == 3


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_search_where_no_file_can_be_locked_says_so(search, fake_train, monkeypatch, number):
    without_locks(number, monkeypatch.setattr)
    result = search("--space", write_space(learning_rate=RATES), "--trials", 1)
    assert (result.code, result.out) == (4, "")
    assert result.err == (
        f"error: cannot lock searches/space: its file system has no locks ({os.strerror(number)})\n"
        "hint: start it in a folder of another file system, such as a local disk, or name a --storage there\n"
    )
    assert not Path("searches").exists()


@pytest.mark.parametrize(
    ("losses", "left_out"),
    [
        ([2.5], "1 for 2 parameters"),
        ([2.5, 2.5, 2.5, 2.5], "1 for 2 parameters"),
        ([2.5, 2.25], "2 for 2 parameters"),
        ([2.5, 2.25, 2.0], None),
    ],
)
def test_a_picture_of_importance_that_would_be_false_is_left_out(text_file, capsys, losses, left_out):
    Path("config.json").write_text('{"data_path": "text.txt"}')
    study = open_study("space", learning_rate=RATES, n_layer=[2, 4])
    plan = make_plan(read_space("space.yaml", False), Options())
    for i, loss in enumerate(losses):
        values = {"learning_rate": 0.001 * (i + 1), "n_layer": 2}
        study.add_trial(optuna.trial.create_trial(params=values, distributions=plan.space, value=loss))
    folder = Path("searches/space")
    (folder / "importance.png").write_text("that of an earlier start")
    write_results(study, plan, folder, Console())
    out = capsys.readouterr().out
    files = ["results.csv", "history.png", "importance.png", "slice.png"]
    if left_out:
        assert f"{NO_IMPORTANCE}{left_out}\n" in out
        files.remove("importance.png")
    else:
        assert NO_IMPORTANCE not in out
        assert (folder / "importance.png").read_bytes().startswith(b"\x89PNG")
    assert f" searches/space: {', '.join(files)}\n" in out
    assert set(files) <= set(os.listdir(folder)) <= {*files, "best.yaml", "study.db", "trials"}


def test_runs_that_were_deleted_are_marked(search, flags):
    shutil.rmtree(results()[0]["run"])
    result = search(*flags, 2)
    assert result.code == 0
    runs = [line.split("runs/")[1] for line in result.out.splitlines() if "complete  " in line]
    assert sorted(runs) == ["2026-01-01_001_space-0 (gone)", "2026-01-01_002_space-1"]
    assert "\n(gone): this run was deleted, moved or renamed; the study has its loss\n" in result.out
    assert search(*flags, 3).code == 0 and len(results()) == 3
