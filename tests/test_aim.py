"""Aim: what its own queries find in a run, and the tracker used on its own."""

from __future__ import annotations

import base64
import errno
import json
import os
import pickle
import re
import shutil
import signal
import sqlite3
import sys
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from conftest import TEXT, TINY, recorded_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train as script
from parameters import specs
from utils_aim.instructions import GROUPING, QUERY, address, instructions
from utils_aim.pictures import draw_embedding
from utils_aim.tracker import AimTracker
from utils_alg1.base.summaries import HISTOGRAM_BINS, Embedding, Histogram, Image
from utils_alg1.network.tensor_file import read_tensors
from utils_alg1.run_directory import RunFolder, list_runs
from utils_alg1.tracking.aim_record import read_record, write_record
from utils_alg1.tracking.background import BackgroundTracker
from utils_alg1.tracking.metrics_file import read_metrics
from utils_alg1.tracking.trackers import open_aim
from utils_alg1.training.trainer import Trainer
from utils_alg1.utils_run_manager import create_run

aim = pytest.importorskip("aim", reason="Aim is not installed (it has no wheels for Python 3.13 or Windows)")

HISTOGRAMS = [0, 3]  # the steps that TINY draws them at
LOOKS = (
    "--activation-interval 2 --attention-interval 3 --embedding-interval 3 --sample-interval 2"
    " --gradient-norm-interval 2 --speed-interval 3"
).split()
WITH_AIM = ["--data", "text.txt", *TINY, *LOOKS, "--no-tensorboard"]


def query(folder: Path, kind: str) -> dict[tuple, dict[int, object]]:
    """What `Repo.query_metrics`, say, finds: {(run, name, context): {step: value}}."""
    repo = aim.Repo(str(folder))
    found = {}
    for run in getattr(repo, f"query_{kind}")("", report_mode=0).iter_runs():
        for sequence in run:
            steps, (values, *_) = sequence.data.items_list()
            context = tuple(sorted(sequence.context.to_dict().items()))
            found[sequence.run.hash, sequence.name, context] = dict(zip(steps, values, strict=True))
    return found


def only_run(folder: Path) -> object:
    (run,) = aim.Repo(str(folder)).iter_runs()
    return run


def curves(metrics_path: Path) -> dict[tuple, dict[int, float]]:
    """The rows of a metrics file under Aim's names and contexts."""
    found: dict[tuple, dict[int, float]] = {}
    for row in read_metrics(metrics_path):
        step = int(row.pop("step"))
        for key, value in row.items():
            name, _, subset = key.partition("/")
            context = (("subset", subset),) if subset else ()
            found.setdefault((name, context), {})[step] = value
    return found


def without_run(found: dict[tuple, dict]) -> dict[tuple, dict]:
    """The same, when all of it is of one run."""
    assert len({run for run, *_ in found}) == 1
    return {key[1:]: points for key, points in found.items()}


# --- a run, read back ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with both trackers, and what they were told."""
    return recorded_run(tmp_path_factory.mktemp("aim"), "--data", "text.txt", *TINY, *LOOKS)


@pytest.fixture(scope="module")
def repo(run) -> Path:
    """The folder of the run's .aim."""
    return run.parent.parent


# First: a process that has opened a repository of Aim, as to query it, forks ones that open theirs slowly.
def test_a_stopped_run_goes_on_in_the_same_aim_run(train, text_file, workdir, run, monkeypatch):
    optimizer_step, loop = Trainer.optimizer_step, script.train

    def stop(trainer):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        optimizer_step(trainer)

    def wait_and_train(trainer, run):
        assert run.trackers.background["aim"].ready.wait(60)
        loop(trainer, run)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimizer_step", stop)
        patch.setattr(script, "train", wait_and_train)
        patch.setattr("utils_alg1.tracking.tracker_process.FLUSH_TIMEOUT", 60)
        assert train(*WITH_AIM).code == 130
    (path,) = list_runs("runs")
    first_hash = read_record(RunFolder(path)).run_hash
    _, checkpoint = read_tensors(path / "artifacts/checkpoints/step_000000003.safetensors")
    assert checkpoint["trackers"] == {"aim": {"run": first_hash, "synced": 3}}
    assert train("--resume", "latest").code == 0
    found = query(workdir, "metrics")
    assert {key[0] for key in found} == {first_hash}
    ours, whole = (
        {name: points for name, points in curves_.items() if name[0] != "tokens_per_second"}
        for curves_ in (without_run(found), curves(run / "logs/metrics.jsonl"))
    )
    assert ours == whole
    for (_, name, _), points in query(workdir, "images").items():
        assert sorted(points) == [0, 3, 6], name
    (samples,) = query(workdir, "texts").values()
    assert [samples[step].data for step in (0, 2, 4, 6)] == [
        text["samples"]
        for (name, _), text in pickle.loads((run / "logged.pkl").read_bytes()).items()
        if name == "texts"
    ]
    assert only_run(workdir).name == path.name


