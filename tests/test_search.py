"""search.py: the space file, the samplers, and searches that are pruned, refused, killed and continued."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, QUIET_TRACKERS, TEXT, TINY, Result, printed_config, runner

pytest.importorskip("optuna", reason="searching is optional: pip install -e '.[search]'")

import optuna

from utils_alg1.base.errors import Alg1Error
from utils_alg1.console.command_line import Options
from utils_alg1.run_directory import list_runs
from utils_alg1.search import report as report_module
from utils_alg1.search import space as space_module
from utils_alg1.search import study as study_module
from utils_alg1.search import trials as trials_module
from utils_alg1.search.space import Choices, Range, read_space
from utils_alg1.search.study import Settings
from utils_alg1.tracking.metrics_file import new_metrics, read_metrics
from utils_alg1.utils_run_manager import create_run

LISTS = "hint: python search.py --help lists every flag\n"
SPACE = f"hint: {space_module.SPACE_HINT}\n"
SPACE_PATH = f"hint: {space_module.PATH_HINT}\n"

# Stands in for train.py where a test is about the search: its loss is |learning_rate - 0.01|.
FAKE_TRAIN = f"""
import json, sys, time
from pathlib import Path
sys.path.insert(0, {str(PROJECT)!r})
from utils_alg1.console.command_line import parse_command_line
from utils_alg1.utils_config_loader import ConfigLoader
from utils_alg1.utils_run_manager import create_run, lock_run

options = parse_command_line()
if options.resume:
    run, loss = lock_run(Path(options.resume)), 0.125
else:
    values = ConfigLoader(options).resolve().flat()
    loss = abs(values["learning_rate"] - 0.01)
    if values["dropout"] == 0.5:
        print("training")
        print("error: out of memory" if values["seed"] == 1 else "error: step %d: no" % values["batch_size"])
        sys.exit(3)
    run = create_run(values["runs_dir"], values["run_tag"])
    (run.path / "artifacts/checkpoints/step_000000000.safetensors").touch()
    with (run.path / "logs/metrics.jsonl").open("w") as file:
        for step in range(0, values["max_iters"] + 1, values["eval_interval"]):
            row = {{"step": step, "loss/train": loss, "loss/val": loss + 1 / (step + 1)}}
            print(json.dumps(row), file=file, flush=True)
            time.sleep(values["weight_decay"])
(run.path / "eval/final.json").write_text(json.dumps({{"best_val_loss": loss}}))
"""

RUN_SEARCH = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(PROJECT)!r})
import search
from utils_alg1.search import trials as trials_module
from utils_alg1.console.script import run_script
trials_module.TRAIN_SCRIPT = Path("fake_train.py").absolute()
run_script(search.main)
"""


@pytest.fixture
def search(capsys) -> Callable[..., Result]:
    """search.py in this process; its trials are processes."""
    import search as script

    return runner(script.main, capsys)


@pytest.fixture
def fake_train(workdir, monkeypatch) -> Path:
    """Replaces train.py by a script that takes a moment, for tests of the search alone."""
    path = workdir / "fake_train.py"
    path.write_text(FAKE_TRAIN)
    (workdir / "run_search.py").write_text(RUN_SEARCH)
    monkeypatch.setattr(trials_module, "TRAIN_SCRIPT", path)
    monkeypatch.setattr(trials_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(report_module, "draw_pictures", lambda *_: None)
    return path


def write_space(**domains: Any) -> Path:
    """Write space.yaml; JSON is valid YAML."""
    path = Path("space.yaml")
    path.write_text(json.dumps(domains))
    return path


def settings(name: str, trials: int = 20, sampler: str = "tpe", seed: int = 0) -> Settings:
    """Return the settings with which search.py would run a search in the working folder."""
    return Settings(name, Path("searches", name), None, trials, sampler, seed, prune=True)


def results(name: str = "space") -> list[dict[str, str]]:
    with Path("searches", name, "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def study_of(name: str = "space", folder: Path = Path()) -> optuna.Study:
    storage = study_module.open_storage(str(folder / "searches" / name / "journal.log"))
    return optuna.load_study(study_name=name, storage=storage)


# --- checks before the first trial --------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "nothing.txt"], "nothing.txt: no such text file"),
        (["--data", "short.txt"], "short.txt: 6 characters are too few for block_size = 32"),
        (["--device", "cuda:77"], "--device cuda:77: this machine has no such device"),
    ],
)
def test_text_and_device_are_checked_before_anything_is_created(flags, message, search, workdir):
    Path("short.txt").write_text("abcdef")
    write_space(n_layer=[1, 2])
    result = search("--space", "space.yaml", *flags)
    assert result.code == 2
    assert result.err.startswith(f"error: {message}")


