"""search.py: the space file, the samplers, and searches that are pruned, refused, killed and continued."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, QUIET_TRACKERS, TEXT, TINY, Result, printed_config, runner, with_changes

pytest.importorskip("optuna", reason="searching is optional: pip install -e '.[search]'")

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from parameters import specs
from utils_alg1.base.errors import Alg1Error
from utils_alg1.console.command_line import Options
from utils_alg1.run_directory import checkpoint_path, checkpoint_paths, in_use, list_runs
from utils_alg1.search import results as results_module
from utils_alg1.search import storage as storage_module
from utils_alg1.search import study as study_module
from utils_alg1.search import trials as trials_module
from utils_alg1.search.gpus import Gpus
from utils_alg1.search.space import grid_points, grid_values, make_plan, read_space
from utils_alg1.search.study import queue_points
from utils_alg1.tracking.metrics_file import read_metrics
from utils_alg1.utils_output import Console
from utils_alg1.utils_run_manager import create_run

pytestmark = [
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),  # as search.py does
    pytest.mark.filterwarnings("ignore:Heartbeat of storage:UserWarning"),
]

# Stands in for train.py where a test is about the search: its loss is |learning_rate - 0.01|.
FAKE_TRAIN = """
import json, sys, time
from pathlib import Path

names = [word.partition("=")[0] for word in sys.argv[1:]]
assert len(names) == len(set(names)), "train.py refuses a flag that is given twice"
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
if "--resume" in sys.argv:
    run, loss, steps = Path(sys.argv[2]), 0.125, []
    print("run      " + run.name, flush=True)
else:
    loss = abs(float(flags.get("learning-rate", 1e-3)) - 0.01)
    if flags.get("dropout") in ("0.5", "0.25"):
        print("training")
        print("error: out of memory" if flags["dropout"] == "0.5" else "error: cannot write: disk full")
        sys.exit(3 if flags["dropout"] == "0.5" else 4)
    tag = flags["run-tag"]
    run = Path("runs", "2026-01-01_%03d_%s" % (int(tag.rsplit("-")[-1]) + 1, tag))
    for name in ("logs", "eval", "artifacts/checkpoints"):
        (run / name).mkdir(parents=True)
    (run / "artifacts/checkpoints/step_000000000.safetensors").touch()
    (run / "logs/metrics.jsonl").touch()
    print("run      " + run.name, flush=True)
    steps = range(0, int(flags.get("max-iters", 100)) + 1, 10)
with (run / "logs/metrics.jsonl").open("a") as file:
    for step in steps:
        print(json.dumps({"step": step, "loss/val": loss + 1 / (step + 1)}), file=file, flush=True)
        time.sleep(float(flags.get("weight-decay", 0)))
(run / "eval/final.json").write_text(json.dumps({"export_val_loss": loss}))
"""

RUN_SEARCH = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {str(PROJECT)!r})
sys.modules["utils_alg1.training.devices"] = SimpleNamespace(  # no trial needs PyTorch
    find_device=str, visible_gpus=list
)
import search
from utils_alg1.search import results, storage, trials
from utils_alg1.console.script import run_script
trials.TRAIN_SCRIPT, trials.POLL_SECONDS = Path("fake_train.py").absolute(), 0.05
storage.HEARTBEAT_SECONDS, storage.GRACE_SECONDS = 1, 3
results.draw_pictures = lambda *_: None
run_script(search.main)
"""

RATES = {"low": 1e-4, "high": 1e-1, "log": True}


@pytest.fixture
def search(capsys) -> Callable[..., Result]:
    """search.py in this process; its trials are processes."""
    import search as script

    return runner(script.main, capsys)


