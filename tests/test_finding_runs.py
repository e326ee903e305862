"""Which run a name means: renamed, copied, moved and deleted runs, other time zones, `latest`."""

import datetime
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from conftest import QUIET_TRACKERS, TINY, runner

from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import read_json_object
from utils_alg1.run_directory import RunFolder, find_interrupted, find_run, list_runs, lock_run
from utils_alg1.tracking.trackers import open_tensorboard
from utils_alg1.utils_run_manager import RunIDGenerator
from utils_tensorboard.writer import write_embedding

TRAIN = [*TINY, *QUIET_TRACKERS, "--quiet", "--data", "text.txt"]


@pytest.fixture
def compare(capsys):
    import compare as script

    return runner(script.main, capsys)


def a_run(name: str, started: str | None = None, step: int = 4, done: int | None = None) -> Path:
    """What a run is found by: its record, with the start, a checkpoint of that step, and its results."""
    run = RunFolder(Path("runs", name))
    for folder in (run.meta_dir, run.checkpoint_dir, run.eval_dir):
        folder.mkdir(parents=True)
    run.record_path.write_text(json.dumps({"started": started} if started else {}))
    (run.checkpoint_dir / f"step_{step:09d}.safetensors").touch()
    if done is not None:
        run.final_path.write_text(json.dumps({"steps": done}))
    return run.path


def names(runs_dir: str = "runs") -> list[str]:
    return [run.name for run in list_runs(runs_dir)]


def test_the_order_of_runs_is_that_of_their_starts_in_every_time_zone(workdir):
    a_run("2026-11-25_001_tokyo", "2026-11-25T08:00:00+09:00")
    a_run("2026-11-24_001_honolulu", "2026-11-24T14:00:00-10:00")
    assert names() == ["2026-11-25_001_tokyo", "2026-11-24_001_honolulu"]
    assert find_run("runs").name == "2026-11-24_001_honolulu"


def test_runs_of_older_versions_are_sorted_by_date_and_number(workdir):
    for name in ("2026-11-25_1000", "2026-11-25_002", "2026-11-23_001", "2026-99-99_001"):
        a_run(name)
    renamed = a_run("good-one")
    os.utime(renamed, (0, datetime.datetime(2026, 11, 24).timestamp()))
    os.utime("runs/2026-99-99_001", (0, 0))
    a_run("2026-11-25_003", "2026-11-25T23:59:59+00:00")
    a_run("2026-11-25_004", "no time")
    a_run("2026-11-25_005", "2026-11-25T00:00:00")  # without a zone it tells nothing
    assert names() == [
        "2026-99-99_001",
        "2026-11-23_001",
        "good-one",
        "2026-11-25_002",
        "2026-11-25_004",
        "2026-11-25_005",
        "2026-11-25_1000",
        "2026-11-25_003",
    ]


def test_the_start_is_recorded_with_its_zone_and_kept_by_a_resume(text_file, train, monkeypatch):
    before = datetime.datetime.now(datetime.UTC)
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Pacific/Kiritimati")
        time.tzset()
        assert train(*TRAIN).code == 0
    time.tzset()
    (run,) = list_runs("runs")
    started = read_json_object(run / "meta/full_config.json")["started"]
    assert started.endswith("+14:00")
    assert before <= datetime.datetime.fromisoformat(started) <= datetime.datetime.now(datetime.UTC)
    assert train("--resume", "latest", "--max-iters", 8, "--quiet").code == 0
    record = read_json_object(run / "meta/full_config.json")
    assert (record["started"], record["parameters"]["max_iters"]) == (started, 8)
    del record["started"]  # as in an older version
    (run / "meta/full_config.json").write_text(json.dumps(record))
    assert train("--resume", "latest", "--max-iters", 10, "--quiet").code == 0
    assert "started" not in read_json_object(run / "meta/full_config.json")


def test_a_renamed_run_is_found_by_its_name_in_every_script(text_file, train, sample, compare):
    assert train(*TRAIN).code == 0
    (run,) = list_runs("runs")
    run.rename("runs/good-one")
    assert sample("--run", "good-one", "--max-new-tokens", 1).code == 0
    assert sample("--max-new-tokens", 1).err.startswith("runs/good-one/")
    result = train("--resume", "good-one", "--max-iters", 8)
    assert result.code == 0
    assert "\nsample    python inference.py --run runs/good-one\n" in result.out
    (row,) = json.loads(compare("--json").out)
    assert (row["run"], row["tag"], row["step"]) == ("good-one", "", 8)
    shutil.rmtree("runs/good-one/meta")  # nothing but its name is left to find it by
    assert find_run("runs", "good-one") == Path("runs/good-one")
    assert RunIDGenerator("runs").get_next_counter(run.name[:10]) == 1


@pytest.mark.parametrize("name", ["../runs/2026-11-26_001", "./2026-11-26_001", "2026-11-26_001/", "."])
def test_a_name_with_a_separator_is_a_path_and_never_joined_with_the_runs_folder(workdir, monkeypatch, name):
    theirs = a_run("2026-11-26_001").absolute()
    Path("other").mkdir()
    monkeypatch.chdir("other")
    a_run("2026-11-26_001")
    if name == "../runs/2026-11-26_001":
        assert find_run("runs", name).resolve() == theirs
        assert find_run("runs", str(theirs)) == theirs
        shutil.rmtree(theirs)
    with pytest.raises(Alg1Error) as caught:
        find_run("runs", name)
    assert caught.value.message == f"{name}: no such run directory"
    assert find_run("runs", "2026-11-26_001") == Path("runs/2026-11-26_001")