# --- the space file -----------------------------------------------------------------------------------

SPACE_MISTAKES = [
    ("learning_rat: [1]", "unknown name 'learning_rat'; did you mean learning_rate?"),
    ("7: [1]", "unknown name 7"),
    ("n_layer: 4", "n_layer = 4 must be a list of choices, or low and high"),
    ("n_layer: []", "n_layer has no choices"),
    ("n_layer: [1, two]", "n_layer = 'two' must be a whole number"),
    ("n_layer: [1, 0]", "n_layer = 0 must be above 0"),
    ("n_layer: [1, 1.0]", "n_layer: 1 stands there twice"),
    ("lr_schedule: [cosin]", "lr_schedule = 'cosin' must be one of constant, cosine, linear, step, wsd"),
    ("vocab_size: [null]", "vocab_size = null must have a value"),
    ("dropout: {low: 0, high: 1}", "dropout = 1 must be below 1"),
    ("dropout: {low: 0.2, high: 0.1}", "dropout: low = 0.2 must be below high = 0.1"),
    ("dropout: {low: 0.1, high: 0.1}", "dropout: low = 0.1 must be below high = 0.1"),
    ("dropout: {low: 0.1}", "dropout: high is missing"),
    ("dropout: {low: 0, high: 0.5, log: true}", "dropout: low = 0.0 must be above 0 on a log scale"),
    ("dropout: {low: 0, high: 0.5, stp: 0.1}", "dropout: unknown key 'stp'; did you mean step?"),
    ("dropout: {low: 0, high: 0.5, step: 0}", "dropout: step = 0 must be a number above 0"),
    ("n_layer: {low: 1, high: 4, step: 0.5}", "n_layer: step = 0.5 must be a whole number above 0"),
    ("n_layer: {low: 1, high: 4, log: 1}", "n_layer: log = 1 must be true or false"),
    (
        "n_layer: {low: 1, high: 4, log: true, step: 1}",
        "n_layer: a log scale has no steps; leave step or log out",
    ),
    ("lr_schedule: {low: 1, high: 2}", "lr_schedule is no number; give a list of choices"),
    ("run_tag: [a, b]", "run_tag says where a run is kept; it cannot be searched"),
    ("seed: [1, 2]", "seed changes how the loss is measured; losses could not be compared"),
    ("n_head: {low: 1, high: 3, step: 5}", "n_head: step = 5 is wider than the range"),
    ("eval_iters: [1, 2]", "eval_iters changes how the loss is measured; losses could not be compared"),
    ("# nothing", "names no parameter to search"),
]


@pytest.mark.parametrize(("text", "complaint"), SPACE_MISTAKES, ids=[text for text, _ in SPACE_MISTAKES])
def test_a_mistake_in_the_space_is_named(search, workdir, text, complaint):
    Path("my.yaml").write_text(text)
    result = search("--space", "my.yaml")
    assert result.code == 2
    assert result.err == f"error: my.yaml: {complaint}\nhint: {space_module.SPACE_HINT}\n"
    assert os.listdir() == ["my.yaml"]


def test_all_mistakes_in_the_space_are_told_at_once(workdir):
    Path("my.yaml").write_text("n_layer: [0, x]\ndropout: {low: -1, high: 2, step: no}\n")
    with pytest.raises(Alg1Error) as error:
        read_space("my.yaml", for_grid=False)
    assert error.value.message.splitlines() == [
        "5 problems:",
        "  - my.yaml: n_layer = 0 must be above 0",
        "  - my.yaml: n_layer = 'x' must be a whole number",
        "  - my.yaml: dropout = -1 must be at least 0",
        "  - my.yaml: dropout = 2 must be below 1",
        "  - my.yaml: dropout: step = false must be a number above 0",
    ]


def test_a_grid_needs_steps_and_an_end(workdir):
    path = write_space(dropout={"low": 0, "high": 0.5})
    with pytest.raises(Alg1Error, match="dropout: a grid needs a list of choices, or a range with a step"):
        read_space(path, for_grid=True)
    path = write_space(warmup_iters={"low": 0, "high": 100_000, "step": 1})
    with pytest.raises(Alg1Error, match=r"the grid has more than 100,000 points"):
        read_space(path, for_grid=True)