@pytest.fixture
def fake_train(text_file, monkeypatch) -> Path:
    """Replaces train.py by a script that takes a moment, for tests of the search alone."""
    path = Path("fake_train.py").absolute()
    path.write_text(FAKE_TRAIN)
    Path("run_search.py").write_text(RUN_SEARCH)
    Path("config.json").write_text('{"data_path": "text.txt"}')
    monkeypatch.setattr(trials_module, "TRAIN_SCRIPT", path)
    monkeypatch.setattr(trials_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(results_module, "draw_pictures", lambda *_: None)
    return path


def write_space(**entries: Any) -> Path:
    """Write space.yaml; JSON is valid YAML."""
    path = Path("space.yaml")
    path.write_text(json.dumps(entries))
    return path


def open_study(
    name: str = "other", sampler: str = "tpe", seed: int = 0, prune: bool = True, **entries: Any
) -> optuna.Study:
    """Open a study as search.py does."""
    plan = make_plan(read_space(write_space(**entries), sampler == "grid"), Options())
    arguments = argparse.Namespace(storage=None, sampler=sampler, sampler_seed=seed, prune=prune)
    folder = Path("searches", name)
    folder.mkdir(parents=True, exist_ok=True)
    storage = storage_module.open_storage(f"sqlite:///{folder}/study.db")
    return study_module.open_study(storage, plan, folder, arguments, Console(quiet=True))


def search_of(study: optuna.Study, n_trials: int) -> trials_module.Search:
    """The search in this process whose space open_study has written."""
    plan, folder = make_plan(read_space("space.yaml", False), Options()), Path("searches", study.study_name)
    storage = storage_module.open_storage(f"sqlite:///{folder}/study.db")
    points = grid_points(plan.space) if study.user_attrs["plan"]["grid"] else []
    console = Console(quiet=True)
    return trials_module.Search(storage, study, plan, folder, n_trials, [], Gpus(None), console, points)


def end_unfinished(search: trials_module.Search, trial: optuna.Trial) -> None:
    """End a trial as if its objective had raised NotFinished."""
    search.study.tell(trial, state=optuna.trial.TrialState.FAIL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search.study, "stop", lambda: None)  # works in study.optimize only
        search.trial_ended(search.study, search.study.trials[trial.number])


def results(name: str = "space") -> list[dict[str, str]]:
    with Path("searches", name, "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def trials_of(name: str = "space") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=f"sqlite:///searches/{name}/study.db").trials


def counted(name: str = "space") -> list[optuna.trial.FrozenTrial]:
    """The trials that were not queued again."""
    return [trial for trial in trials_of(name) if trial.state.name in ("COMPLETE", "PRUNED")]


# --- the space file -----------------------------------------------------------------------------------

SPACE_MISTAKES = {
    "learning_rat: [1]": "learning_rat: unknown name; did you mean learning_rate?",
    "7: [1]": "7: unknown name",
    "n_layer: 4": "n_layer: must be a list of choices, or have low and high",
    "vocab_size: []": "vocab_size: The `choices` must contain one or more elements",
    "n_head: [1, two, 0]": "n_head: 'two' must be a whole number\n  - bad.yaml: n_head: 0 must be above 0",
    "lr_schedule: [cosin]": "lr_schedule: 'cosin' must be one of constant, cosine, linear, step, wsd",
    "optimizer: {low: 1, high: 2}": "optimizer: must be a list of choices",
    "dropout: {low: 0.2, high: 0.1}": "dropout: `low <= high` must hold",
    "weight_decay: {low: 0, high: 1, log: true}": "weight_decay: `low > 0` must hold for `log=True`",
    "beta1: {low: 0.1, high: 0.5, stp: 0.1}": "beta1: ",
    "beta2: {low: 0.1, high: 0.5, step: 0}": "beta2: `step > 0` must hold",
    "warmup_iters: {low: 1}": "warmup_iters: ",
    "min_lr: {low: 1e-5, high: 1e-4, log: [0]}": "min_lr: log: [0] must be true or false",
    "run_tag: [a, b]": "run_tag: says where a run is kept; it cannot be searched",
    "max_seconds: [60]": "max_seconds: cannot be searched: a trial would be resumed again and again",
    "seed: [1, 2]": "seed: changes how the loss is measured; losses could not be compared",
}


def test_every_mistake_in_the_space_is_named_in_one_message(search, workdir):
    Path("bad.yaml").write_text("\n".join(SPACE_MISTAKES))
    result = search("--space", "bad.yaml")
    assert result.code == 2 and result.err.startswith(f"error: {len(SPACE_MISTAKES) + 1} problems:\n")
    for problem in SPACE_MISTAKES.values():
        assert f"\n  - bad.yaml: {problem}" in result.err
    Path("bad.yaml").write_text("# nothing")
    assert "bad.yaml: names no parameter to search" in search("--space", "bad.yaml").err
    assert os.listdir() == ["bad.yaml"]


def test_a_space_is_read_as_the_parameters_types(workdir):
    Path("my.yaml").write_text(
        "learning_rate: {low: 1e-4, high: 1e-2, log: true}\n"  # YAML reads 1e-4 as text
        "n_layer: {low: 1, high: 6, step: 2}\ncompile: [on, off]\nn_head: [2, 4.0, 2]\n"
        "dropout: {low: 0, high: 0.35, step: 0.1}\n"
    )
    space = read_space("my.yaml", for_grid=False)
    assert space == {
        "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        "n_layer": IntDistribution(1, 5, step=2),
        "compile": CategoricalDistribution(("on", "off")),
        "n_head": CategoricalDistribution((2, 4)),
        "dropout": FloatDistribution(0.0, 0.3, step=0.1),
    }
    assert grid_values(space["n_layer"]) == [1, 3, 5] and grid_values(space["compile"]) == ["on", "off"]
    assert grid_values(space["dropout"]) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    with pytest.raises(Alg1Error, match="learning_rate: a grid needs a list of choices, or a range with a s"):
        read_space("my.yaml", for_grid=True)
    with pytest.raises(Alg1Error, match=r"the grid has more than 100,000 points"):
        read_space(write_space(warmup_iters={"low": 0, "high": 100_000}), for_grid=True)


def test_the_shipped_space_holds_the_defaults(text_file):
    space = read_space(PROJECT / "configs/search.yaml", for_grid=False)
    plan = make_plan(space, Options(values={"data_path": "text.txt"}))
    study = optuna.create_study()
    study_module.queue_defaults(study, plan, Console())
    assert study.trials[0].params == plan.defaults and plan.defaults.keys() == space.keys()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("max_seconds: 60", "max_seconds: a trial would be resumed again and again"),
        ("output: model.safetensors", "output: trials cannot share one"),
    ],
)
def test_what_has_no_place_in_a_search_is_refused_in_a_file_too(search, text_file, line, reason):
    Path("mine.yaml").write_text(f"data_path: {text_file}\n{line}\n")
    result = search("--space", write_space(learning_rate=RATES), "--config", "mine.yaml")
    assert (result.code, result.err) == (
        2,
        f"error: mine.yaml: {reason}\nhint: take it out of the file for the search\n",
    )
    assert not Path("searches").exists()


# --- the command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--trials 0", "--trials: 0 must be at least 1"),
        ("--study a/b", "--study 'a/b': must be a name of letters, digits, - _ and . within, at most 40"),
        ("--sampler grdi", "--sampler: invalid choice: 'grdi'"),
        ("--resume latest", "unknown flag --resume"),
        ("--positions lerned", "positions = 'lerned' must be one of learned, rotary"),
        ("--n-layer 3", "--n-layer cannot be given: it is searched"),
        ("--run-tag x", "--run-tag cannot be given: the search names its runs itself"),
        ("--max-seconds 9", "--max-seconds cannot be given: a trial would be resumed again and again"),
        ("--space no.yaml", "no.yaml: no such file"),
        ("--storage text.txt", "the storage text.txt cannot be used: "),
        ("--storage nodb://x", "the storage nodb://x cannot be used: "),
        ("--data nothing.txt", "nothing.txt: no such text file"),
        ("--data short.txt", "short.txt: 6 characters are too few for block_size = 32"),
        ("--device cuda:77", "--device cuda:77: this machine has no such device"),
    ],
)
def test_a_mistake_is_named_before_anything_is_created(search, text_file, flags, complaint):
    Path("short.txt").write_text("abcdef")
    write_space(n_layer=[1, 2])
    before = set(os.listdir())
    result = search("--space", "space.yaml", "--data", "text.txt", *flags.split())
    assert result.code == 2 and result.err.startswith(f"error: {complaint}")
    assert set(os.listdir()) - {".tokens"} == before


def test_without_optuna_there_is_one_line(search, workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = search()
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "error: search.py needs Optuna, which is not installed\n"
        "hint: source .venv/bin/activate, or pip install -e '.[search]'\n"
    )


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [("aim", False, "--no-aim"), ("aim", True, "--aim"), ("data_path", "-a b", "--data=-a b")],
)
def test_a_parameter_as_a_word(name, value, word):
    assert specs()[name].word(value) == word


# --- searches with a fake train.py --------------------------------------------------------------------


def test_several_workers_divide_the_cores_unless_threads_is_given_or_searched():
    from search import threads_per_trial

    assert threads_per_trial(0, 2) == [f"--threads={max(1, len(os.sched_getaffinity(0)) // 2)}"]
    assert threads_per_trial(0, 1) == threads_per_trial(3, 2) == threads_per_trial(None, 2) == []


