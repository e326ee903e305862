"""Runs, checkpoints and exports of an earlier commit load, and resume to the bytes that it gave.

The fixture, and how it was made: tests/fixtures/README.md. What arithmetic gives depends on the processor and
on the build of PyTorch. Where these are those that the fixture was made with, everything is compared byte for
byte ("bytes" in the name of the test); elsewhere floating-point results may differ by TOLERANCE and sampled
text is not compared, everything else is ("values").
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result, lasting_metrics, runner

from model import BigramLanguageModel
from parameters import specs
from utils_alg1.console.script import run_script
from utils_alg1.network.tensor_file import read_tensors, write_tensors
from utils_alg1.report import page as page_module
from utils_alg1.report import pictures as pictures_module
from utils_alg1.report import results as results_module
from utils_alg1.training.arithmetic import Arithmetic, Processor, environment
from utils_alg1.training.resume import load_model_file

FIXTURES = Path(__file__).parent / "fixtures"
RUNS = ("adamw", "muon")
STOPPED, LAST = 6, 12  # steps
TOLERANCE = 1e-4
EXPORT = Path("artifacts/export/model.safetensors")
METRICS = Path("logs/metrics.jsonl")


def this_machine() -> dict[str, str]:
    """What results of floating-point arithmetic depend on, beside the number of threads."""
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpu = ""
    names = [line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": names[0] if names else "unknown",
    }


COMPARISON = "bytes" if this_machine() == json.loads((FIXTURES / "made_with.json").read_text()) else "values"


def checkpoint(step: int) -> Path:
    """Where a run directory has the checkpoint of a step."""
    return Path(f"artifacts/checkpoints/step_{step:09d}.safetensors")


def run_id(name: str) -> str:
    return f"2026-11-26_001_{name}"


@pytest.fixture(params=RUNS)
def name(request: pytest.FixtureRequest) -> str:
    """The name of a run."""
    return request.param


def copy_stopped(name: str, folder: Path) -> Path:
    """Copy the stopped run to a folder as its owner has it; returns the run directory."""
    shutil.copy(FIXTURES / "text.txt", folder)
    return Path(shutil.copytree(FIXTURES / name / "stopped", folder / "runs" / run_id(name)))


@pytest.fixture
def stopped(name: str, workdir: Path) -> Path:
    """A copy of the stopped run, in the working folder."""
    return copy_stopped(name, workdir)


@pytest.fixture
def finished(name: str, stopped: Path) -> Path:
    """The same for the run that the earlier commit resumed to its end."""
    return Path(shutil.copytree(FIXTURES / name / "finished", stopped, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def resume(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Result]]:
    """Resumes a copy of the stopped run of a name, once; returns its directory and what train.py said.

    The pictures take most of the time and are not drawn: what they show is read for the page too.
    """
    import train as script

    @functools.cache
    def resumed(name: str) -> tuple[Path, Result]:
        folder, out, err = tmp_path_factory.mktemp(name), io.StringIO(), io.StringIO()
        path = copy_stopped(name, folder)
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as stop,
        ):
            patch.setattr(pictures_module, "draw_loss_curve", lambda *_: None)
            patch.setattr(pictures_module, "draw_attention", lambda *_: b"")
            run_script(lambda: script.main(["--resume", "latest"]))
        return path, Result(int(stop.value.code or 0), out.getvalue(), err.getvalue())

    return resumed


@pytest.fixture
def short_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs end without pictures, page and long samples, which take most of the time."""
    monkeypatch.setattr(page_module, "write_report", lambda *_: None)
    monkeypatch.setattr(results_module, "SAMPLE_LENGTH", 4)


def assert_alike(now: Any, then: Any, place: str) -> None:
    """Equal; or where only values are compared, with floats that differ by TOLERANCE."""
    if COMPARISON == "values" and isinstance(then, dict) and isinstance(now, dict):
        assert now.keys() == then.keys(), place
        for key, value in then.items():
            assert_alike(now[key], value, f"{place}, {key}")
    elif COMPARISON == "values" and isinstance(then, float) and not place.endswith("learning_rate"):
        assert now == pytest.approx(then, rel=TOLERANCE, abs=TOLERANCE), place
    else:
        assert now == then, place


