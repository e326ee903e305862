"""compare.py --send-to: each tracker gets the curves that it lacks, each point once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, Result, lasting_metrics, runner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import compare as script
from utils_alg1.base.errors import BAD_INPUT
from utils_alg1.run_directory import RunFolder, list_runs, lock_run
from utils_alg1.tracking.aim_record import read_record
from utils_alg1.tracking.metrics_file import read_metrics
from utils_tensorboard.logger import MetricLogger, tag
from utils_tensorboard.writer import TensorBoardWriter

OFF = ["--no-aim", "--no-tensorboard"]
ROWS, POINTS = 10, 26  # of a run of TINY: 6 steps and 4 evaluations


@pytest.fixture
def compare(capsys):
    return runner(script.main, capsys)


@pytest.fixture
def run(train, text_file) -> RunFolder:
    """A run that no tracker was told of."""
    assert (
        train("--data", "text.txt", *TINY, *OFF, "--run-tag", "mine", "--gradient-norm-interval=0").code == 0
    )
    (path,) = list_runs("runs")
    return RunFolder(path)


def events(run: RunFolder) -> EventAccumulator:
    return EventAccumulator(str(run.tensorboard_dir), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def in_tensorboard(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    found = events(run)
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def in_metrics(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """The curves of the metrics file as TensorBoard shows them: in float32."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(run.metrics_path):
        step = int(row.pop("step"))
        for name, value in row.items():
            curves.setdefault(tag(name), []).append((step, float(np.float32(value))))
    losses = [value for _, value in curves["Loss/val"]]
    lowest = np.minimum.accumulate(losses).tolist()
    curves["Results/best_val"] = [
        (step, low) for (step, _), low in zip(curves["Loss/val"], lowest, strict=True)
    ]
    return curves


def check(result: Result, *lines: str) -> None:
    assert (result.code, result.err, result.out.splitlines()) == (0, "", list(lines))


def test_tensorboard_gets_a_run_that_it_was_off_for_once(run, compare, train):
    where = f"TensorBoard, {run.tensorboard_dir}"
    sent = f"{run.run_id}: sent {POINTS} points of {ROWS} rows, to step 6, to {where}"
    check(compare("latest", "--send-to", "tensorboard"), sent)
    assert in_tensorboard(run) == in_metrics(run)
    files = sorted(run.tensorboard_dir.iterdir())
    check(
        compare(run.path, "--send-to", "tensorboard"),
        f"{run.run_id}: TensorBoard has all of its curves, to step 6",
    )
    assert sorted(run.tensorboard_dir.iterdir()) == files
    # A resume continues the same curves.
    assert train("--resume", "latest", "--max-iters", 8, "--tensorboard").code == 0
    assert in_tensorboard(run) == in_metrics(run)
    assert [step for step, _ in in_metrics(run)["Loss/train_step"]] == list(range(8))


def test_tensorboard_gets_what_follows_the_last_point_of_each_curve_and_keeps_the_rest(run, compare):
    logger = MetricLogger(TensorBoardWriter(run.tensorboard_dir, warn=pytest.fail))
    for row in list(read_metrics(run.metrics_path))[:4]:
        step = int(row.pop("step"))
        logger.log("scalars", {name: value for name, value in row.items() if name != "tokens"}, step)
    model = np.arange(4.0)
    logger.log("histograms", [], 0)
    logger.writer.attempt(lambda writer: writer.add_histogram("Parameters/p", model, 5))
    logger.close()
    before = sum(map(len, in_tensorboard(run).values()))
    n_missing = POINTS - before
    result = compare("--send-to", "tensorboard")
    assert result.out.startswith(f"{run.run_id}: sent {n_missing} points of {ROWS} rows, to step 6, to ")
    assert in_tensorboard(run) == in_metrics(run)
    assert [e.step for e in events(run).Histograms("Parameters/p")] == [5]


def test_aim_gets_a_run_that_it_was_off_for_once(run, compare, workdir):
    aim = pytest.importorskip("aim", reason="Aim is not installed")
    sent = f"{run.run_id}: sent {POINTS} points of {ROWS} rows, to step 6, to Aim, {workdir / '.aim'}"
    check(compare("--tag", "mine", "--send-to", "aim"), sent)
    before = {path: path.read_bytes() for path in (workdir / ".aim" / "meta").rglob("*") if path.is_file()}
    check(compare("--send-to", "aim"), f"{run.run_id}: Aim has all of its curves, to step 6")
    after = {path: path.read_bytes() for path in (workdir / ".aim" / "meta").rglob("*") if path.is_file()}
    assert after == before  # the duration of its run too
    (kept,) = aim.Repo(str(workdir)).iter_runs()
    assert (kept.name, kept.experiment, kept.tags) == (run.run_id, "mine", ["mine"])
    assert read_record(run).run_hash == kept.hash
    assert (kept["hparams"]["n_embd"], kept["hparams"]["max_iters"]) == (16, 6)
    assert set(kept["git"]) == {"commit", "branch", "dirty"}
    losses = {}
    for row in read_metrics(run.metrics_path):
        losses |= {(name, row["step"]): row[name] for name in row if name.startswith("loss/")}
    found = {}
    for metric in kept.metrics():
        if metric.name == "loss":
            steps, (values, *_) = metric.data.items_list()
            name = f"loss/{metric.context['subset']}"
            assert len(set(steps)) == len(steps)
            found |= {(name, step): value for step, value in zip(steps, values, strict=True)}
    assert found == losses


