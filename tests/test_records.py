"""What meta/ and the report tell of a run: the text, the origin of each value, and every part of the run."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest
from conftest import QUIET_TRACKERS, TINY, runner, stop_at

from utils_alg1.data import sources
from utils_alg1.network.tensor_file import read_tensors, write_tensors
from utils_alg1.report import results as results_module
from utils_alg1.run_directory import checkpoint_paths, list_runs
from utils_alg1.tracking import trackers as trackers_module
from utils_alg1.utils_run_manager import read_lines


@pytest.fixture(autouse=True)
def fast_end(monkeypatch):
    monkeypatch.setattr("utils_alg1.report.pictures.draw_loss_curve", lambda *_: None)
    monkeypatch.setattr(results_module, "SAMPLE_LENGTH", 4)


def only_run() -> Path:
    (run,) = list_runs("runs")
    return run


def record() -> dict:
    return json.loads((only_run() / "meta/full_config.json").read_text())


def interrupt(train, monkeypatch, *flags: object) -> None:
    """A run that ends at step 4 of 6, with the command line in sys.argv too."""
    with monkeypatch.context() as patch:
        stop_at(3, patch, lambda: signal.raise_signal(signal.SIGINT))
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        assert train(*TINY, *QUIET_TRACKERS, *flags).code == 130


# --- the text -----------------------------------------------------------------------------------------


def test_the_text_in_place_of_the_default_one_is_recorded_and_resumed(train, workdir, monkeypatch):
    """Without a network it is python-docs, also where the default text is there at the resume."""
    seen = []
    start_trackers = trackers_module.start_trackers

    def start(run, params, hparams, *others):
        seen.append(hparams["data_path"])
        return start_trackers(run, params, hparams, *others)

    monkeypatch.setattr("utils_alg1.run.run.start_trackers", start)
    interrupt(train, monkeypatch)
    assert record()["parameters"]["data_path"] == "python-docs"
    assert record()["origins"]["data_path"] == "data/input.txt is missing"
    Path("data/input.txt").write_text("another text\n" * 100)
    result = train("--resume", "latest")
    assert (result.code, result.err) == (0, "")
    assert re.search(r"^text +data/python-docs.txt: ", result.out, re.M)
    assert record()["parameters"]["data_path"] == "python-docs"
    assert record()["origins"]["data_path"] == "data/input.txt is missing"
    assert seen == ["python-docs", "python-docs"]  # what TensorBoard and Aim are given


def test_a_download_in_place_of_the_default_text_keeps_its_name(train, workdir, monkeypatch):
    def download(say, path):
        path.parent.mkdir()
        path.write_text("To be, or not to be.\n" * 50)
        return path

    monkeypatch.setattr(sources, "_shakespeare", download)
    result = train(*TINY, *QUIET_TRACKERS)
    assert (result.code, result.err) == (0, "")
    assert record()["parameters"]["data_path"] == "data/input.txt"
    assert record()["origins"]["data_path"] == "default"
    assert record()["corpus"]["path"] == "data/input.txt"


def test_a_study_is_of_the_text_that_takes_the_place_of_the_default_one(workdir, capsys):
    pytest.importorskip("optuna", reason="searching is optional: pip install -e '.[search]'")
    from utils_alg1.console.command_line import Options
    from utils_alg1.search.space import make_plan

    assert make_plan({}, Options()).fixed["data_path"] == "python-docs"


def test_a_resume_with_another_text_is_told_where_that_of_the_run_was(train, text_file, monkeypatch):
    interrupt(train, monkeypatch, "--data", text_file)
    Path("other.txt").write_text(text_file.read_text() * 2)
    result = train("--resume", "latest", "--data", "other.txt")
    assert result.code == 2
    assert f"hint: name that text with --data (it was {text_file}), or start a new run" in result.err


# --- origins and parts --------------------------------------------------------------------------------


def test_parameters_keep_their_origins_when_a_run_is_resumed(train, text_file, monkeypatch):
    preset = Path("mine")
    preset.mkdir()
    (preset / "train.yaml").write_text("beta1: 0.8\nkeep_checkpoints: 3\n")
    interrupt(train, monkeypatch, "--data", text_file, "--config", "mine")
    before = record()["origins"]
    assert before["beta1"] == "mine/train.yaml" and before["n_embd"] == "--n-embd"
    assert train("--resume", "latest", "--max-iters", 7, "--keep-checkpoints", 2).code == 0
    changed = {"max_iters": "--max-iters", "keep_checkpoints": "--keep-checkpoints"}
    assert record()["origins"] == before | changed
    page = (only_run() / "eval/report.html").read_text()
    assert "mine/train.yaml" in page and "resumed run" not in page


def test_every_part_of_a_run_is_recorded(train, text_file, monkeypatch, capsys):
    import compare

    interrupt(train, monkeypatch, "--data", text_file)
    meta = only_run() / "meta"
    first = {name: (meta / name).read_text() for name in ("env.txt", "git.txt")}
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "latest"])
    monkeypatch.setattr("utils_alg1.utils_run_manager.platform.python_version", lambda: "3.99")
    assert train("--resume", "latest", "--threads", 2).code == 0
    parts = record()["parts"]
    assert [(part["step"], part["command"]) for part in parts] == [
        (0, f"train.py --data {text_file}"),
        (4, "train.py --resume latest"),
    ]
    assert parts[1]["runtime"] == record()["runtime"] == parts[0]["runtime"] | {"threads": 2}
    assert parts[0]["started"] == record()["started"] < parts[1]["started"]
    for name, text in first.items():
        assert (meta / name).read_text().startswith(f"{text}\n# resumed at step 4, {parts[1]['started']}\n")
    assert read_lines(meta / "env.txt")["python"] == "3.99"
    page = (only_run() / "eval/report.html").read_text()
    assert f"<td>command</td><td>train.py --data {text_file}</td>" in page
    assert "<td>resumed at step 4</td><td>train.py --resume latest</td>" in page
    (row,) = json.loads(runner(compare.main, capsys)("--json").out)
    assert row["resumed"] is True


def test_a_run_of_an_earlier_version_has_its_last_command_as_the_first_part(train, text_file, monkeypatch):
    interrupt(train, monkeypatch, "--data", text_file)
    path = only_run() / "meta/full_config.json"
    old = record()
    del old["parts"]
    old["origins"]["beta1"] = "resumed run"
    checkpoint = checkpoint_paths(only_run() / "artifacts/checkpoints")[-1]
    tensors, metadata = read_tensors(checkpoint)
    del metadata["origins"]
    write_tensors(checkpoint, tensors, metadata)
    path.write_text(json.dumps(old))
    assert train("--resume", "latest").code == 0
    command = read_lines(only_run() / "meta/env.txt")["command"]
    assert record()["parts"][0] == {
        "step": 0,
        "started": old["started"],
        "command": f"train.py --data {text_file}",
        "runtime": old["runtime"],
    }
    assert record()["parts"][1]["command"] == command
    assert record()["origins"] == old["origins"]


def test_the_origins_are_those_of_the_values_that_the_checkpoint_has(train, text_file, monkeypatch):
    """--finish records what it was given, and saves nothing: the run then goes on as it was begun."""
    interrupt(train, monkeypatch, "--data", text_file, "--export", "last")
    begun = record()
    assert begun["origins"]["export"] == "--export"
    assert train("--resume", "latest", "--finish", "--export", "best", "--threads", 2).code == 0
    assert record()["parameters"] == begun["parameters"] | {"export": "best", "threads": 2}
    assert record()["origins"] == begun["origins"] | {"threads": "--threads"}
    assert train("--resume", only_run()).code == 0
    assert record()["parameters"] == begun["parameters"]
    assert record()["origins"] == begun["origins"]


def test_a_run_keeps_its_tag(train, text_file, monkeypatch):
    interrupt(train, monkeypatch, "--data", text_file, "--run-tag", "mine")
    Path("tag.yaml").write_text("run_tag: other\n")
    for flags in (["--run-tag", "other"], ["--config", "tag.yaml"]):
        result = train("--resume", "latest", *flags)
        assert result.code == 2
        change = "run_tag: 'mine' -> 'other'\nhint: leave it out, or start a new run"
        assert result.err.startswith(f"error: the run cannot be resumed with other values: {change}")
    assert train("--resume", "latest", "--run-tag", "mine").code == 0


@pytest.mark.parametrize("damage", ["{", '{"parameters": [], "origins": 3, "parts": 4}'])
def test_a_damaged_record_is_written_anew(damage, train, text_file, monkeypatch):
    interrupt(train, monkeypatch, "--data", text_file)
    (only_run() / "meta/full_config.json").write_text(damage)
    assert train("--resume", "latest").code == 0
    assert (record()["origins"]["beta1"], record()["origins"]["n_embd"]) == ("default", "--n-embd")
    assert record()["parts"][-1]["step"] == 4