def test_aim_shows_what_the_metrics_file_says(run, repo):
    expected = curves(run / "logs/metrics.jsonl")
    assert set(expected) == {
        ("loss", (("subset", "train_step"),)),
        ("loss", (("subset", "train"),)),
        ("loss", (("subset", "val"),)),
        ("learning_rate", ()),
        ("tokens", ()),
        ("gradient_norm", ()),
        ("tokens_per_second", ()),
    }
    assert list(expected["loss", (("subset", "train_step"),)]) == [0, 1, 2, 3, 4, 5]
    assert list(expected["learning_rate", ()]) == [0, 2, 4, 6]
    assert list(expected["gradient_norm", ()]) == [0, 2, 4]
    assert list(expected["tokens_per_second", ()]) == [3, 6]
    assert without_run(query(repo, "metrics")) == expected


def test_distributions_are_those_of_numpy_and_of_tensorboard(run, repo):
    found = without_run(query(repo, "distributions"))
    events = EventAccumulator(str(run / "logs/tensorboard"), size_guidance={"histograms": 0}).Reload()
    tags = {"parameter": "Parameters", "gradient": "Gradients"}
    activations = [key for key in found if ("kind", "activation") in key[1]]
    assert {name for name, _ in activations} == {"blocks.0", "blocks.0.sa", "blocks.0.ffwd.net.1"}
    for key in activations:
        drawn = events.Histograms(f"Outputs/{key[0]}")
        points = found.pop(key)
        assert [e.step for e in drawn] == sorted(points) == [0, 2, 4, 6]
        for e in drawn:
            assert points[e.step].to_np_histogram()[0].tolist() == e.histogram_value.bucket
    with np.load(run / "values.npz") as values:
        assert len(values) > 40
        assert set(found) == {(name, (("kind", kind),)) for name, kind, _ in (key.split() for key in values)}
        for (name, ((_, kind),)), points in found.items():
            assert sorted(points) == HISTOGRAMS
            drawn = {e.step: e.histogram_value for e in events.Histograms(f"{tags[kind]}/{name}")}
            for step, distribution in points.items():
                counts, edges = distribution.to_np_histogram()
                tensor = values[f"{name} {kind} {step}"]
                assert counts.sum() == tensor.size
                assert counts.tolist() == drawn[step].bucket
                np.testing.assert_allclose(edges[1:], drawn[step].bucket_limit, rtol=1e-6)
                if tensor.min() < tensor.max():
                    span = (float(tensor.min()), float(tensor.max()))
                    np.testing.assert_allclose((edges[0], edges[-1]), span, rtol=1e-6)
                    np.testing.assert_array_equal(
                        counts, np.histogram(tensor.astype(float), HISTOGRAM_BINS)[0]
                    )


def pixels(image) -> np.ndarray:
    return np.asarray(image.to_pil_image())


def test_pictures_and_texts_are_those_that_were_shown(run, repo):
    logged = pickle.loads((run / "logged.pkl").read_bytes())
    found = without_run(query(repo, "images"))
    assert found.keys() == {("token_embeddings", ()), ("attention", ())}
    for points in found.values():
        assert sorted(points) == [0, 3, 6]
    for step in (0, 3, 6):
        (image,) = logged["images", step]
        assert (pixels(found["attention", ()][step]) == image.pixels()).all()
        drawn = pixels(found["token_embeddings", ()][step])
        assert drawn.shape == (600, 600, 3)
        assert (drawn == draw_embedding(logged["embedding", step])).all()
    samples = without_run(query(repo, "texts"))["samples", ()]
    assert {step: text.data for step, text in samples.items()} == {
        step: logged["texts", step]["samples"] for step in (0, 2, 4, 6)
    }