def without_new(now: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    """The values without the parameters that there were not then, which are at their defaults."""
    new = now.keys() - then.keys()
    assert {name: now[name] for name in new} == {name: specs()[name].default for name in new}
    return {name: value for name, value in now.items() if name not in new}


def assert_same_tensors(path: Path, then: Path) -> None:
    """As `assert_alike`, for a file's tensors and metadata; times, trackers and evaluations may differ."""
    (tensors, about), (old_tensors, old_about) = read_tensors(path), read_tensors(then)
    assert about is not None and old_about is not None
    for metadata in (about, old_about):
        metadata.get("provenance", {}).pop("val_loss", None)
        if "progress" in metadata:
            metadata["progress"] = metadata["progress"]["step"]
            metadata["trackers"] = {key: sorted(copy) for key, copy in metadata["trackers"].items()}
    if "compiled" in old_about:  # what newer checkpoints hold in its place
        old = {
            "gradient": "autograd" if old_about["parameters"]["dropout"] else "manual",
            "compiled": old_about.pop("compiled"),
            "joined": False,
            **environment(torch.device("cpu"), Processor.read()),
        }
        assert about.pop("arithmetic") == vars(Arithmetic(**old))
    if "origins" not in old_about:
        about.pop("origins", None)
    if "parameters" in about:
        about["parameters"] = without_new(about["parameters"], old_about["parameters"])
    assert_alike(about, old_about, path.name)
    assert list(tensors) == list(old_tensors)
    for key, tensor in old_tensors.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=TOLERANCE, atol=TOLERANCE)
        if COMPARISON == "bytes":
            assert tensors[key].numpy().tobytes() == tensor.numpy().tobytes(), key


def metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, without what evaluations find: that commit's read other characters."""
    rows = [json.loads(line) for line in lasting_metrics(path).splitlines()]
    other = ("loss/train", "loss/val", "tokens")
    return [{name: value for name, value in row.items() if name not in other} for row in rows]


def saved_again(path: Path, folder: Path) -> bytes:
    """The bytes of a tensor file, read and written by the present code."""
    tensors, metadata = read_tensors(path)
    assert metadata is not None
    write_tensors(folder / "again.safetensors", tensors, metadata)
    return (folder / "again.safetensors").read_bytes()


@pytest.mark.parametrize("comparison", [COMPARISON])
def test_a_stopped_run_resumes_to_what_the_earlier_commit_gave(name, comparison, resume):
    then = FIXTURES / name / "finished"
    stopped, result = resume(name)
    assert result.code == 0, result.err
    (warning,) = result.err.splitlines()
    assert warning.startswith("warning: the evaluations from here on read other sequences than those before")
    assert f"<title>{stopped.name}" in (stopped / "eval/report.html").read_text(encoding="utf-8")
    assert_same_tensors(stopped / checkpoint(LAST), then / checkpoint(LAST))
    same_export = name == "muon"  # the best evaluation of the other is that of another step
    if same_export:
        assert_same_tensors(stopped / EXPORT, then / EXPORT)
    config = Path("artifacts/export/config.json")
    assert (stopped / config).read_bytes() == (then / config).read_bytes()
    rows, old_rows = metrics(stopped / METRICS), metrics(then / METRICS)
    for row, old_row in zip(rows, old_rows, strict=True):
        assert_alike(row, old_row, f"step {old_row['step']}")
    samples = Path("eval/samples.txt")
    if comparison == "bytes":
        assert not same_export or (stopped / samples).read_bytes() == (then / samples).read_bytes()
        assert rows == old_rows
    else:
        assert len((stopped / samples).read_text()) == len((then / samples).read_text())


def test_its_curves_in_tensorboard_go_on(resume):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, _ = resume("adamw")
    events = EventAccumulator(str(path / "logs" / "tensorboard")).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps["Loss/train_step"] == list(range(LAST))
    assert steps["Loss/train"] == steps["Loss/val"] == steps["Learning_Rate"] == [0, 4, 8, 12]


