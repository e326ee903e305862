"""The changes that CONTRIBUTING.md shows are whole: each is made, and the copy trains."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, TINY, run_process


def shown_changes() -> dict[str, str]:
    """The diffs by the words that they stand under."""
    found = re.findall(
        r"\*\*(.+?)\*\*:.*?```diff\n(.*?)```", (PROJECT / "CONTRIBUTING.md").read_text(), flags=re.S
    )
    return dict(found)


def make_change(diff: str, project: Path) -> None:
    """Make a change; what is to be replaced must be there once."""
    for name, body in re.findall(r"^# (\S+)\n(.*?)(?=^# |\Z)", diff, flags=re.M | re.S):
        lines = body.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        path = project / name
        text = path.read_text() if path.exists() else ""
        assert text.count(old) == 1 or not text, (name, old)
        path.write_text(text.replace(old, new) if text else new)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with every change that is shown."""
    project = tmp_path_factory.mktemp("extending") / "project"
    ignored = shutil.ignore_patterns(".*", "benchmarks", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(PROJECT, project, ignore=ignored)
    for diff in shown_changes().values():
        make_change(diff, project)
    return project


@pytest.fixture(scope="module")
def run(changed: Path) -> Path:
    """A short run of the changed project; its directory."""
    flags = [
        *TINY,
        "--max-iters",
        2,
        "--no-aim",
        "--data",
        "licence",
        "--optimizer",
        "sgd",
        "--momentum",
        0.5,
    ]
    result = run_process(changed / "train.py", *flags, cwd=changed.parent)
    assert (result.code, result.err) == (0, "")
    (path,) = (changed.parent / "runs").glob("2*")
    return path


def test_every_change_that_is_shown_is_made_here():
    assert list(shown_changes()) == ["A parameter", "A metric", "A tracker", "A source of texts"]


def test_a_parameter(changed, run):
    tests = ["tests/test_readme.py", "-n", "0", "-k", "table_of_parameters or every_flag"]
    checked = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=changed, capture_output=True)
    assert checked.returncode == 0, checked.stdout
    assert json.loads((run / "meta/full_config.json").read_text())["parameters"]["momentum"] == 0.5
    result = run_process(changed / "train.py", "--momentum", 2, cwd=changed.parent)
    assert result.code == 2 and "momentum = 2" in result.err


def test_a_metric(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [json.loads(line) for line in (run / "logs/metrics.jsonl").read_text().splitlines()]
    expected = [row["head_norm"] for row in rows if "head_norm" in row]
    assert len(expected) == 2 and expected[0] > 0
    curves = EventAccumulator(str(run / "logs/tensorboard"))
    curves.Reload()
    assert [point.value for point in curves.Scalars("head_norm")] == pytest.approx(expected)


def test_a_tracker(run):
    lines = (run / "logs/val_loss.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["0", "2"]


def test_a_source_of_texts(run):
    assert "LICENSE.txt" in (run / "logs/train.log").read_text()