def test_a_search_finds_something_better_than_the_defaults(search, fake_train):
    rates = RATES | {"low": 1e-3}  # one worker draws the same values from them every time
    flags, n = ["--space", write_space(learning_rate=rates, n_layer=[2, 4]), "--no-prune"], 8
    result = search(*flags, "--trials", n, "--sampler-seed", 0)
    assert result.code == 0, result.err
    rows = results()
    assert [row["trial"] for row in rows] == [str(i) for i in range(n)]
    assert (float(rows[0]["learning_rate"]), rows[0]["n_layer"]) == (1e-3, "4")
    losses = [float(row["val_loss"]) for row in rows if row["state"] == "complete"]
    assert losses[0] == pytest.approx(0.009) and min(losses) < 0.009
    assert len({row["learning_rate"] for row in rows}) == n
    assert f"gained    {losses[0] - min(losses):.4f}\n" in result.out
    assert result.out.rstrip().endswith(
        "next      python train.py --config searches/space/best.yaml   for 5,000 steps"
    )
    again = search(*flags, "--trials", n)
    assert f"trials  {n}, {n} of them finished\n" in again.out and results() == rows
    assert search(*flags, "--trials", n + 1).code == 0 and len(results()) == n + 1


def test_the_last_place_is_that_of_the_lower_number(fake_train):
    study = open_study("space", learning_rate=RATES)
    first, second = study.ask(), study.ask()
    search = search_of(study, 1)
    with pytest.raises(trials_module.NotFinished):
        search.objective(second)
    assert search.objective(first) < 0.1 and len(list_runs("runs")) == 1


def test_a_trial_without_a_place_does_not_stand_before_an_interrupted_one(fake_train):
    study = open_study("space", learning_rate=RATES)
    interrupted, without_place = study.ask(), study.ask()
    interrupted.set_user_attr("run", "its run")
    search = search_of(study, 1)
    for trial in (without_place, interrupted):
        end_unfinished(search, trial)
    assert study.ask().user_attrs["run"] == "its run"


def test_a_point_of_the_grid_without_a_place_stays_available(fake_train):
    study = open_study("space", "grid", n_layer=[1, 2, 3])
    search = search_of(study, 3)
    queue_points(study, search.plan.space, search.points, 3)
    end_unfinished(search, study.ask())
    search.run(2)
    assert sorted(trial.params["n_layer"] for trial in counted()) == [1, 2, 3]


def test_points_that_two_processes_have_queued_at_once_are_tried_once(fake_train):
    study = open_study("space", "grid", n_layer=[1, 2, 3])
    search = search_of(study, 3)
    for _ in range(2):  # the second one read before the first had written
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(study, "get_trials", lambda deepcopy: [])
            queue_points(study, search.plan.space, search.points, 3)
    search.run(2)
    assert sorted(trial.params["n_layer"] for trial in counted()) == [1, 2, 3]
    assert len(list_runs("runs")) == 3


def test_a_lost_point_of_the_grid_is_queued_again(fake_train):
    study = open_study("space", "grid", n_layer=[1, 2, 3])
    search = search_of(study, 3)
    queue_points(study, search.plan.space, search.points, 3)
    for _ in range(2):  # killed between the end of a trial and its return into the queue
        study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    waiting = optuna.trial.TrialState.WAITING  # as earlier versions have queued them
    study.add_trial(optuna.trial.create_trial(state=waiting, system_attrs={"grid_id": 0}))
    search.run(2)
    assert sorted(trial.params["n_layer"] for trial in counted()) == [1, 2, 3]


def test_a_search_killed_while_it_creates_its_study_loses_nothing(search, fake_train, monkeypatch):
    monkeypatch.setattr(study_module, "CREATION_SECONDS", 0)
    Path("searches/space").mkdir(parents=True)
    optuna.create_study(study_name="space", storage="sqlite:///searches/space/study.db")
    assert search("--space", write_space(learning_rate=RATES), "--trials", 1).code == 0
    assert results()[0]["learning_rate"] == "0.001"
    assert "max_iters: " in search("--space", "space.yaml", "--max-iters", 7).err


def test_a_train_py_that_does_not_leave_is_killed(fake_train, monkeypatch):
    monkeypatch.setattr(trials_module, "TERMINATE_SECONDS", 0.2)
    fake_train.write_text("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FAKE_TRAIN)
    study = open_study("space", learning_rate=RATES)
    _defaults, trial = study.ask(), study.ask()
    monkeypatch.setattr(trial, "should_prune", lambda: True)
    parameters = {"learning_rate": 0.1, "weight_decay": 60}  # seconds between two evaluations
    code, pruned = search_of(study, 2).train(trial, parameters, Path("log"))
    assert (code, pruned) == (-signal.SIGKILL, True)


def test_a_trial_killed_before_its_run_is_known_finds_its_run(fake_train):
    study = open_study("space", learning_rate=RATES)
    old = Path("runs/2026-01-01_009_space-0")  # of a study of the same name that was removed
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    search, trial = search_of(study, 1), study.ask()
    assert search.earlier_run(trial) is None
    end_unfinished(search, trial)
    again = study.ask()
    assert search.earlier_run(again) is None
    run = Path("runs/2026-01-01_001_space-0")
    run.mkdir()
    assert search.earlier_run(again) == run


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_seed_repeats_its_values_but_not_in_a_second_process(fake_train, sampler):
    def draw(name: str, seed: int) -> list[float]:
        study = open_study(name, sampler, seed, dropout={"low": 0.1, "high": 0.9})
        return [study.ask().suggest_float("dropout", 0.1, 0.9) for _ in range(3)]

    first = draw("a", 5)
    assert first == draw("b", 5) != draw("c", 6)
    assert not set(first) & set(draw("a", 5))


def test_no_two_workers_take_the_same_trial_out_of_the_queue(fake_train):
    study = open_study(sampler="random", n_layer=[2, 3])
    for _ in range(3):
        study.enqueue_trial({"n_layer": 2})
    start, taken = threading.Barrier(4), []

    def take() -> None:
        start.wait()
        taken.extend(study.ask().number for _ in range(2))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(8))
    # That they read before one of them has written is rare; a transaction that reads keeps others out.
    with storage_module.open_storage("sqlite:///searches/other/study.db").engine.begin():
        other = sqlite3.connect("searches/other/study.db", timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")


def test_a_grid_ends_when_it_is_exhausted(search, fake_train):
    space = write_space(learning_rate=[0.1, 0.2], n_layer={"low": 1, "high": 5, "step": 2})
    short = search("--space", space, "--sampler", "grid", "--trials", 2)
    assert short.code == 0 and len(results()) == 2
    result = search("--space", space, "--sampler", "grid", "--workers", 2)
    assert result.code == 0 and "trials  6, 2 of them finished\n" in result.out
    points = {(row["learning_rate"], row["n_layer"]) for row in results()}
    assert points == {(rate, layers) for rate in ("0.1", "0.2") for layers in ("1", "3", "5")}
    assert len(results()) == 6
    other = search("--space", space, "--trials", 7)
    assert other.code == 2 and "has begun with other settings: grid: true -> false" in other.err


def test_defaults_outside_the_space_are_said_and_not_tried(search, fake_train):
    result = search("--space", write_space(n_layer=[1, 2]), "--trials", 1)
    assert "the defaults are not tried, they are outside the space: " in result.out
    assert results()[0]["n_layer"] in "12" and "gained" not in result.out


def test_what_cannot_be_trained_is_told_as_pruned_and_counts(search, fake_train):
    space = write_space(n_embd=[64, 30], dropout=[0.0, 0.5])
    result = search("--space", space, "--sampler", "grid")
    assert result.code == 0, result.err
    assert "trials   4 (1 complete, 1 failed, 2 refused)\n" in result.out and len(list_runs("runs")) == 1
    reasons = {(row["n_embd"], row["dropout"]): (row["state"], row["reason"]) for row in results()}
    assert reasons["64", "0.0"] == ("complete", "") and reasons["64", "0.5"] == ("failed", "out of memory")
    assert all("n_embd = 30 must be divisible" in reasons["30", dropout][1] for dropout in ("0.0", "0.5"))
    assert [trial.state.name for trial in trials_of()].count("PRUNED") == 3


def test_a_search_without_a_complete_trial_says_so(search, fake_train):
    result = search("--space", write_space(learning_rate=RATES), "--dropout", 0.5, "--trials", 7)
    assert result.code == 3 and len(results()) == 7  # smaller ones might fit into the memory
    assert result.err.startswith("error: no trial was completed; the last one: out of memory\n")


def edit_fake_train(fake_train: Path, code: str) -> None:
    """Let the fake train.py run some code before the rest, where `trial` is the number of its trial."""
    number = 'trial = int(flags.get("run-tag", "-0").rsplit("-")[-1])\n'
    fake_train.write_text(FAKE_TRAIN.replace('if "--resume"', number + code + 'if "--resume"', 1))


def test_the_same_error_everywhere_ends_the_search(search, fake_train):
    edit_fake_train(fake_train, "raise NameError('momentun')\n")
    result = search("--space", write_space(learning_rate=RATES, n_layer=[4], beta1=[0.8, 0.9]), "--no-prune")
    assert result.code == 2 and 5 <= len(trials_of()) <= 9
    assert result.err.startswith(
        "error: trials with other values of everything that is searched end alike: NameError: momentun\n"
        "hint: searches/space/trials/"
    )
    fake_train.write_text(FAKE_TRAIN)
    assert search("--space", "space.yaml", "--no-prune").code == 0 and len(results()) == 20


def failed(reason: str | None, loss: float | None = None, **parameters: Any) -> optuna.trial.FrozenTrial:
    """A trial that has ended without a result."""
    space = {"n_layer": IntDistribution(1, 6), "beta1": CategoricalDistribution((0.8, 0.9))}
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.PRUNED,
        params=parameters,
        distributions={name: space[name] for name in parameters},
        intermediate_values={} if loss is None else {0: loss},
        user_attrs={"reason": reason},
    )