def test_a_space_is_read_as_the_parameters_types(workdir):
    Path("my.yaml").write_text(
        "learning_rate: {low: 1e-4, high: 1e-2, log: true}\n"  # YAML reads 1e-4 as text
        "n_layer: {low: 1, high: 6, step: 2}\ncompile: [on, off]\nn_head: [2, 4.0]\n"
        "dropout: {low: 0, high: 0.35, step: 0.1}\n"
    )
    assert read_space("my.yaml", for_grid=False) == {
        "learning_rate": Range(1e-4, 1e-2, None, True),
        "n_layer": Range(1, 5, 2),
        "compile": Choices(("on", "off")),
        "n_head": Choices((2, 4)),
        "dropout": Range(0.0, 0.3, 0.1),
    }


def test_the_steps_of_a_range():
    domain = Range(0.0, 0.3, 0.1)
    assert domain.grid() == [0.0, 0.1, 0.2, 0.3]
    assert [domain.contains(value) for value in (-0.1, 0.0, 0.15, 0.3, 0.4)] == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert Range(1, 5, 2).grid() == [1, 3, 5] and Range(1, 5).contains(4)


def test_the_shipped_space_holds_the_defaults():
    space = read_space(PROJECT / "configs/search.yaml", for_grid=False)
    plan = space_module.make_plan(space, Options())
    assert plan.defaults is not None and plan.defaults.keys() == space.keys()


# --- the command line ---------------------------------------------------------------------------------

SEARCH_MISTAKES = [
    ("--trials 0", "--trials: 0 must be at least 1", LISTS),
    ("--study a/b", "--study 'a/b': must be a name of letters, digits, - _ and . within, at most 40", LISTS),
    ("--sampler-seed -1", "--sampler-seed: -1 must be at least 0", LISTS),
    ("--worker 2", "unknown flag --worker; did you mean --workers?", None),
    ("--space no.yaml", "no.yaml: no such file", SPACE_PATH),
    ("--space text.txt", "text.txt: line 1, column 2: not JSON", SPACE_PATH),
    (
        "--space bad.yaml",
        "4 problems:\n  - bad.yaml: unknown name 'position'; did you mean positions?",
        SPACE,
    ),
    ("--space=", "--space: must not be empty", LISTS),
    ("--sampler grdi", "--sampler: invalid choice: 'grdi' (choose from ", LISTS),
    ("text.txt", "belongs to no flag: 'text.txt'", None),
    ("--resume latest", "unknown flag --resume", LISTS),
    ("--positions lerned", "positions = 'lerned' must be one of learned, rotary", None),
    (
        "--positions rotary --n-embd 6 --n-head 2",
        "positions = rotary rotates pairs, but a head of n_embd / n_head = 3 is odd",
        None,
    ),
    ("--n-layer 3", "n_layer is fixed by --n-layer and searched in the space file", None),
    ("--run-tag x", "--run-tag cannot be given: the search names its runs itself", None),
    ("--n-embd 0", "n_embd = 0 must be above 0 (n_embd from --n-embd)", None),
    ("--config no/", "--config no: no such file or folder", None),
    (
        "--sampler grid",
        "space.yaml: learning_rate: a grid needs a list of choices, or a range with a step",
        None,
    ),
    ("--storage text.txt", "--storage text.txt: not the journal", f"hint: {study_module.STORAGE_HINT}\n"),
]


@pytest.mark.parametrize(("flags", "complaint", "hint"), SEARCH_MISTAKES, ids=[m[0] for m in SEARCH_MISTAKES])
def test_a_mistake_on_the_command_line_is_named(search, text_file, flags, complaint, hint):
    Path("bad.yaml").write_text("position: [rotary]\nqk_norm: {low: 0, high: 1}\nzero_init: [1, maybe]\n")
    write_space(n_layer=[1, 2], learning_rate={"low": 1e-3, "high": 1e-2})
    result = search("--space", "space.yaml", *flags.split())
    assert result.code == 2
    assert result.err.startswith(f"error: {complaint}")
    assert "Traceback" not in result.err
    if hint is not None:
        assert result.err.endswith(f"\n{hint}") and result.err.count("hint: ") == 1