def test_aim_keeps_all_parameters_and_where_the_run_came_from(run, repo):
    kept = only_run(repo)
    assert kept.name == run.name
    assert set(kept["hparams"]) == {*specs(), "vocab_size"}
    assert kept["hparams"]["n_embd"] == 16
    assert kept["hparams"]["learning_rate"] == 1e-3
    assert kept["hparams"]["vocab_size"] == len(set(TEXT))
    assert kept["run_dir"] == str(run)
    losses = [row["loss/val"] for row in read_metrics(run / "logs/metrics.jsonl") if "loss/val" in row]
    assert kept["best_val_loss"] == min(losses)
    assert (kept.experiment, kept.tags) == ("alg1", [])
    assert set(kept["git"]) == {"commit", "branch", "dirty"}
    records = (run / "meta/env.txt").read_text().splitlines()
    assert sorted(f"{name}: {value}" for name, value in kept["environment"].items()) == sorted(records)


def test_a_finished_run_is_closed_in_aim(repo):
    kept = only_run(repo)
    assert kept.end_time is not None
    assert not kept.active
    assert list((repo / ".aim/locks").glob("*")) == []


def test_a_run_without_aim_makes_no_repository(train, text_file, workdir):
    assert train(*WITH_AIM, "--no-aim").code == 0
    assert not (workdir / ".aim").exists()


# --- the tracker on its own ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, str]:
    """A repository, inside the folder of another, with two runs tracked by hand; the hash of the first."""
    folder = tmp_path_factory.mktemp("outer") / "inner"
    folder.mkdir()
    aim.Repo.from_path(str(folder.parent), init=True)
    streams = sys.stdout.write, sys.stderr.write
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tracker = AimTracker("my run", "runs/my-run", warn=pytest.fail, tag="wide")
        assert (sys.stdout.write, sys.stderr.write) == streams
        assert tracker.enabled
        tracker.track_config({"n_embd": 64, "lr": 1e-3, "output": None, "list": [1, "two"]})
        tracker.track_metadata("git_commit", "abc")
        for step in range(3):
            tracker.track_metric("loss", step + 0.5, step, {"subset": "train"})
        tracker.track_metric("loss", 5.0, 2, {"subset": "train"})
        nan, inf = float("nan"), float("inf")
        tracker.track_distribution("weights", np.array([[1.0, nan], [3.0, inf]]), 4, {"kind": "parameter"})
        tracker.track_distribution("weights", [nan, -inf], 5, {"kind": "parameter"})
        tracker.track_distribution("large", [-1e30, 1e30], 4)
        tracker.track_distribution("constant", [2.0] * 5, 4)
        tracker.track_distribution("empty", [], 4)
        tracker.track_image("grey", np.full((2, 3), 7, np.uint8), 4)
        tracker.track_image("grey", np.full((2, 3), 8, np.uint8), 4)
        tracker.track_image("coloured", np.arange(12, dtype=np.uint8).reshape(2, 2, 3), 5, {"a": "b"})
        tracker.track_text("said", "one\n\ttwo 日", 6, {"c": "d"})
        # What no table names keeps its name, and an unknown kind is ignored.
        tracker.log("scalars", {"new/metric": 1.5, "loss/val": 2.5}, 3)
        tracker.log("histograms", [Histogram("p", "update", np.array([1, 0, 2]), np.arange(4.0))], 4)
        tracker.log("images", [Image("mask", np.eye(2)[None, None], "a", "b")], 4)
        tracker.log("texts", {"notes": "a"}, 6)
        tracker.log("embedding", Embedding("positions", np.eye(2, dtype=np.float32), ["a", "b"]), 4)
        tracker.log("a kind of the future", object(), 3)
        run_hash = tracker.run_hash
        tracker.close()
        assert not tracker.enabled
        assert tracker.run_hash is None
        tracker.track_config({"late": True})
        tracker.track_metric("late", 1.0, 0)
        tracker.log("texts", {"late": "late"}, 0)
        tracker.close()
        again = AimTracker("my run", "runs/my-run", run_hash=run_hash, warn=pytest.fail, tag="other")
        assert again.run_hash == run_hash
        again.track_metric("loss", 6.0, 3, {"subset": "train"})
        again.close()
        new = AimTracker("two", "runs/two", run_hash="0" * 24, warn=pytest.fail)
        assert new.enabled
        assert new.run_hash not in (run_hash, "0" * 24)
        new.close()
    return folder, run_hash