@pytest.mark.parametrize(
    ("trials", "everywhere"),
    [
        ([failed("no", n_layer=n, beta1=0.8) for n in (1, 2, 3, 4)], True),
        ([failed("no", n_layer=n, beta1=0.8) for n in (1, 2, 3)], False),  # too few
        ([failed("no", n_layer=n, beta1=0.9) for n in (1, 2, 3, 4)], False),  # beta1 = 0.9 may be the reason
        (
            [failed("no", n_layer=n, beta1=0.8) for n in (1, 2, 3)] + [failed("never", n_layer=4, beta1=0.8)],
            False,
        ),
        ([failed("no", n_layer=n, beta1=0.8) for n in (1, 2, 3, 4)] + [failed(None, 4.2, n_layer=1)], False),
    ],
)
def test_what_fails_everywhere(trials, everywhere):
    assert trials_module.fails_everywhere(trials, {"n_layer": 6, "beta1": 0.9}, "no") == everywhere


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        ("Path('text.txt').write_text('short')", "text.txt: 5 characters are too few for block_size = 32"),
        ("Path('text.txt').rename('moved.txt')", "text.txt: no such text file"),
        (
            "Path('text.txt').write_text('another text ' * 99)",
            "other settings than at the start of the search: text_sh",
        ),
        (
            "Path('config.json').write_text('{\"beta2\": 2}')",
            "beta2 = 2.0 must be below 1 (beta2 from config.json)",
        ),
        (
            "Path('config.json').write_text('{\"beta2\": 0.5}')",
            "other settings than at the start of the search: beta2",
        ),
    ],
)
def test_what_has_changed_meanwhile_ends_the_search_which_goes_on_when_it_is_put_back(
    search, fake_train, damage, error
):
    config = json.dumps({"data_path": "text.txt", "beta2": 0.9})
    Path("config.json").write_text(config)
    damage = damage.replace('"beta2"', '"data_path": "text.txt", "beta2"')
    edit_fake_train(fake_train, f"if trial == 1: {damage}\n")
    text = Path("text.txt").read_bytes()
    flags = ["--space", write_space(learning_rate=RATES), "--trials", 4, "--no-prune"]
    result = search(*flags)
    assert result.code == 2 and f"error: {error}" in result.err and len(counted()) == 2
    Path("text.txt").write_bytes(text)
    Path("config.json").write_text(config)
    assert search(*flags).code == 0 and len(results()) == 4


def test_a_study_from_before_a_setting_was_compared_goes_on(search, fake_train):
    flags = ["--space", write_space(learning_rate=RATES), "--no-prune"]
    assert search(*flags, "--trials", 1).code == 0
    study = optuna.load_study(study_name="space", storage="sqlite:///searches/space/study.db")
    plan = dict(study.user_attrs["plan"])
    assert len(plan.pop("text_sha256")) == 16
    study.set_user_attr("plan", plan)
    assert search(*flags, "--trials", 2).code == 0
    study.set_user_attr("plan", plan | {"text_sha256": "0" * 16})
    assert "has begun with other settings: text_sha256: '0000000000000000' -> '" in search(*flags).err


def test_a_study_whose_trials_were_compared_by_another_loss_is_refused(search, fake_train):
    flags = ["--space", write_space(learning_rate=RATES), "--trials"]
    assert search(*flags, 1).code == 0
    study = optuna.load_study(study_name="space", storage="sqlite:///searches/space/study.db")
    plan = dict(study.user_attrs["plan"])
    assert plan.pop("measure") == "export_val_loss"
    study.set_user_attr("plan", plan)
    result = search(*flags, 2)
    assert result.code == 2 and len(trials_of()) == 1
    assert result.err == (
        "error: the study space has begun with other settings:"
        " measure: 'best_val_loss' -> 'export_val_loss'\n"
        "hint: name another --study, or remove searches/space\n"
    )


