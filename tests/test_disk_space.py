"""The table of what may be removed (docs/runs.md): each row is removed, and what is lost by it is seen."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROJECT, TEXT, TINY, Result, runner

from utils_alg1.tracking.metrics_file import read_metrics

ROWS = re.findall(r"^\| (.+?) \| (.+?) \|$", (PROJECT / "docs/runs.md").read_text("utf-8"), re.M)
TABLE = dict(ROWS[ROWS.index(("removed", "lost")) + 1 :])
TRAIN = ["--data", "text.txt", *TINY, "--no-aim", "--quiet"]
TRAIN += ["--keep-checkpoints", "3", "--checkpoint-interval", "2"]
GO_ON = ["--resume", "latest", "--quiet"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a run that is done."""
    import train as script

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        assert script.main(TRAIN) == 0
    return folder


@pytest.fixture
def run(finished, workdir) -> Path:
    """That run, in the working folder."""
    shutil.copytree(finished, workdir, dirs_exist_ok=True)
    (path,) = Path("runs").glob("2*")
    return path


@pytest.fixture
def row(capsys) -> Callable[[], dict]:
    import compare

    return lambda: json.loads(runner(compare.main, capsys)("--json").out)[0]


def remove(path: Path, whole: str) -> None:
    """Remove what a row of the table names."""
    assert whole in TABLE
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_checkpoints_are_most_of_a_run(run):
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    parts = {path: size(path) for path in (run / "artifacts/checkpoints", run / "artifacts/export")}
    assert max(parts, key=parts.__getitem__).name == "checkpoints"


def test_without_checkpoints_it_can_be_used_but_not_resumed(run, row, train, sample):
    before = row()
    remove(run / "artifacts/checkpoints", "`artifacts/checkpoints/`")
    assert row() | {"seconds": None} == before | {"seconds": None}
    assert sample("--max-new-tokens", 3).code == 0
    assert (run / "eval/report.html").exists()
    refused = train(*GO_ON)
    assert refused.code == 2 and f"--init-from {run}/artifacts/export/model.safetensors" in refused.err
    assert train(*TRAIN, "--init-from", run / "artifacts/export/model.safetensors").code == 0


def test_older_checkpoints_are_what_a_resume_falls_back_to(run, train):
    assert "all checkpoints but the newest" in TABLE
    *older, newest = sorted((run / "artifacts/checkpoints").iterdir())
    assert len(older) == 2
    kept = {path: path.read_bytes() for path in older}
    for path in older:
        path.unlink()
    assert train(*GO_ON, "--max-iters", 8).code == 0
    shutil.rmtree(run / "artifacts/checkpoints")
    newest.parent.mkdir()
    newest.write_bytes(b"damaged")
    assert train(*GO_ON, "--max-iters", 10).code == 2
    for path, content in kept.items():
        path.write_bytes(content)
    assert train(*GO_ON, "--max-iters", 10).code == 0


@pytest.mark.parametrize(
    ("whole", "name", "written_again"),
    [
        ("`artifacts/export/`", "artifacts/export", ["artifacts/export/model.safetensors"]),
        ("`eval/`", "eval", ["eval/final.json", "eval/report.html"]),
    ],
)
def test_what_a_resume_writes_again(whole, name, written_again, run, row, train, sample):
    weights = (run / "artifacts/export/model.safetensors").read_bytes()
    loss = row()["export_val_loss"]
    remove(run / name, whole)
    shown = sample("--max-new-tokens", 3)
    assert shown.code == 0
    if name == "eval":
        assert row()["export_val_loss"] is None
    else:
        assert shown.err.startswith(f"{run}/artifacts/checkpoints/step_000000006.safetensors")
    assert train(*GO_ON).code == 0
    assert all((run / path).stat().st_size for path in written_again)
    assert (run / "artifacts/export/model.safetensors").read_bytes() == weights
    assert row()["export_val_loss"] == loss


def test_the_scalars_of_tensorboard_are_sent_again(run, train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps() -> list[int]:
        events = EventAccumulator(str(run / "logs/tensorboard"))
        events.Reload()
        tag = next(tag for tag in events.Tags()["scalars"] if "val" in tag.lower())
        return [event.step for event in events.Scalars(tag)]

    before = steps()
    remove(run / "logs/tensorboard", "`logs/tensorboard/`")
    assert train(*GO_ON).code == 0
    assert steps() == before


def test_without_metrics_it_trains_on_and_earlier_losses_are_lost(run, row, train):
    metrics = run / "logs/metrics.jsonl"
    assert next(read_metrics(metrics))["step"] == 0
    remove(metrics, "`logs/metrics.jsonl`")
    assert train(*GO_ON, "--max-iters", 8).code == 0
    assert row()["step"] == 8
    assert next(read_metrics(metrics))["step"] == 6


def test_records_that_only_people_read(run, row, train):
    (names,) = (name for name in TABLE if name.startswith("`logs/train.log`"))
    before = row()
    for name in re.findall(r"`(.+?)`", names):
        (run / name).unlink()
    assert row() == before
    assert train(*GO_ON, "--max-iters", 8).code == 0


def test_tokens_cost_nothing(run, row, train):
    remove(Path(".tokens"), "`.tokens/`, beside a text")
    before = row()
    assert train(*TRAIN).code == 0
    assert row()["export_val_loss"] == before["export_val_loss"]


def test_a_run_is_alone(run, train, sample):
    remove(run, "a run")
    assert train(*TRAIN).code == 0
    assert sample("--max-new-tokens", 3).code == 0


def test_every_row_of_a_study_is_in_the_table():
    files = [name for name in TABLE if "searches/" in name or name.startswith("its ")]
    named = re.findall(r"`(?:searches/NAME/)?(.+?)`", " ".join(files))
    assert named == ["study.db", "trials/", "search.log", "results.csv", "best.yaml", "study.db.damaged"]


def test_what_may_be_removed_of_a_study(text_file, capsys):
    pytest.importorskip("optuna", reason="searching is optional")
    import search as script

    search = runner(script.main, capsys)
    Path("space.yaml").write_text('{"learning_rate": [0.001, 0.01]}')
    flags = ["--space", "space.yaml", "--trials", 1, "--data", "text.txt", *TINY]
    flags += ["--no-aim", "--no-tensorboard"]

    def go_on() -> Result:
        result = search(*flags)
        assert result.code == 0, result.err
        return result

    go_on()
    folder = Path("searches/space")
    best, table = (folder / "best.yaml").read_bytes(), (folder / "results.csv").read_bytes()
    for path in folder.iterdir():
        if path.name != "study.db":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(next(Path("runs").glob("2*")))
    assert "1, 1 of them finished" in go_on().out  # a study that has a run keeps its loss
    assert ((folder / "best.yaml").read_bytes(), (folder / "results.csv").read_bytes()) == (best, table)
    (folder / "study.db").unlink()
    assert "finished" not in go_on().out.partition("\n\n")[0]
    assert len(list(Path("runs").glob("2*"))) == 1