def test_without_optuna_there_is_one_line(search, workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = search()
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "error: search.py needs Optuna, which is not installed\nhint: pip install -e '.[search]'\n"
    )


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [("aim", False, "--no-aim"), ("aim", True, "--aim"), ("data_path", "-a b", "--data=-a b")],
)
def test_a_parameter_as_a_word(name, value, word):
    assert trials_module.to_flag(name, value) == word


# --- metrics and journal ------------------------------------------------------------------------------


def test_new_metrics_come_in_whole_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert new_metrics(path, 0) == ([], 0)
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert new_metrics(path, 0) == ([{"step": 0}, {"step": 1}], 24)
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 22}\n')
    assert new_metrics(path, 24) == ([{"step": 22}], 37)
    assert new_metrics(path, 37) == ([], 37)
    path.write_text('{"step": 0}\n')  # cut back by a resume
    assert new_metrics(path, 37) == ([{"step": 0}], 12)


def test_a_half_line_of_a_killed_process_is_dropped(tmp_path):
    path = tmp_path / "journal.log"
    optuna.create_study(study_name="s", storage=study_module.open_storage(str(path)))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"wor')
    study = optuna.load_study(study_name="s", storage=study_module.open_storage(str(path)))
    study.ask()
    assert path.read_bytes().startswith(whole + b'{"')
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert len(optuna.load_study(study_name="s", storage=study_module.open_storage(str(path))).trials) == 1


# --- searches with a fake train.py --------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "n"), [("tpe", 12), ("random", 6)])  # TPE begins with ten random ones
def test_a_sampler_finds_something_better_than_the_defaults(search, fake_train, sampler, n):
    space = write_space(learning_rate={"low": 1e-4, "high": 1e-1, "log": True}, n_layer=[2, 4])
    flags = ["--space", space, "--sampler", sampler, "--trials", n, "--workers", 3]
    result = search(*flags)
    assert result.code == 0, result.err
    rows = results()
    assert [row["trial"] for row in rows] == [str(i) for i in range(n)]
    assert (float(rows[0]["learning_rate"]), rows[0]["n_layer"]) == (1e-3, "4")
    losses = [float(row["best_val_loss"]) for row in rows if row["state"] == "complete"]
    assert losses[0] == pytest.approx(0.009) and min(losses) < 0.009
    assert len({row["learning_rate"] for row in rows}) == n
    assert f"gained    {losses[0] - min(losses):.4f}\n" in result.out
    assert result.out.rstrip().endswith("next      python train.py --config searches/space/best")
    again = search(*flags)
    assert f"trials  {n}, {n} of them finished\n" in again.out and results() == rows


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_draws_the_same_values(workdir, sampler):
    space = write_space(learning_rate={"low": 1e-4, "high": 1e-1})
    plan = space_module.make_plan(read_space(space, for_grid=False), Options())

    def draw(name: str, seed: int) -> list[float]:
        sampled = []
        for _ in range(4):  # each time as another process would
            study = study_module.Study(plan, settings(name, sampler=sampler, seed=seed))
            claimed = study.claim_trial()
            sampled.append(claimed.parameters["learning_rate"])
            study.optuna.tell(claimed.trial, 1.0)
            os.close(claimed.lock)
        return sampled

    assert draw("a", 5) == draw("b", 5) != draw("c", 6)
    assert len(set(draw("d", 7))) == 4


def test_a_grid_ends_when_it_is_exhausted(search, fake_train):
    space = write_space(learning_rate=[0.1, 0.2], n_layer={"low": 1, "high": 5, "step": 2})
    short = search("--space", space, "--sampler", "grid", "--trials", 2)
    assert short.code == 0 and len(results()) == 2
    result = search("--space", space, "--sampler", "grid", "--workers", 2)
    assert result.code == 0 and "trials  6, 2 of them finished\n" in result.out
    points = {(row["learning_rate"], row["n_layer"]) for row in results()}
    assert points == {(rate, layers) for rate in ("0.1", "0.2") for layers in ("1", "3", "5")}
    assert len(results()) == 6


def test_defaults_outside_the_space_are_said_and_not_tried(search, fake_train):
    result = search("--space", write_space(n_layer=[1, 2]), "--trials", 1)
    assert "the defaults are not tried, they are outside the space: n_layer = 4\n" in result.out
    assert results()[0]["n_layer"] in "12" and "gained" not in result.out


