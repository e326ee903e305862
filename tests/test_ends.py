"""How runs end: an interrupted one that is finished where it is, and what is said at the end of a run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from conftest import QUIET_TRACKERS, TINY, lasting_metrics, runner, stop_at

from parameters import Parameters, specs
from utils_alg1.console.command_line import OF_STEPS
from utils_alg1.network.tensor_file import read_tensors
from utils_alg1.report import results as results_module
from utils_alg1.report.summary import describe_overfitting, overfits
from utils_alg1.run_directory import checkpoint_paths, list_runs
from utils_alg1.training.progress import Evaluation, Progress


@pytest.fixture
def start(train, text_file, monkeypatch):
    monkeypatch.setattr("utils_alg1.report.pictures.draw_loss_curve", lambda *_: None)
    monkeypatch.setattr(results_module, "SAMPLE_LENGTH", 4)
    return lambda *flags: train("--data", text_file, *TINY, *QUIET_TRACKERS, *flags)


@pytest.fixture
def compare(capsys):
    import compare as script

    return runner(script.main, capsys)


@pytest.fixture
def interrupted(start, monkeypatch) -> tuple[Path, list[str]]:
    """A run that Ctrl-C has ended at step 4, an evaluation at step 3, and the last lines that it printed."""
    with monkeypatch.context() as patch:
        stop_at(3, patch, lambda: signal.raise_signal(signal.SIGINT))
        result = start("--eval-interval", 3)
    assert result.code == 130
    (run,) = list_runs("runs")
    assert not (run / "eval/final.json").exists()
    return run, result.out.splitlines()[-2:]


# --- --finish -----------------------------------------------------------------------------------------


def test_after_ctrl_c_both_ways_to_go_on_are_named(interrupted):
    run, lines = interrupted
    assert lines == [
        f"stopped at step 4; continue with: python train.py --resume {run}",
        f"or end it here, with its export and report: python train.py --resume {run} --finish",
    ]


def test_finish_writes_the_results_of_the_newest_checkpoint_and_takes_no_step(interrupted, train, compare):
    run, lines = interrupted
    before = {path: path.read_bytes() for path in checkpoint_paths(run / "artifacts/checkpoints")}
    words = shlex.split(lines[1].split(": ")[1])
    result = train(*words[2:])
    assert (result.code, result.err) == (0, "")
    assert "steps    4 of 6; --finish takes no more\n" in result.out
    assert f"  python train.py --resume {run}\n" in result.out
    after = {path: path.read_bytes() for path in checkpoint_paths(run / "artifacts/checkpoints")}
    assert after == before
    final = json.loads((run / "eval/final.json").read_text())
    assert final["steps"] == 4
    assert final["export"] == {"weights": "best", "step": final["best_step"]}
    evaluated = re.findall(r"^step +(\d+)  train loss \S+  val loss (\S+)", result.out, re.M)
    assert evaluated == [("4", f"{final['val_loss']:.4f}")]
    assert (run / "eval/report.html").exists() and (run / "eval/samples.txt").exists()
    assert json.loads((run / "meta/full_config.json").read_text())["parameters"]["max_iters"] == 6
    (row,) = json.loads(compare("--json").out)
    assert (row["state"], row["step"], row["export_val_loss"]) == ("done", 4, final["export_val_loss"])
    assert row["resumed"] is False
    assert re.search(r" done +4 of 6\b", compare().out)


def test_a_run_that_was_finished_goes_on_to_the_same_bytes(interrupted, start, train):
    run, _ = interrupted
    assert train("--resume", run, "--finish", "--export", "last").code == 0
    assert train("--resume", run).code == 0
    assert start("--eval-interval", 3, "--runs-dir", "whole").code == 0
    (whole,) = list_runs("whole")
    for name in ("checkpoints/step_000000006.safetensors", "export/model.safetensors"):
        ours, theirs = (read_tensors(folder / "artifacts" / name)[0] for folder in (run, whole))
        assert ours.keys() == theirs.keys()
        assert all(tensor.equal(theirs[key]) for key, tensor in ours.items())
    ours, theirs = (lasting_metrics(folder / "logs/metrics.jsonl") for folder in (run, whole))
    assert ours == theirs


def test_finish_without_the_text_names_both_remedies(interrupted, train, sample):
    run, _ = interrupted
    Path("text.txt").rename("moved.txt")
    shutil.rmtree(".tokens", ignore_errors=True)
    result = train("--resume", run, "--finish")
    assert result.code == 2
    assert result.err.splitlines()[1] == (
        "hint: put the text of the run there, or name where it lies now: --data PATH;"
        f" without it, its newest checkpoint can be sampled: python inference.py --run {run}"
    )
    assert not (run / "eval/final.json").exists()
    assert sample("--run", run, "--max-new-tokens", 5).code == 0
    assert train("--resume", run, "--finish", "--data", "moved.txt").code == 0
    assert (run / "eval/report.html").exists()


def test_finish_of_a_run_that_took_no_step_says_that_it_is_untrained(start, train, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(0, patch, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start()
    result = train("--resume", "latest", "--finish")
    expected = "warning: no step was taken: the exported weights are those that the run began with\n"
    assert (result.code, result.err) == (0, expected)


def test_finish_needs_a_run(train):
    result = train("--finish")
    assert result.code == 2
    assert result.err == (
        "error: --finish needs a run\n"
        "hint: name it: --resume RUN --finish; python train.py --help lists every flag\n"
    )


def test_finish_refuses_what_only_further_steps_heed(interrupted, train):
    run, _ = interrupted
    result = train("--resume", run, "--finish", "--max-iters", 9, "--export", "last", "--patience=3")
    assert result.code == 2
    assert result.err == (
        "error: --finish takes no step: leave --max-iters, --patience out\n"
        "hint: python train.py --help lists every flag\n"
    )
    assert not (run / "eval/final.json").exists()
    assert {*OF_STEPS} <= specs().keys()


# --- what is said at the end --------------------------------------------------------------------------


def test_the_sample_stands_before_the_commands(start):
    out = start().out
    assert (
        out.index("\nreport  ")
        < out.index("\na sample:\n")
        < out.index("\nsample  ")
        < out.index("\ncontinue ")
    )


def overfitting(
    val_loss: float, train_loss: float, best: float = 2.0, weights: str = "best", **values: float
) -> str | None:
    """What is told of a run that was at its best at step 300, and ended at step 500; None if nothing is."""
    progress = Progress(500, best_val=best, best_step=300)
    progress.evaluation = Evaluation(500, train_loss, val_loss, 1e-3)
    params = Parameters.from_values(values, {})
    if not overfits(progress):
        return None
    return describe_overfitting(params, progress, {"weights": weights, "step": 300})


def test_a_val_loss_that_has_risen_while_the_train_loss_fell_is_told():
    told = "val loss has risen by 0.3000 since step 300: the export has the weights of step 300."
    ways = "--patience 5, fewer steps or a longer text"
    assert overfitting(2.3, 1.0) == f"{told} In a new run, try --dropout 0.2, {ways}"
    told = told.partition(": ")[0] + ": the export has the last weights; --export best keeps the better ones."
    ways = "more --dropout than 0.1, fewer steps or a longer text"
    assert (
        overfitting(2.3, 1.0, weights="last", dropout=0.1, patience=2) == f"{told} In a new run, try {ways}"
    )


@pytest.mark.parametrize(
    ("val_loss", "train_loss"),
    [(2.0, 1.0), (2.0286, 1.9), (2.049, 1.5), (4.0, 3.9)],
    ids=["at its best", "as README's run", "within the margin", "both losses rose: diverged"],
)
def test_what_is_no_overfitting_is_not_called_so(val_loss, train_loss):
    assert overfitting(val_loss, train_loss) is None


def test_a_run_that_learns_its_text_by_heart_says_so(start, workdir):
    Path("text.txt").write_text("ab" * 450 + "aabb" * 25)
    result = start("--max-iters", 60, "--eval-interval", 10, "--learning-rate", 0.05)
    assert result.code == 0
    step = json.loads((list_runs("runs")[0] / "eval/final.json").read_text())["best_step"]
    assert re.search(
        rf"^overfit +val loss has risen by \S+ since step {step}: the export has the", result.out, re.M
    )
    assert "\ncontinue  " not in result.out
    Path("text.txt").write_text("ab" * 500)
    assert "overfit" not in start("--max-iters", 60, "--eval-interval", 10, "--learning-rate", 0.05).out


# --- texts that are too short -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ([], ": 30 of them are for validation"),
        (["--train-split", 0.05], ": 15 of them are for training"),
        (["--val-data", "long.txt"], ""),
    ],
)
def test_a_text_that_is_too_short_says_which_part_of_it_is(flags, part, train, workdir):
    Path("short.txt").write_text("abc" * 100)
    Path("long.txt").write_text("cab" * 200)
    result = train("--data", "short.txt", "--block-size", 32 if part else 400, *flags)
    assert result.code == 2
    message = result.err.splitlines()[0]
    size = 32 if part else 400
    assert message == f"error: short.txt: 300 characters are too few for block_size = {size}{part}"