def test_the_tracker_keeps_configuration_and_metadata_in_the_folder_named_and_no_parent(alone):
    folder, run_hash = alone
    runs = {run.name: run for run in aim.Repo(str(folder)).iter_runs()}
    assert runs.keys() == {"my run", "two"}
    run = runs["my run"]
    assert (run.hash, run["run_dir"], run["git_commit"]) == (run_hash, "runs/my-run", "abc")
    assert run["hparams"] == {"n_embd": 64, "lr": 1e-3, "output": None, "list": [1, "two"]}
    assert (run.experiment, run.tags) == ("wide", ["wide"])  # those that it was begun with
    assert (runs["two"].experiment, runs["two"].tags) == ("alg1", [])
    assert list(aim.Repo(str(folder.parent)).iter_runs()) == []


def test_the_tracker_keeps_points_the_last_of_one_step_and_those_of_a_continued_run(alone):
    assert without_run(query(alone[0], "metrics")) == {
        ("loss", (("subset", "train"),)): {0: 0.5, 1: 1.5, 2: 5.0, 3: 6.0},
        ("loss", (("subset", "val"),)): {3: 2.5},
        ("new/metric", ()): {3: 1.5},
    }


def test_the_tracker_keeps_distributions_of_the_finite_values(alone):
    spans = {}
    for (name, context), points in without_run(query(alone[0], "distributions")).items():
        assert list(points) == [4]
        counts, edges = points[4].to_np_histogram()
        spans[name, context] = counts.sum(), edges[0], edges[-1]
    _, low, high = spans.pop(("constant", ()))
    assert low <= 2 <= high
    assert spans == {
        ("weights", (("kind", "parameter"),)): (2, 1, 3),
        ("p", (("kind", "update"),)): (3, 0, 3),
        ("large", ()): pytest.approx((2, -1e30, 1e30)),
    }


def test_the_tracker_keeps_pictures_and_texts_and_the_last_of_one_step(alone):
    found = without_run(query(alone[0], "images"))
    assert {key: list(points) for key, points in found.items()} == {
        ("grey", ()): [4],
        ("coloured", (("a", "b"),)): [5],
        ("mask", ()): [4],
        ("positions", ()): [4],
    }
    assert pixels(found["grey", ()][4]).tolist() == [[8, 8, 8]] * 2
    assert pixels(found["coloured", (("a", "b"),)][5]).ravel().tolist() == list(range(12))
    texts = without_run(query(alone[0], "texts"))
    assert {key: [text.data for text in points.values()] for key, points in texts.items()} == {
        ("said", (("c", "d"),)): ["one\n\ttwo 日"],
        ("notes", ()): ["a"],
    }


@pytest.fixture
def aim_run(monkeypatch):
    """`aim_run(function)` lets Aim call the function where it opens a run, in no repository."""

    def arrange(function):
        monkeypatch.setattr(aim.Repo, "from_path", lambda *_, **__: None)
        monkeypatch.setattr(aim, "Run", function)

    return arrange


def fail(error: BaseException):
    def run(*_, **__):
        raise error

    return run


def test_a_repository_that_another_run_opens_is_waited_for(tmp_path, monkeypatch, aim_run):
    monkeypatch.setattr("utils_aim.tracker.LOCK_POLL", 0.01)
    tries = []

    def busy(*arguments, **_):
        tries.append(arguments)
        if len(tries) < 3:
            raise RuntimeError("IO error: While lock file: index/LOCK: Resource temporarily unavailable")
        return MagicMock()

    aim_run(busy)
    assert AimTracker("run", tmp_path, tmp_path, "hash", pytest.fail).enabled
    assert tries == [("hash",)] * 3
    monkeypatch.setattr("utils_aim.tracker.LOCK_TIMEOUT", 0)
    tries.clear()
    warnings: list[str] = []
    AimTracker("run", tmp_path, tmp_path, "hash", warnings.append)
    assert len(warnings) == 1


def test_a_tracker_that_cannot_open_is_one_warning_and_does_nothing(workdir, aim_run, monkeypatch):
    from aim.ext.cleanup import AutoClean

    forgotten: list[object] = []
    monkeypatch.setattr("atexit.unregister", forgotten.append)
    aim_run(fail(PermissionError(13, "Permission denied")))
    warnings: list[str] = []
    tracker = AimTracker("name", "run", repo=workdir, warn=warnings.append)
    tracker.track_config({"a": 1})
    tracker.track_metric("loss", 1.0, 0)
    tracker.track_distribution("w", [1.0], 0)
    monkeypatch.setattr("utils_aim.pictures.draw_embedding", lambda _: pytest.fail("drawn"))
    tracker.log("embedding", object(), 0)
    tracker.close()
    assert not tracker.enabled
    assert tracker.run_hash is None
    reason = "Permission denied); change its permissions, or choose another place"
    assert warnings == [f"Aim is switched off, training continues: cannot use {workdir / '.aim'} ({reason}"]
    assert forgotten == [AutoClean.cleanup]  # otherwise Aim may hang at exit