def test_a_combination_that_cannot_be_is_refused_and_counts(search, fake_train):
    space = write_space(n_embd=[64, 30])
    result = search("--space", space, "--sampler", "grid")
    assert result.code == 0
    refused, complete = sorted(results(), key=lambda row: row["n_embd"])
    reason = "n_embd = 30 must be divisible by n_head = 4 (n_embd = 32 is) (n_embd from --n-embd)"
    assert (refused["state"], refused["reason"], refused["run"]) == ("refused", reason, "")
    assert complete["state"] == "complete" and len(list_runs("runs")) == 1
    assert "trials   2 (1 complete, 1 refused)\n" in result.out


def test_a_failing_trial_counts_and_the_search_goes_on(search, fake_train):
    space = write_space(dropout=[0.0, 0.5], learning_rate=[0.1, 0.2])
    result = search("--space", space, "--sampler", "grid", "--seed", 1)
    assert result.code == 0, result.err
    assert sorted((row["dropout"], row["state"], row["reason"]) for row in results()) == [
        ("0.0", "complete", ""),
        ("0.0", "complete", ""),
        ("0.5", "failed", "out of memory"),
        ("0.5", "failed", "out of memory"),
    ]


def test_a_search_stops_when_all_fail_for_one_reason(search, fake_train):
    space = write_space(learning_rate={"low": 0.1, "high": 0.2})
    result = search("--space", space, "--dropout", 0.5, "--seed", 1)
    assert result.code == 3  # what the trials ended with
    assert result.err == (
        "error: the first 3 trials have all failed: out of memory\n"
        "hint: their output is in searches/space/trials; fix that and start again\n"
    )
    other_reasons = search(
        *("--space", write_space(batch_size=[4, 5, 6]), "--study", "b", "--dropout", 0.5, "--sampler", "grid")
    )
    assert other_reasons.code == 3
    assert other_reasons.err.startswith(
        "error: no trial was completed\nhint: searches/b/results.csv says why"
    )
    assert {row["reason"] for row in results("b")} == {"step 4: no", "step 5: no", "step 6: no"}


def test_a_hopeless_trial_is_pruned(search, fake_train, monkeypatch):
    monkeypatch.setattr(study_module, "STARTUP_TRIALS", 1)
    space = write_space(learning_rate=[0.02, 0.9])
    seed = 0 if space_module.grid_points(read_space(space, True), 0)[0]["learning_rate"] == 0.02 else 1
    flags = ["--sampler", "grid", "--max-iters", 400, "--eval-interval", 10, "--weight-decay", 0.02]
    result = search("--space", space, *flags, "--sampler-seed", seed)
    assert result.code == 0
    first, second = results()
    assert (first["state"], first["last_step"]) == ("complete", "400")
    assert second["state"] == "pruned" and 100 <= int(second["last_step"]) < 400
    assert search("--space", space, *flags, "--study", "all", "--no-prune").code == 0
    assert [row["state"] for row in results("all")] == ["complete", "complete"]


def test_a_database_serves_as_storage_and_belongs_to_one_folder(
    search, fake_train, tmp_path, monkeypatch, campaign
):
    if not campaign.whole:
        pytest.skip("takes ten seconds: pytest --campaign")
    flags = ["--space", write_space(n_layer=[2, 4]).absolute(), "--storage", f"sqlite:///{tmp_path / 's.db'}"]
    assert search(*flags, "--trials", 1).code == 0
    assert search(*flags, "--trials", 4, "--workers", 2).code == 0 and len(results()) == 4
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = search(*flags)
    assert result.code == 2
    assert result.err.startswith(
        "error: the study space of --storage belongs to another folder than searches/space\n"
    )


def study_with(name: str = "space", **domains: Any) -> study_module.Study:
    """Open a study of two trials as search.py does."""
    plan = space_module.make_plan(read_space(write_space(**domains), for_grid=False), Options())
    return study_module.Study(plan, settings(name, trials=2))


