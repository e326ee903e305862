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

TEXT = "to be, or not to be: that is the question.\n" * 40


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


@pytest.fixture
def changed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the project with the change that the test names."""
    project = tmp_path / "project"
    ignored = shutil.ignore_patterns(".*", "tests", "benchmarks", "docs", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(PROJECT, project, ignore=ignored)
    make_change(shown_changes()[request.param], project)
    (tmp_path / "text.txt").write_text(TEXT)
    return project


def train(project: Path, *flags: object) -> Path:
    """A short run of the changed project; its directory."""
    where = ["--data", "text.txt", *TINY, "--max-iters", 2, "--no-aim"]
    result = run_process(project / "train.py", *where, *flags, cwd=project.parent)
    assert result.code == 0, result.err
    assert result.err == ""
    return max((project.parent / "runs").glob("2*"))


def test_every_change_that_is_shown_is_made_here():
    assert list(shown_changes()) == ["A parameter", "A metric", "A tracker", "A source of texts"]


@pytest.mark.parametrize("changed", ["A parameter"], indirect=True)
def test_a_parameter(changed):
    shutil.copytree(PROJECT / "tests", changed / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    tests = ["tests/test_readme.py", "-k", "table_of_parameters or every_flag"]
    checked = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=changed, capture_output=True)
    assert checked.returncode == 0
    run = train(changed, "--no-tensorboard", "--optimizer", "sgd", "--momentum", 0.5)
    assert json.loads((run / "meta/full_config.json").read_text())["parameters"]["momentum"] == 0.5
    result = run_process(changed / "train.py", "--momentum", 2, cwd=changed.parent)
    assert result.code == 2 and "momentum = 2" in result.err


@pytest.mark.parametrize("changed", ["A metric"], indirect=True)
def test_a_metric(changed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(changed)
    rows = [json.loads(line) for line in (run / "logs/metrics.jsonl").read_text().splitlines()]
    expected = [row["head_norm"] for row in rows if "head_norm" in row]
    assert len(expected) == 2 and expected[0] > 0
    curves = EventAccumulator(str(run / "logs/tensorboard"))
    curves.Reload()
    assert [point.value for point in curves.Scalars("head_norm")] == pytest.approx(expected)


@pytest.mark.parametrize("changed", ["A tracker"], indirect=True)
def test_a_tracker(changed):
    run = train(changed, "--no-tensorboard")
    lines = (run / "logs/val_loss.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["0", "2"]


@pytest.mark.parametrize("changed", ["A source of texts"], indirect=True)
def test_a_source_of_texts(changed):
    run = train(changed, "--no-tensorboard", "--data", "licence")
    assert "LICENSE.txt" in (run / "logs/train.log").read_text()