def rocksdb(text: str, name: str = "RocksIOError") -> Exception:
    from aimrocks import errors

    return getattr(errors, name)(text.encode())


def appending(reason: str) -> Exception:
    return rocksdb(f"IO error: While appending to file: 000000.dbtmp: {reason}")


BLOCK = "Corruption: block checksum mismatch: stored = 1, computed = 2 in 000012.sst offset 0 size 99"
OPENING = "Corruption: Can't access /000009.sst: IO error: No such file or directory"
LOCKED = "IO error: While lock file: index/LOCK: Resource temporarily unavailable"
HELD_HERE = "IO error: lock hold by current process, acquire time 1: LOCK: No locks available"
DAMAGED = "{folder} is damaged ("
HELD = "another program holds {folder} ("
FULL = "); free some space"
FORBIDDEN = "); change its permissions, or choose another place"
FAILURES = [
    (rocksdb(BLOCK, "Corruption"), DAMAGED),
    (rocksdb(OPENING, "Corruption"), DAMAGED),
    (sqlite3.DatabaseError("database disk image is malformed"), DAMAGED),
    (sqlite3.DatabaseError("file is not a database"), DAMAGED),
    (appending("No space left on device"), FULL),
    (sqlite3.OperationalError("database or disk is full"), FULL),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "VERSION"), f"device: VERSION{FULL}"),
    (appending("Permission denied"), FORBIDDEN),
    (sqlite3.OperationalError("attempt to write a readonly database"), FORBIDDEN),
    (appending("Read-only file system"), "); the file system is read-only; choose another place"),
    (appending("Too many open files"), "); raise the limit on open files (ulimit -n)"),
    (appending("Input/output error"), "); check the disk"),
    (sqlite3.OperationalError("disk I/O error"), "); check the disk"),
    (rocksdb(LOCKED), HELD),
    (rocksdb(HELD_HERE), HELD),
    (sqlite3.OperationalError("database is locked"), HELD),
    (rocksdb("IO error: While lock file: LOCK: No locks available"), "without locks; start in a folder of"),
]


@pytest.mark.parametrize(("error", "meaning"), FAILURES, ids=[str(error)[:60] for error, _ in FAILURES])
def test_only_damage_is_called_damage_and_every_other_failure_has_its_own_remedy(
    workdir, aim_run, monkeypatch, error, meaning
):
    monkeypatch.setattr("utils_aim.tracker.LOCK_TIMEOUT", 0)
    aim_run(fail(error))
    warnings: list[str] = []
    AimTracker("name", "run", warn=warnings.append).close()
    (warning,) = warnings
    folder = workdir / ".aim"
    assert meaning.format(folder=folder) in warning
    assert ("is damaged" in warning, "move it away" in warning) == (meaning == DAMAGED,) * 2
    assert str(folder) in warning and "b'" not in warning


def damage_pointer(repo: Path) -> None:
    for path in repo.glob("*/chunks/*/CURRENT"):
        path.unlink()


def damage_list_of_runs(repo: Path) -> None:
    (repo / "run_metadata.sqlite").write_bytes(b"not a database" * 500)


def damage_index(repo: Path) -> None:
    for path in repo.glob("meta/index/MANIFEST*"):
        data = path.read_bytes()
        path.write_bytes(data[:20] + b"overwritten" + data[31:])


def damage_version(repo: Path) -> None:
    (repo / "VERSION").write_bytes(b"\xff\xfe")


def put_a_file_there(repo: Path) -> None:
    shutil.rmtree(repo)
    repo.touch()


DAMAGES = (damage_pointer, damage_list_of_runs, damage_index, damage_version, put_a_file_there)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__)
def test_a_damaged_repository_is_one_warning_with_the_cause_and_the_repair(
    alone, workdir, damage, monkeypatch, capfd
):
    folder, run_hash = alone
    run = create_run("runs")
    shutil.copytree(folder / ".aim", ".aim")
    damage(workdir / ".aim")
    write_record(run, run_hash, workdir)
    # Not forked: this process has opened repositories, and what it forks may hang in Aim.
    monkeypatch.setattr("utils_alg1.tracking.background.START_METHOD", "spawn")
    warnings: list[str] = []
    create = partial(open_aim, run.path.absolute(), run_hash, 3, {}, {})
    tracker = BackgroundTracker("Aim", create, warnings.append, run.metrics_path).start()
    tracker.start_close()
    assert tracker.ended.wait(100)
    (warning,) = warnings
    assert warning.startswith(f"Aim is switched off, training continues: {workdir / '.aim'} ")
    is_unclear = damage is damage_list_of_runs
    assert ("cannot be opened (" if is_unclear else "is damaged (") in warning
    repair = "move it away: the next --resume sends the run to a new one"
    assert warning.endswith(f"); if the disk is not full, {repair}" if is_unclear else f"); {repair}")
    assert capfd.readouterr() == ("", "")
    # The repair that it names:
    (workdir / ".aim").rename("damaged")
    repaired = create(pytest.fail)
    assert (repaired.enabled, repaired.first_step) == (True, 0)
    repaired.close()