def test_a_run_of_another_folder_is_resumed_and_sampled_where_one_of_its_name_is_here(
    text_file, monkeypatch, train, sample
):
    data = f"--data={text_file}"
    assert train(*TRAIN, data, "--run-tag=theirs").code == 0
    (theirs,) = (path.absolute() for path in list_runs("runs"))
    Path("other").mkdir()
    monkeypatch.chdir("other")
    assert train(*TRAIN, data, "--run-tag=theirs").code == 0
    (ours,) = list_runs("runs")
    assert ours.name == theirs.name
    name = f"../runs/{theirs.name}"
    assert train("--resume", name, "--max-iters", 8, "--quiet").code == 0
    assert [read_json_object(run / "eval/final.json")["steps"] for run in (theirs, ours)] == [8, 6]
    assert sample("--run", name, "--max-new-tokens", 1).err.startswith(f"{name}/")


def test_a_number_that_two_runs_have_is_refused(text_file, train, sample):
    assert train(*TRAIN, "--run-tag", "book").code == 0
    (run,) = list_runs("runs")
    shutil.copytree(run, f"{run}-copy")
    number = run.name.removesuffix("_book")
    for result in (train("--resume", number), sample("--run", number)):
        assert result.code == 2
        assert result.err == (
            f"error: {number}: 2 runs in runs have this number: {number}_book, {number}_book-copy\n"
            "hint: give the whole name of one of them\n"
        )
    assert sample("--run", run.name, "--max-new-tokens", 1).err.startswith(f"{run}/")
    shutil.copytree(run, f"runs/{number}")
    assert find_run("runs", number) == Path("runs", number)


def test_latest_resumes_the_newest_run_that_was_interrupted(workdir):
    said: list[str] = []
    a_run("2026-11-25_001")
    interrupted = a_run("2026-11-25_002", step=8, done=4)  # it was trained for longer, and interrupted
    assert find_interrupted("runs", said.append) == interrupted
    assert said == []
    a_run("2026-11-25_003", done=4)
    assert find_interrupted("runs", said.append) == interrupted
    with lock_run(a_run("2026-11-25_004")):
        assert find_interrupted("runs", said.append) == interrupted
    going_on = "continuing runs/2026-11-25_002, the newest that was interrupted: 2026-11-25_00"
    assert said == [f"{going_on}3 is done", f"{going_on}4 is in use by another process"]


def test_latest_is_the_newest_run_if_none_was_interrupted(workdir):
    with pytest.raises(Alg1Error, match="there is no run in runs"):
        find_interrupted("runs", print)
    a_run("2026-11-25_001", done=4)
    newest = a_run("2026-11-25_002", done=4)
    said: list[str] = []
    assert find_interrupted("runs", said.append) == newest
    assert said == ["no run was interrupted; the latest, 2026-11-25_002, is done"]
    a_run("2026-11-25_003").joinpath("artifacts/checkpoints/step_000000004.safetensors").unlink()
    assert find_interrupted("runs", print) == newest


def test_resume_says_which_run_it_takes(text_file, train):
    assert train(*TRAIN, "--run-tag", "first").code == 0
    assert train(*TRAIN, "--run-tag", "second").code == 0
    first, second = list_runs("runs")
    (first / "eval/final.json").unlink()
    result = train("--resume", "latest")
    assert result.code == 0
    assert result.out.startswith(f"continuing {first}, the newest that was interrupted: {second.name} is")


def test_resume_of_a_run_that_is_done_says_so(text_file, train, compare):
    assert train(*TRAIN).code == 0
    (run,) = list_runs("runs")
    (run / "eval/report.html").unlink()
    told = f"no run was interrupted; the latest, {run.name}, is done"
    for flags in ([], ["--finish"]):
        result = train("--resume", "latest", *flags)
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith(f"{told}\n")
        (row,) = json.loads(compare("--json").out)
        assert (row["state"], row["resumed"], row["step"]) == ("done", False, 6)
    assert "<td>results written again at step 6</td>" in (run / "eval/report.html").read_text()
    assert told not in train("--resume", run).out
    assert train("--resume", "latest", "--max-iters", 8).code == 0
    (row,) = json.loads(compare("--json").out)
    assert (row["state"], row["resumed"], row["step"]) == ("done", True, 8)


LOOKS = ["--sample-interval", 1, "--embedding-interval", 1]  # each writes a file in the run's directory


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("step", [3, 6])
def test_a_run_that_is_deleted_while_it_trains_says_so(text_file, train, monkeypatch, moved, step):
    from utils_alg1.run.run import MainRun

    original = MainRun.save_checkpoint

    def disappear(self):
        original(self)
        if self.trainer.step >= step:
            self.store.wait()
            self.directory.path.rename("elsewhere") if moved else shutil.rmtree(self.directory.path)

    with monkeypatch.context() as patch:
        patch.setattr(MainRun, "save_checkpoint", disappear)
        result = train(*TINY, *LOOKS, "--no-aim", "--quiet", "--data", "text.txt")
    assert result.code == 4
    error, hint = result.err.splitlines()
    assert re.fullmatch("error: runs/20.*: this run was moved or deleted while it trained", error)
    moves = "if it was moved: python train.py --resume and its new path"
    assert hint == f"hint: {moves}; if it was deleted, start a new run"
    assert list_runs("runs") == []
    if moved:
        assert train("--resume", "elsewhere", "--quiet").code == 0


def test_tensorboard_does_not_make_a_deleted_run_anew(tmp_path):
    warnings: list[str] = []
    logger = open_tensorboard(tmp_path / "run", None, {}, warnings.append)
    assert not logger.writer.enabled and "No such file or directory" in warnings[0]
    with pytest.raises(FileNotFoundError):
        write_embedding(tmp_path / "run", "tag", None, [], 0)
    assert not (tmp_path / "run").exists()