@pytest.mark.parametrize(
    ("left", "loss", "n_runs"),
    [
        ("eval/final.json", 0.5, 1),
        ("artifacts/checkpoints/step_000000000.safetensors", 0.125, 1),
        (None, 0.009, 2),
    ],
)
def test_a_dead_trial_is_replaced_where_it_stopped(search, fake_train, left, loss, n_runs):
    old = create_run("runs", "space-0")  # of a search that has been removed since
    (old.eval_dir / "final.json").write_text('{"best_val_loss": 0.0}')
    old.keep()
    old.lock.release()
    study = study_with(n_layer=[4])
    claimed = study.claim_trial()
    trial_run = trials_module.TrialRun(study, claimed, None, threading.Event())
    assert trial_run._arguments()[-1] == "--run-tag=space-0"
    run = create_run("runs", "space-0")
    if left:
        (run.path / left).write_text('{"best_val_loss": 0.5}')
    run.lock.release()
    os.close(claimed.lock)
    result = search("--space", "space.yaml", "--trials", 1)
    assert result.code == 0, result.err
    (row,) = results()
    assert (row["trial"], row["state"]) == ("1", "complete")
    assert float(row["best_val_loss"]) == pytest.approx(loss)
    assert len(list_runs("runs")) == n_runs + 1
    assert row["run"].endswith("_002_space-0" if left else "_003_space-1")
    assert Path("searches/space/trials/1.log").exists() == (left != "eval/final.json")
    assert "(the defaults)" in Path("searches/space/results.md").read_text()


@pytest.mark.parametrize(
    "name, resumed",
    [
        ("step_000000004.safetensors", True),
        ("step_000000004-copy.safetensors", False),
        ("step_4.safetensors", False),
    ],
)
def test_a_dead_trial_is_resumed_from_nothing_but_a_checkpoint(workdir, name, resumed):
    study = study_with(n_layer=[4])
    claimed = study.claim_trial()
    trials_module.TrialRun(study, claimed, None, threading.Event())._arguments()
    run = create_run("runs", "space-0")
    (run.checkpoint_dir / name).touch()
    run.lock.release()
    command = trials_module.TrialRun(study, claimed, None, threading.Event())._arguments()
    assert (command[:2] == ["--resume", str(run.path)]) is resumed
    assert ("--run-tag=space-0" in command) is not resumed
    os.close(claimed.lock)


def test_the_table_on_the_console_lines_up_in_any_script(monkeypatch):
    rows = [["trial", "data_path", "run"], ["0", "日本語.txt", "one"], ["10", "text.txt", "zwei"]]
    monkeypatch.setattr(report_module, "table", lambda *_: rows)
    monkeypatch.setattr(report_module, "ranked", lambda _: [])
    said: list[str] = []

    class FakeConsole:
        say = staticmethod(said.append)

    report_module.show_table(None, FakeConsole)
    assert said == [
        "",
        "trial  data_path   run",
        "0      日本語.txt  one",
        "10     text.txt    zwei",
        "",
    ]


def test_a_trial_lives_as_long_as_its_process(workdir):
    study = study_with(learning_rate=[1e-3, 1e-2])
    claimed = study.claim_trial()
    orphan = subprocess.Popen(["sleep", "60"], pass_fds=[claimed.lock])
    os.close(claimed.lock)  # the worker is dead, its process is not
    second = study_with(learning_rate=[1e-3, 1e-2]).claim_trial()
    assert second.trial.number == 1 and study.claim_trial() is None
    orphan.kill()
    orphan.wait()
    third = study.claim_trial()
    assert (third.trial.number, third.trial.user_attrs["replaces"]) == (2, 0)
    assert third.parameters == claimed.parameters == {"learning_rate": 1e-3}
    assert study.claim_trial() is None and [trial.number for trial in study.trials()] == [1, 2]


def start_search(
    *flags: object, script: str = "run_search.py", cwd: Path | None = None
) -> subprocess.Popen[str]:
    command = [sys.executable, script, *map(str, flags)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True
    )


def test_two_searches_at_once_share_the_trials(fake_train, campaign):
    if not campaign.whole:
        pytest.skip("takes ten seconds: pytest --campaign")
    space = write_space(learning_rate={"low": 1e-4, "high": 1e-1})
    flags = ["--space", space, "--trials", 9, "--workers", 2, "--no-prune"]
    both = [start_search(*flags) for _ in range(2)]
    ended = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    told = [
        line for out, _ in ended for line in out.splitlines() if line.startswith("trial ") and "=" in line
    ]
    assert sorted(int(line.split()[1]) for line in told) == list(range(9))
    assert all("trials    9 (9 complete)\n" in out for out, _ in ended)
    assert len(study_of().trials) == 9 == len(list_runs("runs"))