def test_the_table_has_exports_before_evaluations_and_marks_these(fake_train, capsys):
    study, states = open_study("space", learning_rate=RATES), optuna.trial.TrialState
    plan = make_plan(read_space("space.yaml", False), Options())
    by_state = {"complete": (2.5, 2.25), "pruned": (1.75, 1.5), "failed": (None,)}
    for state, losses in by_state.items():
        for loss in losses:
            trial = optuna.trial.create_trial(
                state=states.COMPLETE if state == "complete" else states.PRUNED,
                params={"learning_rate": 0.01},
                distributions=plan.space,
                value=loss if state == "complete" else None,
                intermediate_values={} if loss is None else {10: 1.0 if state == "complete" else loss},
                user_attrs={"state": state},
            )
            study.add_trial(trial)
    results_module.write_results(study, plan, Path("searches/space"), Console())
    out = capsys.readouterr().out
    assert re.findall(r"^ *\d+ +(\w+) +((?:~ )?[\d.-]+) ", out, re.MULTILINE) == [
        ("complete", "2.2500"),
        ("complete", "2.5000"),
        ("pruned", "~ 1.5000"),
        ("pruned", "~ 1.7500"),
        ("failed", "-"),
    ]
    assert "\n~ not of the export: the lowest of the evaluations, which read a part of the val text\n" in out
    told = [results_module.describe_trial(study, trial) for trial in study.trials]
    assert told[2] == "trial   2  complete    2.2500  learning_rate=0.01  best"
    assert told[3] == "trial   3  pruned    ~ 1.7500  learning_rate=0.01"
    assert [row["val_loss"] for row in results()] == ["2.5", "2.25", "1.75", "1.5", ""]