def test_aim_gets_what_follows_the_last_point_of_each_curve(run, compare, train, workdir):
    pytest.importorskip("aim", reason="Aim is not installed")
    compare("--send-to", "aim")
    assert train("--resume", "latest", "--max-iters", 8, *OFF).code == 0
    n_rows = len(list(read_metrics(run.metrics_path)))
    n_new = sum(map(len, in_metrics(run).values())) - POINTS
    sent = f"{run.run_id}: sent {n_new} points of {n_rows} rows, to step 8, to Aim, "
    assert compare("--send-to", "aim").out.startswith(sent)
    has_all = f"{run.run_id}: Aim has all of its curves, to step 8"
    check(compare("--send-to", "aim"), has_all)
    # A copy has no run in Aim.
    copy = RunFolder(run.path.with_name("2026-01-01_001"))
    shutil.copytree(run.path, copy.path)
    assert compare(copy.path, "--send-to", "aim").out.startswith(f"{copy.run_id}: sent ")


def test_a_run_that_was_resumed_after_its_end_is_sent_without_a_word_of_tensorboards(run, compare, train):
    compare("--send-to", "tensorboard")
    assert train("--resume", "latest", "--max-iters", 8, "--tensorboard").code == 0
    script_path = Path(script.__file__)
    done = subprocess.run(
        [sys.executable, script_path, run.path, "--send-to", "tensorboard"], capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout == f"{run.run_id}: TensorBoard has all of its curves, to step 8\n"


def test_what_cannot_be_sent_is_one_line_and_makes_nothing(run, compare, workdir):
    metrics = run.metrics_path.read_bytes()
    before = sorted(workdir.rglob("*"))

    def refused(*flags) -> str:
        result = compare(*flags)
        assert (result.code, result.out) == (BAD_INPUT, "")
        assert sorted(path for path in workdir.rglob("*") if path.name != ".lock") == [
            path for path in before if path.name != ".lock"
        ]
        return result.err.splitlines()[0]

    assert refused("--send-to", "wandb").startswith("error: --send-to: invalid choice: 'wandb'")
    assert refused("--send-to", "aim", "--json").startswith("error: --json: not allowed with")
    assert refused("none", "--send-to", "aim") == "error: none: no such run in runs, and no run directory"
    with lock_run(run.path):
        assert refused("--send-to", "aim") == f"error: {run.path} is in use by another process"
        assert compare("--send-to", "aim").err.endswith("\nhint: wait for it, or end it\n")
    run.metrics_path.write_bytes(b"{\n" + metrics)
    assert refused("--send-to", "aim") == f"error: {run.metrics_path}: a row is damaged"
    resume = f"continue there: python train.py --resume {run.path}\n"
    assert compare("--send-to", "aim").err.endswith(resume)
    run.metrics_path.write_bytes(b"")
    assert refused("--send-to", "aim") == f"error: {run.metrics_path} has no rows to send"
    run.metrics_path.write_bytes(metrics)
    run.record_path.write_text(json.dumps({"parameters": {}}))
    assert refused("--send-to", "aim") == f"error: {run.record_path} is not the record of a run"


def test_of_several_runs_those_that_can_be_sent_are_sent(run, compare):
    other = RunFolder(run.path.with_name("2026-01-01_001"))
    shutil.copytree(run.path, other.path)
    run.metrics_path.write_bytes(b"")
    result = compare("--send-to", "tensorboard")
    assert result.code == BAD_INPUT
    assert result.err == f"error: {run.metrics_path} has no rows to send\nhint: send a run that has trained\n"
    assert result.out.startswith(f"{other.run_id}: sent {POINTS} points")
    assert in_tensorboard(other) == in_metrics(other)


@pytest.mark.parametrize("name", ["aim", "tensorboard"])
def test_a_tracker_that_fails_is_an_error_with_its_reason(run, compare, name, monkeypatch, workdir):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils_aim.tracker._open_run", fail)
    monkeypatch.setattr("utils_tensorboard.logger._log", fail)
    where = {"aim": f"Aim, {workdir / '.aim'}", "tensorboard": f"TensorBoard, {run.tensorboard_dir}"}[name]
    result = compare("--send-to", name)
    assert result.code == BAD_INPUT
    full = "No space left on device"
    reason = {"aim": f"cannot use {workdir / '.aim'} ({full}); free some space", "tensorboard": full}[name]
    error = f"{run.run_id} was not sent to {where}: {reason}"
    assert result.err == f"error: {error}\nhint: send it again after that\n"


def test_named_runs_alone_are_compared(run, compare):
    other = run.path.with_name("2026-01-01_001")
    shutil.copytree(run.path, other)
    assert [row["run"] for row in json.loads(compare("--json").out)] == [run.run_id, other.name]
    assert [row["run"] for row in json.loads(compare(other, "--json").out)] == [other.name]
    names = (other.name, run.run_id, Path("runs", other.name))
    assert [row["run"] for row in json.loads(compare(*names, "--json").out)] == [other.name, run.run_id]


def test_sending_leaves_the_run_as_it_is(run, compare):
    metrics = lasting_metrics(run.metrics_path)
    compare("--send-to", "tensorboard")
    assert lasting_metrics(run.metrics_path) == metrics
    assert lock_run(run.path).lock.is_locked