def test_no_two_workers_claim_the_last_trial(workdir):
    claimed: list[study_module.ClaimedTrial] = []
    studies = [study_with(n_layer=[2, 4]) for _ in range(8)]

    def claim(study: study_module.Study) -> None:
        while found := study.claim_trial():
            claimed.append(found)

    threads = [threading.Thread(target=claim, args=(study,)) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found.trial.number for found in claimed) == [0, 1] == [t.number for t in study_of().trials]


def test_the_process_of_a_trial_holds_its_lock(fake_train):
    space = write_space(learning_rate={"low": 1e-4, "high": 1e-1})
    process = start_search("--space", space, "--weight-decay", 0.5)
    wait_for(lambda: list_runs("runs"))
    (orphan,) = children_of(process.pid)
    process.kill()
    process.communicate()
    assert not lock_is_free(Path("searches/space/trials/0.lock"))
    os.kill(orphan, signal.SIGKILL)
    wait_for(lambda: lock_is_free(Path("searches/space/trials/0.lock")))


def test_ctrl_c_leaves_the_trials_for_the_next_start(fake_train):
    space = write_space(learning_rate={"low": 1e-4, "high": 1e-1})
    flags = ["--space", space, "--trials", 3, "--max-iters", 100, "--eval-interval", 1, "--no-prune"]
    process = start_search(*flags, "--workers", 2, "--weight-decay", 0.2)
    wait_for(lambda: len(list_runs("runs")) == 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    words = "--space space.yaml --trials 3 --max-iters 100 --eval-interval 1 --no-prune --workers 2"
    assert out.endswith(
        f"stopped after 0 of 3 trials; go on with: python search.py {words} --weight-decay 0.2\n"
    )
    assert all(lock_is_free(path) for path in Path("searches/space/trials").glob("*.lock"))
    process = start_search(*flags, "--weight-decay", 0.2, "--trials", 2)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    counted = study_module.without_replaced(study_of().trials)
    assert [(trial.user_attrs.get("replaces"), trial.value) for trial in counted] == [(0, 0.125), (1, 0.125)]
    assert len(list_runs("runs")) == 2


def lock_is_free(path: Path) -> bool:
    lock = study_module.try_lock(path)
    if lock is not None:
        os.close(lock)
    return lock is not None


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- searches of train.py -----------------------------------------------------------------------------


def test_a_pruned_run_has_really_ended_early(search, text_file, monkeypatch, campaign):
    if not campaign.whole:
        pytest.skip("takes ten seconds: pytest --campaign")
    monkeypatch.setattr(study_module, "STARTUP_TRIALS", 1)
    space = write_space(learning_rate=[1e-2, 1e-9])
    seed = 0 if space_module.grid_points(read_space(space, True), 0)[0]["learning_rate"] == 1e-2 else 1
    flags = [*TINY, *QUIET_TRACKERS, "--max-iters", 800, "--eval-interval", 20]
    result = search(
        *("--space", space, "--data", text_file, "--sampler", "grid", "--sampler-seed", seed, *flags)
    )
    assert result.code == 0, result.err
    good, hopeless = results()
    assert (good["state"], hopeless["state"]) == ("complete", "pruned")
    last = [row["step"] for row in read_metrics(Path(hopeless["run"], "logs/metrics.jsonl"))][-1]
    assert 200 <= last < 800 and not Path(hopeless["run"], "eval/final.json").exists()


SMALL = TINY[: TINY.index("--threads")]  # the search divides the cores
FLAGS = ["--data", "text.txt", *SMALL, *QUIET_TRACKERS, "--max-iters", "60", "--eval-interval", "10"]
KILLED = ["--trials", "5", "--no-prune", "--workers", "2", "--study", "k", *FLAGS]


def children_of(pid: int) -> list[int]:
    """Return the child processes of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent == pid:
            found.append(int(path.parent.name))
    return found


@pytest.fixture(scope="module")
def killed_search(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """A search that was killed together with one of its two running trials, and then continued."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    space = {"learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}, "weight_decay": [0.01, 0.1]}
    (folder / "space.yaml").write_text(json.dumps(space))
    script, log = str(PROJECT / "search.py"), folder / "searches/k/search.log"
    process = start_search("--space", "space.yaml", *KILLED, script=script, cwd=folder)
    wait_for(lambda: log.exists() and log.read_text().count("complete") >= 2)
    wait_for(lambda: len(list_runs(folder / "runs")) >= 3)
    victims = children_of(process.pid)
    process.kill()
    for pid in victims[:1]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    process = start_search("--space", "space.yaml", *KILLED, script=script, cwd=folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    yield folder, out


@pytest.fixture
def after_the_kill(killed_search, monkeypatch) -> str:
    """The output of the continued search, whose folder is the working folder."""
    monkeypatch.chdir(killed_search[0])
    return killed_search[1]


def test_a_killed_search_ends_with_exactly_its_trials(after_the_kill):
    everyone = study_of("k").trials
    replaced = [trial for trial in everyone if "replaces" in trial.user_attrs]
    assert replaced and len(everyone) == 5 + len(replaced)
    rows = results("k")
    assert [row["state"] for row in rows] == ["complete"] * 5
    assert len({row["run"] for row in rows}) == 5
    assert "trials    5 (5 complete)\n" in after_the_kill


def test_the_table_holds_what_the_runs_have_reached(after_the_kill):
    for row in results("k"):
        final = json.loads(Path(row["run"], "eval/final.json").read_text())
        assert float(row["best_val_loss"]) == final["best_val_loss"]
        used = json.loads(Path(row["run"], "meta/full_config.json").read_text())["parameters"]
        assert float(row["learning_rate"]) == used["learning_rate"]
        assert float(row["weight_decay"]) == used["weight_decay"]
        share = max(1, len(os.sched_getaffinity(0)) // 2)
        assert (used["max_iters"], used["threads"], final["steps"]) == (60, share, 60)


def test_the_first_trial_is_the_defaults_and_something_is_better(after_the_kill):
    first, *others = results("k")
    assert (float(first["learning_rate"]), float(first["weight_decay"])) == (1e-3, 0.01)
    assert min(float(row["best_val_loss"]) for row in others) < float(first["best_val_loss"])


def test_there_are_pictures_and_a_summary(after_the_kill):
    for name in ("history", "importance", "slice"):
        assert Path(f"searches/k/{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    lines = Path("searches/k/results.md").read_text().splitlines()
    assert lines[0] == "# Search k" and "- trials: 5 (5 complete)" in lines
    assert sum(line.endswith("(the defaults) |") for line in lines) == 1


def test_the_best_preset_is_what_the_best_trial_was(after_the_kill, train):
    best = min(results("k"), key=lambda row: float(row["best_val_loss"]))
    assert sorted(os.listdir("searches/k/best")) == [
        *("data.yaml", "model.json", "tensorboard.json", "train.yaml"),
    ]
    shown = train("--config", "searches/k/best", "--print-config")
    assert shown.code == 0, shown.err
    values = {name: value for name, (value, _) in printed_config(shown.out).items()}
    used = json.loads(Path(best["run"], "meta/full_config.json").read_text())["parameters"]
    assert values.pop("run_tag") == "" != used.pop("run_tag")
    assert values == used
    Path("config.json").write_text('{"n_layer": 3, "beta1": 0.5}')  # nor does what stands elsewhere count
    again = printed_config(train("--config", "searches/k/best", "--print-config").out)
    assert {name: value for name, (value, _) in again.items() if name != "run_tag"} == values
    Path("config.json").unlink()
    assert train("--config", "searches/k/best", "--quiet").code == 0
    final = json.loads(Path(list_runs("runs")[-1], "eval/final.json").read_text())
    assert final["best_val_loss"] == float(best["best_val_loss"])


def test_a_study_goes_on_with_the_same_plan_only(after_the_kill, search):
    changed = ["--space", "space.yaml", *KILLED, "--max-iters", "61", "--threads", "2"]
    result = search(*changed)
    assert result.code == 2
    assert result.err == (
        "error: the study k has begun with other settings: max_iters: 60 -> 61\n"
        "hint: name another --study, or remove searches/k to forget that one\n"
    )
    Path("other.yaml").write_text('{"learning_rate": [0.1], "beta1": [0.8]}')
    result = search("--space", "other.yaml", *KILLED)
    assert result.code == 2
    old = '{"low": 0.001, "high": 0.1, "step": null, "log": true}'
    changes = f"learning_rate: {old} -> [0.1], weight_decay: [0.01, 0.1] -> 0.01, beta1: 0.9 -> [0.8]"
    assert f"other settings: {changes}" in result.err