ENDS = {  # how a train.py ends by a signal: it saves, or it is gone at once
    "saved": "import atexit, os; atexit.register(lambda: os._exit(143))",
    "SIGTERM": "import os; os.kill(os.getpid(), 15)",
    "SIGKILL": "import os; os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_trial_whose_train_py_is_ended_by_a_signal_three_times_has_failed(search, fake_train, end):
    edit_fake_train(fake_train, ENDS[end] + "\n")
    result = search("--space", write_space(learning_rate=RATES), "--trials", 1)
    assert result.code == 3, result.err
    assert [trial.state.name for trial in trials_of()] == ["FAIL", "FAIL", "PRUNED"]
    (row,) = results()
    assert row["state"] == "failed"
    if end == "SIGKILL":
        assert row["reason"] == "ended by signal 9 (Killed)"


@pytest.mark.parametrize("end", ENDS)
def test_a_trial_whose_train_py_is_ended_by_a_signal_goes_on(search, fake_train, end):
    again = "Path('ended').exists() or '--resume' in sys.argv"
    edit_fake_train(fake_train, f"if not ({again}):\n    Path('ended').touch(); {ENDS[end]}\n")
    assert search("--space", write_space(learning_rate=RATES), "--trials", 1).code == 0
    assert [trial.state.name for trial in trials_of()] == ["FAIL", "COMPLETE"]
    assert [trial.value for trial in counted()] == [pytest.approx(0.125 if end == "saved" else 0.009)]
    assert len(list_runs("runs")) == 1


def test_the_sampler_keeps_away_from_what_cannot_be_trained(fake_train, monkeypatch):
    study = open_study("space", learning_rate={"low": 1e-4, "high": 10, "log": True}, beta1=[0.8, 0.9])
    search = search_of(study, 24)
    monkeypatch.setattr(type(search.plan), "check_again", lambda self: None)

    def train(trial: optuna.Trial, parameters: dict[str, Any], log: Path) -> tuple[int, bool]:
        rate = parameters["learning_rate"]
        log.write_text("error: the loss is not finite")
        trial.report(4.2, 0)
        trial.set_user_attr("run", str(log.with_suffix("")))
        (log.with_suffix("") / "eval").mkdir(parents=True)
        final = {"export_val_loss": abs(rate - 0.002)}
        (log.with_suffix("") / "eval/final.json").write_text(json.dumps(final))
        return (3 if rate > 0.05 else 0), False

    monkeypatch.setattr(search, "train", train)
    search.run(1)
    diverged = [trial.number for trial in counted() if trial.state.name == "PRUNED"]
    early, late = [n for n in diverged if n < 10], [n for n in diverged if n >= 10]
    assert len(early) == 5 and len(late) <= 2  # drawn at random; chosen by the sampler


def test_a_failed_disk_ends_the_search_which_goes_on_later(search, fake_train):
    space = write_space(dropout=[0.25])
    result = search("--space", space, "--trials", 3, "--workers", 2)
    assert result.code == 4 and "cannot write: disk full\n" in result.err
    assert not counted() and {trial.state.name for trial in trials_of()} == {"FAIL", "WAITING"}
    fake_train.write_text(FAKE_TRAIN.replace('"0.25"', '"0.75"'))
    assert search("--space", space, "--trials", 3).code == 0 and len(results()) == 3


def test_a_database_that_fails_ends_the_search(search, fake_train, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise optuna.exceptions.StorageInternalError("commit") from OSError("disk is full")

    space = write_space(learning_rate=[1e-3])
    monkeypatch.setattr(optuna.storages.RDBStorage, "set_trial_state_values", fail)
    result = search("--space", space, "--trials", 2)
    assert result.code == 4 and "error: the storage failed: disk is full\n" in result.err
    monkeypatch.undo()


def test_a_hopeless_trial_is_pruned(search, fake_train, monkeypatch):
    monkeypatch.setattr(study_module, "STARTUP_TRIALS", 1)
    space = write_space(learning_rate=[0.02, 0.9])  # a grid is shuffled, and 0.02 comes first
    flags = ["--sampler", "grid", "--max-iters", 400, "--weight-decay", 0.05]
    assert search("--space", space, *flags).code == 0
    first, second = results()
    assert (first["learning_rate"], first["state"], first["last_step"]) == ("0.02", "complete", "400")
    assert second["state"] == "pruned" and 100 <= int(second["last_step"]) < 400
    assert second["run"] and isinstance(open_study(prune=False, n_layer=[4]).pruner, optuna.pruners.NopPruner)


def test_the_defaults_are_not_pruned_because_the_gain_over_them_is_told(search, fake_train, monkeypatch):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    flags = ["--trials", 2, "--max-iters", 400, "--weight-decay", 0.05]
    assert search("--space", write_space(learning_rate=RATES), *flags).code == 0
    assert [row["state"] for row in results()] == ["complete", "pruned"]


def test_a_missing_default_text_is_looked_for_once_and_its_substitute_given_to_the_trials(
    search, fake_train, monkeypatch
):
    Path("config.json").unlink()  # which names text.txt
    commands, start = [], trials_module.Search.start

    def note(self, command, *rest):
        commands.append(command)
        return start(self, command, *rest)

    monkeypatch.setattr(trials_module.Search, "start", note)
    result = search("--space", write_space(dropout=[0.0, 0.1]), "--trials", 2)
    assert result.code == 0, result.err
    assert result.out.count("downloading tiny Shakespeare") == 1
    size = len(Path("data/python-docs.txt").read_text(encoding="utf-8"))
    assert f"\ntext    data/python-docs.txt: {size:,} characters\n" in result.out
    assert [command.count("--data=python-docs") for command in commands] == [1, 1]


def test_threads_0_is_not_given_to_a_trial_beside_the_threads_of_its_worker(search, fake_train):
    space = write_space(learning_rate=RATES)
    result = search("--space", space, "--trials", 2, "--workers", 2, "--threads", 0)
    assert result.code == 0, result.err
    assert [row["state"] for row in results()] == ["complete", "complete"]


def test_an_earlier_run_with_the_same_tag_is_not_taken(search, fake_train):
    search("--space", write_space(learning_rate=[1e-3]), "--trials", 1)
    (old,) = list_runs("runs")
    old.rename("runs/2025-01-01_001_space-0")
    for path in Path("searches/space").glob("*.db"):
        path.unlink()
    assert search("--space", "space.yaml", "--trials", 1).code == 0
    assert results()[0]["run"] == str(old)


def start_search(
    *flags: object, script: str = "run_search.py", cwd: Path | None = None
) -> subprocess.Popen[str]:
    command = [sys.executable, script, *with_changes(flags)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, start_new_session=True, **pipes)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    """Return the child processes of a process."""
    text = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in text.read_text().split()]
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return sorted(set(found))


def stopped_between_commits(process: subprocess.Popen[str]) -> bool:
    """Stop a search; where it holds the lock of the study, so that nobody could read it, let it go on."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    try:
        with contextlib.closing(sqlite3.connect("searches/space/study.db", timeout=0.5)) as study:
            study.execute("BEGIN EXCLUSIVE")
            study.rollback()
    except sqlite3.OperationalError:
        process.send_signal(signal.SIGCONT)
        return False
    return True


def test_two_searches_at_once_share_the_trials(fake_train, campaign):
    if not campaign.whole:
        pytest.skip("takes ten seconds: pytest --campaign")
    flags = ["--space", write_space(learning_rate=RATES), "--trials", 9, "--workers", 2, "--no-prune"]
    both = [start_search(*flags, "--weight-decay", 0.02) for _ in range(2)]
    ended = [process.communicate(timeout=90) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    told = [
        line for out, _ in ended for line in out.splitlines() if line.startswith("trial ") and "=" in line
    ]
    assert sorted(line.split()[1] for line in told) == sorted(str(trial.number) for trial in counted())
    assert all("trials    9 (9 complete)\n" in out for out, _ in ended)
    assert (
        len(counted()) == 9 == len(list_runs("runs")) == len({t.params["learning_rate"] for t in counted()})
    )


def test_a_process_that_slept_goes_on_without_the_trial_it_lost(fake_train, campaign):
    if not campaign.whole:
        pytest.skip("takes fifteen seconds: pytest --campaign")
    flags = ["--space", write_space(learning_rate=RATES), "--trials", 4, "--max-iters", 20]
    flags += ["--weight-decay", 2]
    sleeper = start_search(*flags)
    wait_for(lambda: list_runs("runs"))
    wait_for(lambda: any("run" in trial.user_attrs for trial in trials_of()))
    wait_for(lambda: stopped_between_commits(sleeper))
    other = start_search(*flags)
    wait_for(lambda: any(trial.state.name == "FAIL" for trial in trials_of()))
    sleeper.send_signal(signal.SIGCONT)
    ended = [process.communicate(timeout=90) for process in (sleeper, other)]
    assert (sleeper.returncode, other.returncode) == (0, 0), ended
    assert len(counted()) == 4 == len(list_runs("runs"))


def test_a_trial_that_died_before_its_first_heartbeat_is_replaced(search, fake_train, monkeypatch):
    monkeypatch.setattr(storage_module, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(storage_module, "GRACE_SECONDS", 2)
    open_study("space", learning_rate=RATES).ask()
    result = search("--space", "space.yaml", "--trials", 1)
    assert result.code == 0 and "waiting for trial 0, which another process began; if" in result.out
    assert [(trial.number, trial.state.name) for trial in trials_of()] == [(0, "FAIL"), (1, "COMPLETE")]


def test_ctrl_c_leaves_the_trials_for_the_next_start(search, fake_train):
    flags = ["--space", write_space(learning_rate=RATES), "--trials", 3, "--no-prune"]
    flags = [str(flag) for flag in [*flags, "--workers", 2, "--weight-decay", 0.5]]
    process = start_search(*flags)
    wait_for(lambda: len(list_runs("runs")) == 2)
    wait_for(lambda: sum("run" in trial.user_attrs for trial in trials_of()) == 2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out.endswith(f"stopped after 0 of 3 trials; continue with: python search.py {' '.join(flags)}\n")
    again = search(*flags, "--trials", 2)
    assert again.code == 0, again.err
    assert [trial.value for trial in counted()] == [0.125, 0.125] and len(list_runs("runs")) == 2
    assert 1e-3 in [float(row["learning_rate"]) for row in results()] and "gained" in again.out


def test_torchrun_is_refused(search, workdir, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = search("--space", write_space(learning_rate=RATES))
    assert (result.code, result.err) == (
        2,
        "error: search.py is one process, and WORLD_SIZE and RANK are those of 2\n"
        "hint: start it alone; --workers 2 runs two trials at a time\n",
    )
    assert not Path("searches").exists()


def test_trials_do_not_inherit_the_variables_of_a_launcher(search, fake_train, monkeypatch):
    variables = ["WORLD_SIZE", "MASTER_ADDR", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE"]
    for name in variables:
        monkeypatch.setenv(name, "2")
    fake_train.write_text(f"import os; assert not os.environ.keys() & {variables}\n" + FAKE_TRAIN)
    assert search("--space", write_space(learning_rate=RATES), "--trials", 1).code == 0
    assert results()[0]["state"] == "complete"


ON_ONE_GPU = """
import atexit, os
gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
with open("gpus.txt", "a") as file:
    file.write(gpu + chr(10))
if gpu != "none":
    os.mkdir("gpu-" + gpu)  # fails where another trial is on it
    atexit.register(os.rmdir, "gpu-" + gpu)
"""


@pytest.mark.parametrize(
    "flags, gpus, used, told",
    [
        ([], ["3", "GPU-5"], {"3", "GPU-5"}, "tpe, 2 at a time, each on one of 2 GPUs\n"),
        (["--device", "cpu"], ["3", "GPU-5"], {"none"}, "tpe, 2 at a time\n"),
        ([], ["3"], {"none"}, "tpe, 2 at a time\n"),
        ([], [], {"none"}, "tpe, 2 at a time\n"),
    ],
)
def test_each_worker_has_a_gpu_of_its_own(flags, gpus, used, told, search, fake_train, monkeypatch):
    monkeypatch.setattr("utils_alg1.training.devices.visible_gpus", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fake_train.write_text(ON_ONE_GPU + FAKE_TRAIN)
    space = write_space(learning_rate=RATES)
    result = search("--space", space, "--trials", 6, "--workers", 2, *flags)
    assert result.code == 0 and told in result.out
    assert {row["state"] for row in results()} <= {"complete", "pruned"}
    assert set(Path("gpus.txt").read_text().split()) == used


def test_trials_are_spread_over_the_gpus(monkeypatch):
    monkeypatch.setattr("utils_alg1.training.devices.visible_gpus", lambda: ["a", "b", "c"])
    for device in ("cuda:1", "cpu", "xpu", None):  # None: it is searched
        assert Gpus(device).names == []
    gpus = Gpus("cuda")
    with contextlib.ExitStack() as running:
        taken = [
            running.enter_context(gpus.assign(number))["CUDA_VISIBLE_DEVICES"] for number in (7, 7, 9, 10, 5)
        ]
        assert taken == ["b", "c", "a", "b", "c"]  # more workers than GPUs are fine
        with gpus.assign(0) as first, gpus.assign(1):
            assert first == {"CUDA_VISIBLE_DEVICES": "a"}
    for number in (1, 2, 3):  # the only trial of this process: the number decides
        with gpus.assign(number) as variables:
            assert variables == {"CUDA_VISIBLE_DEVICES": "abca"[number]}


def test_a_second_signal_leaves_no_process(fake_train):
    flags = ["--space", write_space(learning_rate=RATES), "--weight-decay", 1]
    fake_train.write_text("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FAKE_TRAIN)
    process = start_search(*flags)
    wait_for(lambda: list_runs("runs"))
    (child,) = children_of(process.pid)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    process.communicate(timeout=5)
    assert process.returncode == 143
    wait_for(lambda: not Path(f"/proc/{child}/fd").exists() or not os.listdir(f"/proc/{child}/fd"), 5)


def test_a_search_that_is_left_at_once_ends_a_trial_that_it_just_starts(fake_train):
    """The second signal comes when the process exists, and the search does not know it yet."""
    signals = """
import os, signal, subprocess
class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
trials.subprocess.Popen = Popen
run_script"""
    Path("run_search.py").write_text(RUN_SEARCH.replace("\nrun_script", signals, 1))
    process = start_search("--space", write_space(learning_rate=RATES), "--weight-decay", 1)
    process.communicate(timeout=30)
    assert process.returncode == 143
    wait_for(lambda: not any(b"fake_train.py" in command for command in commands()), 5)


def commands() -> Iterator[bytes]:
    """The command lines of all processes that were started in this folder."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(path / "cwd")) == Path().absolute():
                yield (path / "cmdline").read_bytes()


def test_a_search_that_is_killed_soon_after_a_signal_has_passed_it_on(fake_train):
    """A notebook's stop button leaves a program half a second."""
    Path("run_search.py").write_text(RUN_SEARCH.replace(", 0.05", ", 60"))
    process = start_search("--space", write_space(learning_rate=RATES), "--weight-decay", 1)
    wait_for(lambda: list_runs("runs"))
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(b"fake_train.py" in command for command in commands()), 5)