def test_paths_that_are_not_utf8_are_kept_escaped(workdir):
    path = os.fsdecode(b"b\xff/runs/x")
    tracker = AimTracker(path, path, workdir, warn=pytest.fail)
    tracker.track_config({"data_path": path, "n_embd": 2, "betas": (0.9, path)})
    run_hash = tracker.run_hash
    tracker.close()
    kept = aim.Run(run_hash, repo=str(workdir), read_only=True)
    assert (kept["run_dir"], kept.name) == (r"b\udcff/runs/x", r"b\udcff/runs/x")
    hparams = {"data_path": r"b\udcff/runs/x", "n_embd": 2, "betas": [0.9, r"b\udcff/runs/x"]}
    assert kept["hparams"] == hparams


def test_a_repository_under_a_path_that_is_not_utf8_is_one_clear_warning(workdir):
    repo = workdir / os.fsdecode(b"b\xff")
    repo.mkdir()
    warnings: list[str] = []
    assert not AimTracker("x", "x", repo, warn=warnings.append).enabled
    reason = f"the path of {repo}/.aim is not UTF-8, which Aim needs; start in another folder"
    assert warnings == [f"Aim is switched off, training continues: {reason}"]


class Broken:
    """Raises in every method that is used of an aim.Run."""

    name = hash = "x"
    track = close = __setitem__ = fail(RuntimeError("boom"))


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("track_config", ({"a": 1},)),
        ("track_metadata", ("git_commit", "abc")),
        ("track_metric", ("loss", 1.0, 0)),
        ("track_distribution", ("w", [1.0], 0)),
        ("track_image", ("i", np.zeros((2, 2), np.uint8), 0)),
        ("track_text", ("t", "text", 0)),
        ("log", ("scalars", {"loss/val": 1.0}, 0)),
        ("close", ()),
    ],
)
def test_no_method_of_the_tracker_raises_and_the_first_failure_is_the_only_warning(
    aim_run, method, arguments
):
    aim_run(lambda *_, **__: MagicMock())
    warnings: list[str] = []
    tracker = AimTracker("name", "run", warn=warnings.append)
    tracker._run = Broken()
    for _ in range(2):
        getattr(tracker, method)(*arguments)
    assert not tracker.enabled
    assert warnings == ["Aim is switched off, training continues: RuntimeError: boom"]


def test_used_on_its_own_a_failure_is_a_python_warning(aim_run):
    aim_run(fail(RuntimeError("boom")))
    with pytest.warns(UserWarning, match="Aim is switched off, training continues: RuntimeError: boom"):
        AimTracker("name", "run").close()


def test_the_instructions_name_command_and_address():
    command, remark = instructions()
    assert (command, remark) == ("aim up", f"then open {address()}")
    assert instructions("/a b")[0] == "aim up --repo='/a b'"


def test_the_address_holds_the_query_and_the_grouping_as_aims_pages_read_them():
    url = urlsplit(address("127.0.0.1", 43801))
    assert (url.netloc, url.path) == ("127.0.0.1:43801", "/metrics")
    values = {}
    for name, (text,) in parse_qs(url.query).items():
        assert re.fullmatch("O-[A-Za-z0-9_-]+", text)
        values[name] = json.loads(base64.urlsafe_b64decode(text[2:] + "=" * (-len(text[2:]) % 4)))
    assert values == {"select": QUERY, "grouping": GROUPING}


def test_the_query_of_the_address_finds_train_and_val_loss(repo):
    found = aim.Repo(str(repo)).query_metrics(QUERY["query"], report_mode=0)
    contexts = [metric.context.to_dict() for metrics in found.iter_runs() for metric in metrics]
    assert sorted(context["subset"] for context in contexts) == ["train", "val"]