def test_an_export_loads_and_is_saved_again_to_the_same_bytes(finished, tmp_path):
    model = BigramLanguageModel()
    model.load_safetensors(finished / EXPORT)
    model.save_safetensors(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (finished / EXPORT).read_bytes()
    assert saved_again(finished / EXPORT, tmp_path) == (finished / EXPORT).read_bytes()


@pytest.mark.parametrize("step", [STOPPED, LAST])
def test_a_checkpoint_loads_and_is_saved_again_to_the_same_bytes(finished, step, tmp_path):
    path = finished / checkpoint(step)
    tensors, metadata = read_tensors(path)
    model = load_model_file(path, print)
    assert metadata is not None and model.vocabulary == metadata["vocabulary"]
    assert {f"model.{key}" for key in model.state_dict()} == {k for k in tensors if k.startswith("model.")}
    for key, tensor in model.state_dict().items():
        assert tensor.equal(tensors[f"model.{key}"]), key
    assert saved_again(path, tmp_path) == path.read_bytes()


def test_an_export_has_the_weights_of_its_checkpoint(finished):
    model = load_model_file(finished / EXPORT, print)
    same = load_model_file(finished / checkpoint(model.provenance["step"]), print).state_dict()
    assert all(tensor.equal(same[key]) for key, tensor in model.state_dict().items())


def test_an_export_says_what_it_said(name, finished, sample):
    result = sample("--temperature", 0, "--prompt", "so ", "--max-new-tokens", 60)
    assert result.code == 0, result.err
    assert result.out == (FIXTURES / name / "greedy.txt").read_text(encoding="utf-8")


def test_compare_lists_a_run_as_it_did(name, finished, capsys):
    import compare

    result = runner(compare.main, capsys)("--json")
    assert result.code == 0, result.err
    (row,), (then,) = json.loads(result.out), json.loads((FIXTURES / name / "compare.json").read_text())
    assert row | then == row and row["export_val_loss"] is None  # there may be further columns


def test_compare_lists_a_stopped_run(stopped, capsys):
    import compare

    result = runner(compare.main, capsys)("--json")
    (row,) = json.loads(result.out)
    assert (row["run"], row["state"], row["step"]) == (stopped.name, "unfinished", STOPPED)


def test_a_new_run_starts_from_an_export(finished, train, short_end):
    shape = ["--max-iters", 1, "--batch-size", 2, "--threads", 1, "--device", "cpu", "--no-tensorboard"]
    result = train("--data", "text.txt", "--init-from", finished / EXPORT, "--no-aim", *shape)
    assert result.code == 0, result.err
    (new,) = (path for path in finished.parent.iterdir() if path.is_dir() and path != finished)
    start = load_model_file(new / checkpoint(0), print).state_dict()
    weights = load_model_file(finished / EXPORT, print).state_dict()
    assert start.keys() == weights.keys()
    assert all(tensor.equal(weights[key]) for key, tensor in start.items())


def test_a_finished_run_that_is_resumed_stays_as_it_is(finished, train, short_end):
    before = {path: (finished / path).read_bytes() for path in (checkpoint(LAST), EXPORT)}
    rows = metrics(finished / METRICS)
    result = train("--resume", "latest")
    assert result.code == 0, result.err
    assert {path: (finished / path).read_bytes() for path in before} == before
    assert metrics(finished / METRICS) == rows


@pytest.mark.parametrize("name", ["muon"])
def test_a_finished_run_goes_on(name, finished, train, short_end):
    result = train("--resume", run_id(name), "--max-iters", LAST + 1)
    assert result.code == 0, result.err
    tensors, metadata = read_tensors(finished / checkpoint(LAST + 1))
    assert metadata is not None and metadata["progress"]["step"] == LAST + 1
    assert tensors.keys() == read_tensors(FIXTURES / name / "finished" / checkpoint(LAST))[0].keys()
    steps = [row["step"] for row in metrics(finished / METRICS) if "loss/train_step" in row]
    assert steps == list(range(LAST + 1))