# --- searches of train.py -----------------------------------------------------------------------------


def test_a_pruned_run_has_really_ended_early(search, text_file, monkeypatch, campaign):
    if not campaign.whole:
        pytest.skip("takes ten seconds: pytest --campaign")
    monkeypatch.setattr(study_module, "STARTUP_TRIALS", 1)
    flags = [*TINY, *QUIET_TRACKERS, "--max-iters", 3000, "--eval-interval", 20, "--data", text_file]
    space = write_space(learning_rate=[1e-3, 1e-9])  # a grid is shuffled, and 1e-3 comes first
    assert search("--space", space, *flags, "--sampler", "grid").code == 0
    good, hopeless = results()
    assert (good["state"], hopeless["state"]) == ("complete", "pruned")
    last = [row["step"] for row in read_metrics(Path(hopeless["run"], "logs/metrics.jsonl"))][-1]
    assert 700 <= last < 3000 and not Path(hopeless["run"], "eval/final.json").exists()


SMALL = TINY[: TINY.index("--threads")]  # the search divides the cores
FLAGS = ["--data", "text.txt", *SMALL, *QUIET_TRACKERS, "--max-iters", "60", "--eval-interval", "10"]
KILLED = ["--trials", "3", "--no-prune", "--workers", "2", "--study", "k", *FLAGS]


@pytest.fixture(scope="module")
def killed_search(tmp_path_factory) -> Iterator[tuple[Path, str]]:
    """A search that was killed together with one of its two running trials, and then continued."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    space = {"learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}, "weight_decay": [0.01, 0.1]}
    (folder / "space.yaml").write_text(json.dumps(space))
    script, log = str(PROJECT / "search.py"), folder / "searches/k/search.log"
    process = start_search("--space", "space.yaml", *KILLED, script=script, cwd=folder)
    wait_for(lambda: log.exists() and log.read_text().count("complete") >= 1)
    wait_for(lambda: len(list_runs(folder / "runs")) == 3)
    victims = children_of(process.pid)
    process.kill()
    for pid in victims[:1]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    process = start_search("--space", "space.yaml", *KILLED, script=script, cwd=folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    yield folder, out


def test_a_trial_whose_search_is_killed_saves_and_leaves_and_is_continued(text_file):
    Path("space.yaml").write_text(json.dumps({"learning_rate": [1e-3]}))
    flags = ["--space", "space.yaml", "--trials", 1, *FLAGS, "--max-iters", 100_000]
    process = start_search(*flags, script=str(PROJECT / "search.py"))
    wait_for(lambda: list_runs("runs") and list(Path("runs").glob("*/artifacts/checkpoints/step_*")))
    (child,) = children_of(process.pid)
    process.kill()
    process.communicate()
    (run,) = list_runs("runs")
    wait_for(lambda: not in_use(run), 20)
    wait_for(lambda: not Path(f"/proc/{child}/fd").exists() or not os.listdir(f"/proc/{child}/fd"), 20)
    assert re.search(r"stopped at step \d+; continue with", (run / "logs/train.log").read_text())
    assert checkpoint_paths(run / "artifacts/checkpoints")[-1].name > "step_000000000.safetensors"


def test_a_run_that_still_trains_is_waited_for_and_named(search, fake_train, monkeypatch):
    study = open_study("space", learning_rate=RATES)
    begun = study.ask()
    begun.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
    run = create_run("runs")
    begun.set_user_attr("run", str(run.path))
    study.tell(begun, state=optuna.trial.TrialState.FAIL)
    optuna.storages.RetryHeartbeatStaleTrialCallback()(study, study.trials[begun.number])
    checkpoint_path(run.checkpoint_dir, 0).touch()
    run.is_new = False
    run.lock.release()
    answers = iter([True] * 3)
    monkeypatch.setattr(trials_module, "in_use", lambda path: path == run.path and next(answers, False))
    result = search("--space", "space.yaml", "--trials", 2)
    assert result.code == 0, result.err
    assert f" continues {run.path}, which still trains: waiting for it\n" in result.out
    assert 0.125 in [trial.value for trial in counted()]


@pytest.fixture
def after_the_kill(killed_search, monkeypatch) -> str:
    """The output of the continued search, whose folder is the working folder."""
    monkeypatch.chdir(killed_search[0])
    return killed_search[1]


def test_a_killed_search_ends_with_exactly_its_trials(after_the_kill):
    stale = [trial for trial in trials_of("k") if trial.state.name == "FAIL"]
    assert stale and len(trials_of("k")) == 3 + len(stale)
    rows = results("k")
    assert [row["state"] for row in rows] == ["complete"] * 3
    assert len({row["run"] for row in rows}) == 3
    assert "trials    3 (3 complete)\n" in after_the_kill


def test_the_table_holds_what_the_runs_have_reached(after_the_kill):
    for row in results("k"):
        final = json.loads(Path(row["run"], "eval/final.json").read_text())
        assert float(row["val_loss"]) == final["export_val_loss"]
        used = json.loads(Path(row["run"], "meta/full_config.json").read_text())["parameters"]
        assert float(row["learning_rate"]) == used["learning_rate"]
        assert float(row["weight_decay"]) == used["weight_decay"]
        share = max(1, len(os.sched_getaffinity(0)) // 2)
        assert (used["max_iters"], used["threads"], final["steps"]) == (60, share, 60)


def test_something_is_better_than_the_defaults_and_there_are_pictures(after_the_kill):
    (defaults,) = [trial for trial in counted("k") if "defaults" in trial.user_attrs]
    assert defaults.params == {"learning_rate": 1e-3, "weight_decay": 0.01}
    assert min(trial.value for trial in counted("k")) < defaults.value
    for name in ("history", "importance", "slice"):
        assert Path(f"searches/k/{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_best_preset_is_the_best_trial_at_the_length_of_a_normal_run(after_the_kill, train):
    best = min(results("k"), key=lambda row: float(row["val_loss"]))
    Path("config.json").write_text('{"max_iters": 70, "n_embd": 128}')  # configs/ and config.json stand below
    shown = train("--config", "searches/k/best.yaml", "--print-config")
    Path("config.json").unlink()
    assert shown.code == 0, shown.err
    values = {name: value for name, (value, _) in printed_config(shown.out).items()}
    used = json.loads(Path(best["run"], "meta/full_config.json").read_text())["parameters"]
    changed = {name for name in used if values[name] != used[name]}
    budget = {"max_iters", "eval_interval", "eval_iters", "histogram_interval"}
    assert changed == budget | {"aim", "tensorboard", "playground", "run_tag", "threads"}
    assert (values["max_iters"], values["aim"], values["tensorboard"]) == (70, True, True)
    flags = ["--max-iters", 60, "--eval-interval", 10, "--eval-iters", 2, *QUIET_TRACKERS, "--quiet"]
    assert train("--config", "searches/k/best.yaml", *flags, "--threads", used["threads"]).code == 0
    final = json.loads(Path(list_runs("runs")[-1], "eval/final.json").read_text())
    assert final["export_val_loss"] == float(best["val_loss"])


def test_a_study_goes_on_with_the_same_plan_only(after_the_kill, search):
    flags = [flag for flag in KILLED if flag != "--no-aim"]
    changed = ["--space", "space.yaml", *flags, "--max-iters", "61", "--threads", "2", "--aim"]
    result = search(*changed)
    assert result.code == 2
    assert result.err == (
        "error: the study k has begun with other settings: max_iters: 60 -> 61\n"
        "hint: name another --study, or remove searches/k\n"
    )
    Path("other.yaml").write_text('{"learning_rate": [0.1], "beta1": [0.8]}')
    result = search("--space", "other.yaml", *KILLED)
    assert result.code == 2
    assert all(f"{name}: " in result.err for name in ("learning_rate", "weight_decay", "beta1"))


# --- what comes of a search ---------------------------------------------------------------------------


def printed_next(search, *flags: object) -> str:
    result = search("--space", write_space(learning_rate=[1e-3, 1e-2]), "--trials", 1, *flags)
    assert result.code == 0, result.err
    return result.out.rstrip().splitlines()[-1]


@pytest.mark.parametrize("where", ["flag", "preset"])
def test_the_printed_command_trains_as_long_as_without_a_search(where, search, fake_train, train):
    Path("mine").mkdir()
    Path("mine/train.yaml").write_text("max_iters: 40\nlr_schedule: cosine\n")
    flags = ["--max-iters", 20] if where == "flag" else ["--config", "mine", "--max-iters", 20]
    shown = printed_next(search, *flags)
    command = {"flag": "for 5,000 steps", "preset": "--max-iters=40   for 40 steps"}[where]
    start = "next      python train.py --config searches/space/best.yaml"
    assert shown == f"{start}{'   ' if where == 'flag' else ' '}{command}"
    words = shown.removeprefix("next      python train.py ").partition("   for ")[0].split()
    values = printed_config(train(*words, "--print-config").out)
    assert values["max_iters"][0] == {"flag": 5000, "preset": 40}[where]
    assert values["lr_schedule"][0] == {"flag": "constant", "preset": "cosine"}[where]


def test_a_length_that_is_searched_is_that_of_the_best_trial(search, fake_train, train):
    space = write_space(max_iters=[20, 30], learning_rate=[1e-3])
    result = search("--space", space, "--trials", 1)
    assert result.code == 0, result.err
    shown = train("--config", "searches/space/best.yaml", "--print-config")
    steps = printed_config(shown.out)["max_iters"][0]
    assert steps in (20, 30)
    assert result.out.rstrip().endswith(f"best.yaml   for {steps} steps")


@pytest.mark.parametrize(
    ("limits", "labels"),
    [
        ((1.6e-4, 4.6e-3), ["0.0003", "0.001", "0.003"]),
        ((8e-6, 2.0), ["1e-05", "0.001", "0.1"]),
        ((0.9, 2.4), ["1", "2"]),
        ((1.1e-3, 4e-3), ["0.002", "0.003", "0.004"]),
        ((30, 130), ["30", "100"]),
    ],
)
def test_a_logarithmic_axis_has_plain_numbers(limits, labels):
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    results_module.set_ticks(axes)
    shown = [axes.xaxis.get_major_formatter()(tick, 0) for tick in axes.get_xticks()]
    assert shown == labels and len(axes.get_xticks(minor=True)) == 0


def test_the_colour_bar_of_the_trials_has_whole_numbers():
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure()
    bar = figure.colorbar(ScalarMappable(Normalize(0, 2)), ax=figure.add_subplot())
    assert any(tick % 1 for tick in bar.ax.get_yticks())
    results_module.set_ticks(bar.ax)
    assert bar.ax.get_yticks().tolist() == [0, 1, 2]
