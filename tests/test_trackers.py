"""The fan-out of metrics: order, durability, replay after a kill, and every way in which a tracker fails."""

from __future__ import annotations

import builtins
import functools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch.utils.tensorboard  # once, here: the runs below start TensorBoard in a moment
from conftest import PROJECT, QUIET_TRACKERS, TINY, Notes, lasting_metrics, with_changes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins import projector
from tensorboard.plugins.hparams import summary_v2

from utils_alg1.base.errors import DISK_FAILED, Alg1Error
from utils_alg1.base.guard import Guard
from utils_alg1.base.summaries import Embedding, Histogram, Image, Tracker, model_histograms
from utils_alg1.base.threads import thread_limit
from utils_alg1.network.tensor_file import read_tensors
from utils_alg1.run_directory import RunFolder, list_runs, lock_run
from utils_alg1.tracking import background as background_module
from utils_alg1.tracking import closing as closing_module
from utils_alg1.tracking import tracker_process as process_module
from utils_alg1.tracking import trackers as trackers_module
from utils_alg1.tracking.aim_record import read_record
from utils_alg1.tracking.background import BackgroundTracker
from utils_alg1.tracking.metrics_file import MetricsFile, RowReader, cut_metrics, read_metrics, read_rows
from utils_alg1.tracking.samples_file import SamplesFile, cut_samples, read_samples
from utils_alg1.tracking.trackers import Trackers, open_aim, open_tensorboard, start_trackers
from utils_alg1.utils_run_manager import create_run

LOOKS = ("histogram", "activation", "attention", "embedding", "sample")
NO_LOOKS = [f"--{look}-interval=0" for look in LOOKS]
REMEDY = "a resume sends the missing curves, and so does: python compare.py "
RUN_TINY = ["--data", "text.txt", *TINY, "--quiet"]


class Gate:
    """An event for several processes; multiprocessing's own hangs once a process that waits is killed."""

    def __init__(self, path: Path):
        self.path = path

    def set(self) -> None:
        self.path.touch()

    def wait(self) -> bool:
        while not self.path.exists():
            time.sleep(0.01)
        return True


class Recorder(Tracker):
    """Records its calls on disk; `block` names kinds and methods that wait for `gate`."""

    run_hash = "hash-1"

    def __init__(self, folder: Path, *block: str):
        self.notes = Notes(folder / "calls.pkl")
        self.block = block
        self.gate = Gate(folder / "gate")

    @property
    def calls(self) -> list[tuple]:
        return self.notes.read()

    def _record(self, *call) -> None:
        if call[0] in self.block:
            self.gate.wait()
        self.notes.append(call)

    def log(self, kind, payload, step):
        self._record(kind, [h.name for h in payload] if kind == "histograms" else payload, step)

    def flush(self):
        self._record("flush")

    def close(self):
        self._record("close")


NO_METRICS = Path("/nowhere/metrics.jsonl")


def background(
    create, warn=pytest.fail, flushed_step=0, run_hash=None, metrics_path=NO_METRICS
) -> BackgroundTracker:
    return BackgroundTracker("X", create, warn, metrics_path, flushed_step, run_hash).start()


def flush(tracker: BackgroundTracker, step: int) -> None:
    """Flush, once the tracker is open, and wait for it."""
    assert tracker.ready.wait(30)
    tracker.start_flush(step)
    assert tracker.ready.wait(30)


def close(tracker: BackgroundTracker) -> int:
    """Close; the exit code of the tracker's process."""
    tracker.start_close()
    assert tracker.ended.wait(30)
    return tracker._process.exitcode


def of(tracker: Tracker):
    """A factory that returns a tracker of this process."""
    return lambda _: tracker


def write_rows(path: Path, steps: int, eval_interval: int = 2) -> None:
    with_file = MetricsFile(path)
    for step in range(steps):
        if step % eval_interval == 0:
            losses = {"loss/train": step + 0.1, "loss/val": step + 0.2}
            with_file.log("scalars", {**losses, "learning_rate": 1e-3}, step)
        with_file.log("scalars", {"loss/train_step": step + 0.3}, step)
    with_file.close()


def boom(error: BaseException):
    def fail(*_, **__):
        raise error

    return fail


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Nothing here looks at the picture of the loss curve, which takes a while to draw."""
    monkeypatch.setattr("utils_alg1.report.pictures.draw_loss_curve", lambda *_: None)


@pytest.fixture
def short_timeouts(monkeypatch):
    """Trackers are killed after a moment."""
    monkeypatch.setattr(process_module, "TIMEOUT", 0.2)
    monkeypatch.setattr(process_module, "FLUSH_TIMEOUT", 0.05)
    monkeypatch.setattr(process_module, "NICE_INCREMENT", 0)  # so that a busy machine is no slower


@pytest.fixture(autouse=True)
def nobody_left() -> Iterator[None]:
    """Whatever a tracker does, its process is gone when the run is."""
    yield
    for process in multiprocessing.active_children():
        process.join(10)  # a killed one may take longer than the short timeouts on a busy machine
    assert multiprocessing.active_children() == []


def hang(*_, **__) -> None:
    """A call that never comes back."""
    threading.Event().wait()


def exit_codes(trackers: Trackers) -> dict[str, int]:
    """How the process of each tracker has ended."""
    return {name: tracker._process.exitcode for name, tracker in trackers.background.items()}


# --- the run's own file -------------------------------------------------------------------------------


def test_the_metrics_file_holds_a_line_for_each_step_and_evaluation(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, 2)
    assert path.read_text() == (
        '{"step": 0, "loss/train": 0.1, "loss/val": 0.2, "learning_rate": 0.001}\n'
        '{"step": 0, "loss/train_step": 0.3}\n'
        '{"step": 1, "loss/train_step": 1.3}\n'
    )


def test_a_metrics_file_is_continued_not_overwritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, 1)
    first = path.read_bytes()
    write_rows(path, 1)
    assert path.read_bytes() == first * 2


def test_an_evaluation_can_be_read_at_once(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.log("scalars", {"loss/train_step": 1.5}, 0)
    file.log("scalars", {"loss/val": 2.0}, 1)
    assert [row["step"] for row in read_metrics(file.path)] == [0, 1]
    file.close()


@pytest.fixture
def synced_sizes(monkeypatch) -> list[int]:
    """The size that each file had when it was fsynced."""
    sizes: list[int] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        fsync(descriptor)
        sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", record)
    return sizes


def test_a_flush_makes_every_row_durable(tmp_path, synced_sizes):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.log("scalars", {"loss/train_step": 1.5}, 0)
    file.flush()
    assert synced_sizes == [file.path.stat().st_size]
    assert synced_sizes[0] > 0
    file.close()


def test_reading_leaves_out_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, 4)
    whole = list(read_metrics(path))
    assert len(whole) == 6
    path.write_bytes(path.read_bytes() + b'{"step": 4, "loss/train_step": 1.0}')
    assert list(read_metrics(path)) == whole
    with path.open("rb") as file, path.open("ab") as writer:  # an open file goes on once the line is whole
        assert [list(read_rows(file)) for _ in range(2)] == [whole, []]
        writer.write(b"\n")
        writer.flush()
        assert list(read_rows(file)) == [{"step": 4, "loss/train_step": 1.0}]


def test_a_metrics_file_that_is_not_there_has_no_rows(tmp_path):
    assert list(read_metrics(tmp_path / "none.jsonl")) == []
    cut_metrics(tmp_path / "none.jsonl", 0, pytest.fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [0, 1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("torn", [b"", b'{"step": 7, "loss/tr'])
def test_a_cut_keeps_the_rows_before_the_step_byte_for_byte(tmp_path, synced_sizes, step, torn):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, 7)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + torn)
    kept = b"".join(line for line in lines if json.loads(line)["step"] < step)
    cut_metrics(path, step, str)
    assert path.read_bytes() == kept
    assert synced_sizes == [len(kept)]


@pytest.mark.parametrize(
    "work",
    [
        lambda path: MetricsFile(path / "no" / "folder"),
        lambda path: cut_metrics(path, 1, pytest.fail),  # a folder, not a file
    ],
    ids=["open", "cut"],
)
def test_a_file_system_that_refuses_is_exit_code_4(tmp_path, work):
    with pytest.raises(Alg1Error) as error:
        work(tmp_path)
    assert error.value.exit_code == DISK_FAILED
    assert str(tmp_path) in error.value.message


def test_the_metrics_file_keeps_scalars_only(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for kind in ("texts", "embedding", "a kind of the future"):
        file.log(kind, {"samples": "a"}, 0)
    file.close()
    assert file.path.read_bytes() == b""


def test_the_samples_file_keeps_texts_only_whether_or_not_a_tracker_works(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert read_samples(path) == []
    trackers = Trackers(MetricsFile(tmp_path / "metrics.jsonl"), {}, SamplesFile(path))
    for kind, payload in (("scalars", {"a": 1.0}), ("images", ["i"]), ("texts", {})):  # {}: not finite
        trackers.log(kind, payload, 0)
    assert not path.exists() and [trackers.keeps(kind) for kind in ("texts", "images")] == [True, False]
    for step in (0, 4, 8):
        trackers.log("texts", {"samples": f"é\n{step}"}, step)
    trackers.close()
    assert read_samples(path) == [(0, "é\n0"), (4, "é\n4"), (8, "é\n8")]
    cut_samples(path, 8)
    assert (
        path.read_bytes() == b'{"step": 0, "samples": "\\u00e9\\n0"}\n{"step": 4, "samples": "\\u00e9\\n4"}\n'
    )
    path.write_bytes(path.read_bytes() + b'{"step": 5, "samp')
    assert read_samples(path) == [(0, "é\n0"), (4, "é\n4")]
    cut_samples(path, 4)
    assert read_samples(path) == [(0, "é\n0")]


# --- a process for each tracker -----------------------------------------------------------------------


def test_a_tracker_gets_everything_once_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(background_module, "QUEUE_SIZE", 2)
    recorder, path = Recorder(tmp_path), tmp_path / "m.jsonl"
    with closing(Trackers(MetricsFile(path), {"x": background(of(recorder), metrics_path=path)})) as trackers:
        for step in range(50):
            trackers.log("scalars", {"loss/train": 1.0, "loss/val": 2.0, "learning_rate": 3.0}, step)
            trackers.log("scalars", {"loss/train_step": 0.5}, step)
            trackers.log("histograms", list(model_histograms(torch.nn.Linear(2, 1))), step)
            trackers.log("images", [step], step)
            trackers.log("texts", {"samples": "a"}, step)
            trackers.log("embedding", "e", step)
    rows, others = [], []
    evaluation = {"loss/train": 1.0, "loss/val": 2.0, "learning_rate": 3.0, "best_val_loss": 2.0}
    for step in range(50):
        rows.append(("scalars", evaluation, step))
        rows.append(("scalars", {"loss/train_step": 0.5}, step))
        others += [("histograms", ["weight", "bias"], step), ("images", [step], step)]
        others += [("texts", {"samples": "a"}, step), ("embedding", "e", step)]
    *calls, last = recorder.calls
    assert [call for call in calls if call[0] == "scalars"] == rows
    assert [call for call in calls if call[0] not in ("scalars", "flush")] == others
    assert last == ("close",)
    assert exit_codes(trackers) == {"x": 0}


def test_flushed_step_moves_when_a_flush_was_done_and_a_late_one_is_waited_for_once(tmp_path, monkeypatch):
    waits: list[float] = []
    recorder, path = Recorder(tmp_path, "scalars"), tmp_path / "m.jsonl"
    recorder.first_step = 2
    tracker = background(of(recorder), flushed_step=2, metrics_path=path)
    assert tracker.ready.wait(30)
    trackers = Trackers(MetricsFile(path), {"x": tracker})
    trackers.log("scalars", {"loss/train_step": 1.0}, 6)
    monkeypatch.setattr(process_module, "FLUSH_TIMEOUT", 0.05)
    monkeypatch.setattr(tracker.ready, "wait", lambda s, wait=tracker.ready.wait: waits.append(s) or wait(s))
    for step in (7, 8, 9):
        trackers.flush(step)
    assert len(waits) == 1
    assert trackers.state() == {"x": {"run": "hash-1", "synced": 2}}
    recorder.gate.set()
    wait_until(tracker.ready.is_set)
    assert trackers.state() == {"x": {"run": "hash-1", "synced": 7}}
    flush(tracker, 10)
    assert trackers.state() == {"x": {"run": "hash-1", "synced": 10}}
    trackers.close()


def test_a_flush_does_not_wait_for_a_tracker_that_is_still_opening(tmp_path, monkeypatch):
    monkeypatch.setattr(process_module, "FLUSH_TIMEOUT", 0)
    opened = Gate(tmp_path / "opened")
    recorder = Recorder(tmp_path)
    tracker = background(lambda _: opened.wait() and recorder)
    trackers = Trackers(MetricsFile(tmp_path / "m.jsonl"), {"x": tracker})
    trackers.flush(7)
    assert trackers.state() == {"x": {"run": None, "synced": 0}}
    opened.set()
    trackers.close()
    assert recorder.calls == [("close",)]


def test_a_tracker_that_failed_is_never_marked_as_flushed(tmp_path):
    class Raising(Recorder):
        def flush(self):
            raise RuntimeError("boom")

    class Warning(Recorder):
        def flush(self):
            self.warn("it has failed, and does not raise")

    def start(kind, warn):
        tracker = kind(tmp_path)
        tracker.warn, tracker.first_step = warn, 1
        return tracker

    background_trackers = {
        kind.__name__: background(functools.partial(start, kind), str, flushed_step=1)
        for kind in (Raising, Warning)
    }
    for tracker in background_trackers.values():
        flush(tracker, 5)
        assert tracker.flushed_step == 1
        assert not tracker.working
    Trackers(MetricsFile(tmp_path / "m.jsonl"), background_trackers).close()


def test_the_run_hash_is_the_old_one_until_a_tracker_is_open_and_where_it_cannot_be_opened(tmp_path):
    opened = Gate(tmp_path / "opened")
    tracker = background(lambda _: opened.wait() and Recorder(tmp_path), run_hash="hash-0")
    assert tracker.run_hash == "hash-0"
    opened.set()
    close(tracker)
    assert tracker.run_hash == "hash-1"
    broken = background(boom(RuntimeError("boom")), str, 3, "hash-0")
    close(broken)
    assert (broken.run_hash, broken.flushed_step) == ("hash-0", 3)


def test_a_full_queue_gives_a_tracker_up_once_and_blocks_never_again(tmp_path, monkeypatch, short_timeouts):
    monkeypatch.setattr(background_module, "QUEUE_SIZE", 3)
    warnings: list[str] = []
    recorder = Recorder(tmp_path, "scalars")
    tracker = background(of(recorder), warnings.append)
    values = {"loss/train_step": 1.0, "much": "x" * 100_000}  # a pipe takes some of these, not all
    for step in range(50):
        tracker.log("scalars", values, step)
    assert warnings == ["X is switched off, training continues: it took nothing for 0 seconds"]
    tracker.start_flush(50)
    assert tracker.ready.is_set()
    recorder.gate.set()
    assert close(tracker) == 0
    *scalars, last = recorder.calls
    assert last == ("close",)
    assert 0 < len(scalars) < 50
    assert scalars == [("scalars", values, step) for step in range(len(scalars))]


def test_a_tracker_that_fails_is_still_closed_before_the_end(tmp_path):
    class Failing(Recorder):
        def log(self, kind, payload, step):
            raise RuntimeError("boom")

    failing = Failing(tmp_path)
    warnings: list[str] = []
    tracker = background(of(failing), warnings.append)
    tracker.log("scalars", {"loss/train_step": 1.0}, 0)
    close(tracker)
    assert failing.calls == [("close",)]
    assert warnings == ["X is switched off, training continues: RuntimeError: boom"]


def test_trackers_are_closed_even_when_the_file_cannot_be(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path)
    local = MetricsFile(tmp_path / "m.jsonl")

    def full() -> None:
        raise Alg1Error("disk full")

    monkeypatch.setattr(local, "close", full)
    with pytest.raises(Alg1Error, match="disk full"):
        Trackers(local, {"x": background(of(recorder))}).close()
    assert recorder.calls == [("close",)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("boom"), "RuntimeError: boom"),
        (SystemExit(3), "SystemExit: 3"),
        (ValueError(), "ValueError"),
        (OSError(28, "No space left"), "No space left"),
        (RuntimeError("one\ntwo"), "RuntimeError: one"),
        (RuntimeError("x" * 999), "RuntimeError: " + "x" * 186),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_guard_says_one_line_once_and_then_does_nothing(error, reason):
    warnings: list[str] = []
    calls: list[int] = []
    guard = Guard("X", warnings.append)

    def work() -> int:
        calls.append(1)
        raise error

    assert guard.attempt(lambda: 5) == 5
    assert guard.enabled
    assert guard.attempt(work) is None
    assert guard.attempt(work) is None
    assert not guard.enabled
    assert calls == [1]
    assert warnings == [f"X is switched off, training continues: {reason}"]


def test_a_guard_lets_a_keyboard_interrupt_through():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guard("X", print).attempt(interrupt)


# --- a process that is killed -------------------------------------------------------------------------


def alive(pid: int) -> bool:
    """Whether there is such a process that is more than an entry in its parent's table."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


@pytest.fixture
def orphans(tmp_path, monkeypatch):
    """`orphans(recorders)`: the directory of a run whose process was killed, and the pids of its trackers.

    Each tracker was given one row. Whatever they wait for comes at the end of the test.
    """
    recorders: list[Recorder] = []
    pids = Notes(tmp_path / "pids.pkl")

    def run_and_die(started: list[Recorder]) -> None:
        run = create_run(tmp_path / "runs")
        background_trackers = {
            str(i): BackgroundTracker("X", of(recorder), print, run.metrics_path)
            for i, recorder in enumerate(started)
        }
        trackers = Trackers(MetricsFile(run.metrics_path), background_trackers)
        for tracker in background_trackers.values():
            pids.append(tracker.start()._process.pid)
        trackers.log("scalars", {"loss/val": 1.0}, 0)
        wait_until(lambda: all(recorder.calls for recorder in started))
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(*started: Recorder) -> tuple[Path, list[int]]:
        recorders.extend(started)
        process = multiprocessing.get_context("fork").Process(target=run_and_die, args=(started,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (path,) = list_runs(tmp_path / "runs")
        return path, pids.read()

    yield leave
    for recorder in recorders:
        recorder.gate.set()


def test_when_its_parent_is_killed_a_tracker_holds_no_lock_closes_and_leaves(tmp_path, orphans):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    recorders = [Recorder(folder, "close") for folder in folders]
    path, pids = orphans(*recorders)
    with lock_run(path):
        assert [alive(pid) for pid in pids] == [True, True]  # they still close
    for recorder in recorders:
        recorder.gate.set()
    wait_until(lambda: not any(map(alive, pids)))
    calls = [("scalars", {"loss/val": 1.0, "best_val_loss": 1.0}, 0), ("close",)]
    assert [recorder.calls for recorder in recorders] == [calls] * 2


def test_a_tracker_that_hangs_does_not_outlive_its_parent(tmp_path, orphans, short_timeouts):
    path, (pid,) = orphans(Recorder(tmp_path, "close"))
    lock_run(path).lock.release()
    wait_until(lambda: not alive(pid), 10)


def test_a_tracker_leaves_signals_to_its_parent(tmp_path):
    recorder = Recorder(tmp_path)
    tracker = background(of(recorder))
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(tracker._process.pid, number)
    tracker.log("scalars", {"loss/val": 1.0}, 0)
    assert close(tracker) == 0
    assert recorder.calls == [("scalars", {"loss/val": 1.0}, 0), ("close",)]


def test_a_tracker_whose_process_is_killed_is_one_warning_and_nobody_waits_for_it(tmp_path):
    warnings: list[str] = []
    recorder = Recorder(tmp_path, "flush")
    recorder.first_step = 2
    tracker = background(of(recorder), warnings.append, flushed_step=2)
    trackers = Trackers(MetricsFile(tmp_path / "m.jsonl"), {"x": tracker})
    assert tracker.ready.wait(30)
    tracker.start_flush(5)
    tracker._process.kill()
    assert tracker.ready.wait(30)
    for step in range(20_000):
        trackers.log("texts", {"samples": "a"}, step)
    trackers.flush(6)
    assert tracker.ready.is_set()
    assert trackers.state() == {"x": {"run": "hash-1", "synced": 2}}
    trackers.close()
    assert warnings == ["X is switched off, training continues: its process has ended (-9)"]


def test_a_process_that_cannot_be_started_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fork", boom(BlockingIOError(11, "Resource temporarily unavailable")))
    warnings: list[str] = []
    with closing(
        Trackers(MetricsFile(tmp_path / "m.jsonl"), {"x": background(boom(KeyError()), warnings.append)})
    ) as trackers:
        trackers.log("scalars", {"loss/val": 1.0}, 0)
        trackers.flush(1)
        assert trackers.working_names == []
    assert warnings == [f"X is switched off, training continues: {thread_limit()}"]


def test_what_cannot_be_sent_is_one_warning_and_the_tracker_is_closed(tmp_path):
    warnings: list[str] = []
    recorder = Recorder(tmp_path)
    tracker = background(of(recorder), warnings.append)
    tracker.log("texts", {"samples": lambda: 0}, 0)
    tracker.log("texts", {"samples": "a"}, 1)
    assert not tracker.working
    assert close(tracker) == 0
    assert recorder.calls == [("close",)]
    (warning,) = warnings
    assert warning.startswith("X is switched off, training continues: ")
    assert "pickle" in warning


def test_what_was_printed_before_is_printed_once_and_what_a_tracker_prints_is_dropped(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": ""}
    code = (
        "import os, pathlib, sys, threading\n"
        "from utils_alg1.base.summaries import Tracker\n"
        "from utils_alg1.tracking.background import BackgroundTracker\n"
        "def create(warn):\n"
        "    print('opened', flush=True)\n"
        "    thread = threading.Thread(target=lambda: 1 / 0)\n"
        "    thread.start(), thread.join(), os.system('echo more; echo more >&2')\n"
        "    return Tracker()\n"
        "sys.stdout.write('once ')\n"
        "warn, path = lambda text: print(text, file=sys.stderr), pathlib.Path('none')\n"
        "tracker = BackgroundTracker('X', create, warn, path).start()\n"
        "tracker.start_close()\n"
        "assert tracker.ended.wait(60)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "once ", "")
    gone, stdout = os.pipe()
    os.close(gone)
    done = subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)
    os.close(stdout)
    assert "switched off" not in done.stderr


def test_a_process_begun_anew_serves_as_well_as_a_forked_one(tmp_path, monkeypatch):
    monkeypatch.setattr(background_module, "START_METHOD", "spawn")
    run = create_run(tmp_path / "runs")
    tracker = background(functools.partial(open_tensorboard, run.path, None, {}))
    tracker.log("scalars", {"loss/train_step": 1.5}, 3)
    tracker.start_close()
    assert tracker.ended.wait(100)
    events = EventAccumulator(str(run.tensorboard_dir)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("Loss/train_step")] == [(3, 1.5)]
    pickle.dumps(functools.partial(open_aim, run.path, "hash-0", 3, {"n_embd": 16}, {"git": {}}))


# --- what a resumed run sends again -------------------------------------------------------------------


@pytest.fixture
def started(tmp_path, monkeypatch):
    """`start(state, hashes)` starts recorders on a metrics file of steps 0 to 9; what each then got."""
    notes_by_name = {name: Notes(tmp_path / name) for name in ("opened", "aim", "tensorboard", "purge_step")}

    class FakeAim(Tracker):
        def __init__(self, run_name, run_dir, repo, run_hash, warn, tag):
            notes_by_name["opened"].append(run_hash)
            self.run_hash = run_hash if run_hash in exists else "new"

        def track_config(self, config): ...

        def log(self, kind, payload, step):
            notes_by_name["aim"].append((payload, step))

    class FakeTensorBoard(Tracker):
        def __init__(self, log_dir, purge_step, warn, must_exist=False):
            notes_by_name["purge_step"].append(purge_step)

        def describe_run(self, name, hparams, main): ...

        def log(self, kind, payload, step):
            notes_by_name["tensorboard"].append((payload, step))

    monkeypatch.setattr(trackers_module, "AimTracker", FakeAim)
    monkeypatch.setattr(trackers_module, "TensorBoardWriter", FakeTensorBoard)
    monkeypatch.setattr(trackers_module, "MetricLogger", lambda writer: writer)
    exists: set[str] = set()
    run = create_run(tmp_path / "runs")
    (run.tensorboard_dir / "events.out.tfevents.1.host.1.0").touch()
    write_rows(run.metrics_path, 10)
    params = types.SimpleNamespace(
        train=types.SimpleNamespace(aim=True), tensorboard=types.SimpleNamespace(tensorboard=True)
    )

    def start(state, hashes=("old",)):
        exists.clear()
        exists.update(hashes)
        for notes in notes_by_name.values():
            notes.path.write_bytes(b"")
        with start_trackers(run, params, {}, {}, pytest.fail, state) as trackers:
            pass
        return types.SimpleNamespace(
            **{name: notes.read() for name, notes in notes_by_name.items()}, state=trackers.state()
        )

    with run:
        yield start


def test_event_files_that_were_deleted_are_written_again_from_the_start(started, tmp_path):
    (path,) = list_runs(tmp_path / "runs")
    shutil.rmtree(path / "logs/tensorboard")
    after = started({"tensorboard": {"run": None, "synced": 6}})
    assert after.purge_step == [0]
    assert after.tensorboard == rows(range(10))
    assert (path / "logs/tensorboard").is_dir()


def test_a_file_in_the_place_of_the_event_files_is_one_warning(tmp_path):
    run = create_run(tmp_path / "runs")
    run.tensorboard_dir.rmdir()
    run.tensorboard_dir.touch()
    settings = types.SimpleNamespace
    params = settings(train=settings(aim=False), tensorboard=settings(tensorboard=True))
    warnings: list[str] = []
    with run, start_trackers(run, params, {}, {}, warnings.append, {}):
        pass
    (warning,) = warnings
    assert warning.startswith("TensorBoard is switched off, training continues: Not a directory: ")


def test_a_start_that_is_interrupted_closes_what_it_has_started(started, monkeypatch):
    made: list[BackgroundTracker] = []
    closed: list[MetricsFile] = []
    close = MetricsFile.close

    def make(*arguments, **options):
        if made:
            raise KeyboardInterrupt
        made.append(BackgroundTracker(*arguments, **options))
        return made[0]

    monkeypatch.setattr(trackers_module, "BackgroundTracker", make)
    monkeypatch.setattr(MetricsFile, "close", lambda file: (closed.append(file), close(file)))
    with pytest.raises(KeyboardInterrupt):
        started(None)
    assert made[0].ended.is_set() and made[0]._process.exitcode == 0
    assert [file._file.closed for file in closed] == [True]


def rows(steps: range) -> list[tuple]:
    """What a tracker gets for those steps."""
    found: list[tuple] = []
    for step in steps:
        if step % 2 == 0:
            losses = {"loss/train": step + 0.1, "loss/val": step + 0.2}
            found.append(({**losses, "learning_rate": 1e-3, "best_val_loss": 0.2}, step))
        found.append(({"loss/train_step": step + 0.3}, step))
    return found


@pytest.mark.parametrize(("aim", "tensorboard"), [(6, 3), (0, 10), (10, 0), (5, 5)])
def test_a_tracker_gets_the_rows_that_it_had_not_flushed_once(started, aim, tensorboard):
    state = {"aim": {"run": "old", "synced": aim}, "tensorboard": {"run": None, "synced": tensorboard}}
    after = started(state)
    assert after.aim == rows(range(aim, 10))
    assert after.tensorboard == rows(range(tensorboard, 10))
    assert after.purge_step == [tensorboard]
    # A row of step 9 may still have come, unless a checkpoint told otherwise.
    assert after.state == {
        "aim": {"run": "old", "synced": max(aim, 9)},
        "tensorboard": {"run": None, "synced": max(tensorboard, 9)},
    }


def test_a_tracker_that_is_new_to_a_run_gets_all_of_it(started):
    after = started({})
    assert after.opened == [None]
    assert after.aim == after.tensorboard == rows(range(10))
    assert after.purge_step == [0]


def test_an_aim_run_that_is_gone_is_begun_anew_with_all_rows(started):
    after = started({"aim": {"run": "old", "synced": 6}}, hashes=())
    assert after.opened == ["old"]
    assert after.aim == rows(range(10))
    assert after.state["aim"]["run"] == "new"


class RecordedAim(Tracker):
    """As much of an AimTracker as opening needs: a repository is a folder `.aim` with a file for each run."""

    def __init__(self, run_name, run_dir, repo, run_hash, warn, tag):
        self.repo = repo
        folder = repo / ".aim"
        folder.mkdir(exist_ok=True)
        known = run_hash is not None and (folder / run_hash).exists()
        self.run_hash = run_hash if known else f"hash-{len(list(folder.iterdir()))}"
        (folder / self.run_hash).touch()

    def track_config(self, config): ...


@pytest.fixture
def reopened(monkeypatch):
    """`reopened(run_dir, checkpoint_hash)` opens a run in Aim, which has its first 5 steps."""
    monkeypatch.setattr(trackers_module, "AimTracker", RecordedAim)

    def reopen(run_dir: Path, checkpoint_hash: str | None = "hash-0") -> Tracker:
        flushed_step = 0 if checkpoint_hash is None else 5
        return open_aim(run_dir.absolute(), checkpoint_hash, flushed_step, {}, {}, pytest.fail)

    return reopen


def test_a_resume_goes_to_the_aim_repository_that_the_run_has(reopened, workdir, tmp_path, monkeypatch):
    run = create_run("runs").path.absolute()
    first = reopened(run, None)
    assert (first.run_hash, first.repo, first.remark) == ("hash-0", workdir, "")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / ".aim").mkdir(parents=True)
    (elsewhere / ".aim/other").touch()
    monkeypatch.chdir(elsewhere)
    again = reopened(run)
    assert (again.run_hash, again.repo, again.first_step) == ("hash-0", workdir, 5)
    assert again.remark == f"Aim: this run continues in {workdir / '.aim'}"
    # The whole folder was moved, or the run alone: it is still the same run.
    moved = tmp_path / "moved"
    workdir.rename(moved)
    after_move = reopened(moved / "runs" / run.name)
    assert (after_move.run_hash, after_move.repo) == ("hash-0", moved)
    alone = elsewhere / run.name
    (moved / "runs" / run.name).rename(alone)
    assert (reopened(alone).run_hash, reopened(alone).repo) == ("hash-0", moved)
    # The repository is gone, and its folder too: a new run is begun here, and is given all.
    shutil.rmtree(moved)
    lost = reopened(alone, "hash-9")
    assert (lost.repo, lost.first_step) == (elsewhere, 0)
    assert lost.remark.startswith("Aim no longer has this run; a new one is begun: all of its steps are sent")


def test_a_copied_run_begins_a_run_of_its_own_in_aim_and_its_original_keeps_its_own(reopened, workdir):
    run = create_run("runs").path
    reopened(run, None)
    copy = run.with_name("a-copy")
    shutil.copytree(run, copy)
    opened = reopened(copy)
    assert (opened.run_hash, opened.first_step) == ("hash-1", 0)
    assert opened.remark.startswith(
        f"Aim: this run is a copy of {run.absolute()}, which keeps its run in Aim"
    )
    for path, run_hash in ((run, "hash-0"), (copy, "hash-1")):
        again = reopened(path)
        assert (again.run_hash, read_record(RunFolder(path)).run_hash) == (run_hash, run_hash)
    # Without its original a copy is the run that was moved.
    other = run.with_name("other-copy")
    shutil.copytree(run, other)
    shutil.rmtree(run)
    assert reopened(other).run_hash == "hash-0"


@pytest.mark.parametrize("text", ["hash-0\n", "hash: hash-0\n", ""])
def test_a_record_of_an_earlier_version_is_the_hash_alone(reopened, workdir, text):
    run = create_run("runs").path
    reopened(run, None)
    (run / "meta/aim.txt").write_text(text)
    assert (reopened(run).run_hash, reopened(run).first_step) == ("hash-0", 5)


def test_an_aim_run_that_no_checkpoint_names_is_found_again(started):
    assert started({}, hashes=()).state["aim"]["run"] == "new"
    after = started({"aim": {"run": None, "synced": 0}}, hashes=("new",))
    assert after.opened == ["new"]
    assert after.aim == rows(range(10))


# --- a tracker that is far behind ---------------------------------------------------------------------


class Slow(Recorder):
    """Takes a while for each row."""

    def log(self, kind, payload, step):
        time.sleep(0.002)
        super().log(kind, payload, step)

    def steps(self) -> list[int]:
        return [call[2] for call in self.calls if call[0] == "scalars" and "loss/train_step" in call[1]]


@pytest.fixture
def behind(tmp_path, monkeypatch):
    """`behind(first_step)`: trackers of a run of 400 steps, one of which takes them slowly, and that one."""
    path = tmp_path / "m.jsonl"
    write_rows(path, 400, eval_interval=1000)
    monkeypatch.setattr(process_module, "FLUSH_TIMEOUT", 0.05)
    monkeypatch.setattr(background_module, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(closing_module, "LOOK_EVERY", 0.05)
    warnings: list[str] = []

    def start(first_step: int = 0) -> types.SimpleNamespace:
        slow = Slow(tmp_path)
        slow.first_step = first_step
        tracker = background(of(slow), warnings.append, first_step, metrics_path=path)
        assert tracker.ready.wait(30)
        wait_until(lambda: tracker.left)
        trackers = Trackers(MetricsFile(path), {"x": tracker})
        run_dir = path.parent.parent
        return types.SimpleNamespace(
            run_dir=run_dir, trackers=trackers, tracker=tracker, slow=slow, warnings=warnings
        )

    return start


def test_nothing_waits_for_a_tracker_that_is_behind_and_no_memory_holds_its_rows(behind, monkeypatch):
    it = behind()
    monkeypatch.setattr(it.tracker.ready, "wait", lambda _: pytest.fail("waited"))
    for step in range(400, 600):
        it.trackers.log("scalars", {"loss/train_step": 1.0}, step)
    it.trackers.flush(600)
    assert it.tracker.left > 0.3
    assert it.tracker._calls.qsize() == 0
    it.trackers.patient = True
    it.trackers.close()
    assert it.slow.steps() == list(range(600))
    assert it.warnings == []


def test_a_run_that_is_stopped_leaves_the_rest_to_the_next_resume_which_goes_on_there(behind):
    first = behind()
    wait_until(lambda: first.tracker.flushed_step > 20)
    closing_module.NOTICE_AFTER, notice_after = 0.05, closing_module.NOTICE_AFTER
    first.trackers.close()
    closing_module.NOTICE_AFTER = notice_after
    synced = first.trackers.state()["x"]["synced"]
    taken = first.slow.steps()
    assert 20 < synced < 400
    assert synced <= len(taken) <= synced + 1 and taken == list(range(len(taken)))
    assert first.slow.calls[-1] == ("close",)  # it is not killed
    (warning,) = first.warnings
    assert warning.startswith(f"X lacks the steps from {synced} on: it did not close within ")
    assert warning.endswith(f"; {REMEDY}{first.run_dir} --send-to x")
    second = behind(synced)
    second.trackers.patient = True
    second.trackers.close()
    assert second.slow.steps() == taken + list(range(synced, 400))


def test_the_end_of_a_training_waits_and_says_how_much_is_left(behind, monkeypatch):
    monkeypatch.setattr(process_module, "TIMEOUT", 0.6)  # of silence: it takes longer
    monkeypatch.setattr(closing_module, "NOTICE_AFTER", 0.1)
    monkeypatch.setattr(closing_module, "NOTICE_EVERY", 0.1)
    messages: list[str] = []
    monkeypatch.setattr(closing_module.LOGGER, "info", lambda text, *words: messages.append(text % words))
    it = behind()
    it.trackers.patient = True
    it.trackers.close()
    assert it.slow.steps() == list(range(400))
    assert it.warnings == []
    pattern = r"waiting for X to take the rest, (\d+)% of the steps \(Ctrl-C: do not wait\)"
    shares = [int(match[1]) for match in map(re.compile(pattern).fullmatch, messages) if match]
    assert len(shares) > 1 and shares == sorted(shares, reverse=True) and shares[0] > shares[-1]


def test_the_memory_of_a_tracker_that_is_behind_is_that_of_one_row(tmp_path):
    path = tmp_path / "m.jsonl"
    write_rows(path, 50_000)
    assert path.stat().st_size > 2_000_000
    rows, count = RowReader(path, 0), 0
    tracemalloc.start()
    for _ in rows.read(lambda: False):
        count += 1
    assert (count, rows.step, rows.left) == (75_000, 49_999, 0.0)
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


def test_a_reader_of_rows_knows_the_lowest_val_loss_also_of_the_steps_that_it_leaves_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    losses = [math.nan, 3.0, 2.0, math.nan, 2.5, 1.0]
    lines = [json.dumps({"step": step, "loss/val": loss}) for step, loss in enumerate(losses)]
    path.write_text("".join(f"{line}\n" for line in lines))
    for first_step in (0, 3):
        found = [row.get("best_val_loss") for row in RowReader(path, first_step).read(lambda: False)]
        assert found == [None, 3.0, 2.0, 2.0, 2.0, 1.0][first_step:]


def test_a_reader_of_rows_goes_on_where_it_was_and_sees_what_is_written_later(tmp_path):
    path = tmp_path / "m.jsonl"
    reader = RowReader(path, 3)
    assert list(reader.read(lambda: True)) == []  # no file yet
    write_rows(path, 6, eval_interval=100)
    assert [row["step"] for row in reader.read(lambda: reader.step > 3)] == [3, 4]
    assert 0 < reader.left < 0.5
    assert [row["step"] for row in reader.read(lambda: False)] == [5]
    assert reader.left == 0.0
    with path.open("a") as file:
        file.write('{"step": 6, "loss/train_step": 1.0}\n{"step": 7, ')
    assert [row["step"] for row in reader.read(lambda: False)] == [6]
    with path.open("a") as file:
        file.write('"loss/train_step": 1.0}\n')
    assert [row["step"] for row in reader.read(lambda: False)] == [7]


# --- trackers that fail: the run never does -----------------------------------------------------------


def the_run() -> Path:
    (run,) = list_runs("runs")
    return run


def export_and_metrics(run: Path) -> tuple[dict, bytes]:
    tensors, _ = read_tensors(run / "artifacts/export/model.safetensors")
    weights = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return weights, lasting_metrics(run / "logs/metrics.jsonl")


class FakeRun:
    """As much of an aim.Run as is used."""

    hash = "f" * 24
    name = ""

    def track(self, *_, **__): ...
    def add_tag(self, value): ...
    def __setitem__(self, key, value): ...
    def close(self): ...


class FakeSummaryWriter:
    """As much of a SummaryWriter as is used."""

    def __init__(self, log_dir, **__):
        self.log_dir = log_dir
        self.file_writer = types.SimpleNamespace(add_summary=lambda *_: None)

    def add_scalar(self, *_): ...
    def add_histogram_raw(self, *_, **__): ...
    def add_image(self, *_, **__): ...
    def add_text(self, *_): ...
    def add_custom_scalars(self, *_): ...
    def flush(self): ...
    def close(self): ...


AIM_VALUES = ["Distribution", "Image", "Text"]
SUMMARY_WRITER_CALLS = ["add_custom_scalars", "add_scalar", "add_histogram_raw", "add_image", "add_text"]
AIM_PLACES = ["import", "Repo", "Run", "name", "__setitem__", "track", *AIM_VALUES, "draw_embedding", "close"]
TENSORBOARD_PLACES = [
    *("import", "SummaryWriter", "hparams_pb", *SUMMARY_WRITER_CALLS, "ProjectorConfig", "flush", "close")
]


@pytest.fixture
def fake_aim(monkeypatch):
    """`fake_aim(place, fail)` installs an Aim that calls `fail` at one place."""

    def install(place: str, fail) -> None:
        run = type("Run", (FakeRun,), {})
        if place == "name":
            run.name = property(lambda _: "", fail)
        elif hasattr(FakeRun, place):
            setattr(run, place, fail)
        aim = types.ModuleType("aim")
        aim.Run = fail if place == "Run" else lambda *_, **__: run()
        repo = fail if place == "Repo" else (lambda *_, **__: None)
        aim.Repo = types.SimpleNamespace(from_path=repo)
        for name in AIM_VALUES:
            setattr(aim, name, fail if place == name else (lambda *_, **__: None))
        if place == "draw_embedding":
            monkeypatch.setattr("utils_aim.pictures.draw_embedding", fail)
        errors = types.ModuleType("aim.sdk.errors")
        errors.MissingRunError = LookupError
        for name, module in {
            "aim": aim,
            "aim.sdk": types.ModuleType("aim.sdk"),
            "aim.sdk.errors": errors,
        }.items():
            monkeypatch.setitem(sys.modules, name, module)
        if place == "import":
            fail_at_import(monkeypatch, "aim", fail)

    return install


@pytest.fixture
def fake_tensorboard(monkeypatch):
    """`fake_tensorboard(place, fail)` installs a SummaryWriter that calls `fail` at one place."""

    def install(place: str, fail) -> None:
        writer = type("SummaryWriter", (FakeSummaryWriter,), {})
        if place == "SummaryWriter":
            writer.__init__ = fail
        elif hasattr(FakeSummaryWriter, place):
            setattr(writer, place, fail)
        monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", writer)
        if place == "hparams_pb":
            monkeypatch.setattr(summary_v2, "hparams_pb", fail)
        if place == "ProjectorConfig":
            monkeypatch.setattr(projector, "ProjectorConfig", fail)
        if place == "import":
            fail_at_import(monkeypatch, "torch.utils.tensorboard", fail)

    return install


def fail_at_import(monkeypatch, package: str, fail) -> None:
    real = builtins.__import__

    def load(name, *arguments, **keywords):
        return fail() if name == package else real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", load)


def open_and_log(name: str, folder: Path) -> tuple[int, list[str]]:
    """Log something of each kind to a tracker in its process; the exit code of that, and the warnings."""
    run = create_run(folder / "runs")
    create = {
        "Aim": functools.partial(open_aim, run.path, None, 0, {"n_embd": 16}, {"git": {}}),
        "TensorBoard": functools.partial(open_tensorboard, run.path, None, {"n_embd": 16}),
    }[name]
    warnings: list[str] = []
    tracker = BackgroundTracker(name, create, warnings.append, run.metrics_path).start()
    trackers = Trackers(MetricsFile(run.metrics_path), {"x": tracker})
    tracker.log("scalars", {"loss/val": 1.5}, 0)
    tracker.log("histograms", [Histogram("p", "parameter", np.array([1, 2]), np.arange(3.0))], 0)
    tracker.log("images", [Image("attention", np.eye(2)[None, None], "layer", "head")], 0)
    tracker.log("texts", {"samples": "a"}, 0)
    tracker.log("embedding", Embedding("token_embeddings", np.eye(2, dtype=np.float32), ["a", "b"]), 0)
    if tracker.ready.wait(process_module.TIMEOUT):
        tracker.start_flush(1)
        tracker.ready.wait(process_module.TIMEOUT)
    trackers.close()
    return tracker._process.exitcode, warnings


FAILURES = [
    *(("Aim", place, RuntimeError("boom")) for place in AIM_PLACES),
    *(("TensorBoard", place, RuntimeError("boom")) for place in TENSORBOARD_PLACES),
    *(("Aim", place, SystemExit(7)) for place in ("import", "Run", "track", "close")),
    *(("TensorBoard", place, SystemExit(7)) for place in ("import", "add_scalar", "close")),
]


@pytest.mark.parametrize(
    ("name", "place", "error"), FAILURES, ids=[f"{n}-{p}-{type(e).__name__}" for n, p, e in FAILURES]
)
def test_wherever_a_tracker_raises_it_is_one_warning(name, place, error, workdir, fake_aim, fake_tensorboard):
    (fake_aim if name == "Aim" else fake_tensorboard)(place, boom(error))
    warning = f"{name} is switched off, training continues: {type(error).__name__}: {error}"
    assert open_and_log(name, workdir) == (0, [warning])


def crash(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("place", ["SummaryWriter", "add_scalar", "flush", "close"])
def test_wherever_a_tracker_crashes_it_is_one_warning(place, workdir, fake_tensorboard):
    fake_tensorboard(place, crash)
    reason = "training continues: its process has ended (-9)"
    assert open_and_log("TensorBoard", workdir) == (-9, [f"TensorBoard is switched off, {reason}"])


@pytest.mark.parametrize("place", ["SummaryWriter", "add_scalar", "flush", "close"])
def test_wherever_a_tracker_hangs_it_is_one_warning(place, workdir, fake_tensorboard, short_timeouts):
    fake_tensorboard(place, hang)
    lacks = "lacks the whole run" if place == "SummaryWriter" else "may lack the end of the run"
    to_send = f"{REMEDY}{workdir}/runs/{{}} --send-to tensorboard"
    reason = f"{lacks}: it did not close within 0 seconds; {to_send}"
    code, warnings = open_and_log("TensorBoard", workdir)
    (run,) = list_runs(workdir / "runs")
    assert (code, warnings) == (-9, [f"TensorBoard {reason.format(run.name)}"])


def test_a_tracker_that_raises_and_then_hangs_is_still_one_warning(
    workdir, fake_aim, short_timeouts, monkeypatch
):
    monkeypatch.setattr(FakeRun, "close", hang)
    fake_aim("track", boom(RuntimeError("boom")))
    warning = "Aim is switched off, training continues: RuntimeError: boom"
    assert open_and_log("Aim", workdir) == (-9, [warning])


def raises(fake_aim, fake_tensorboard, _) -> str:
    fake_aim("track", boom(RuntimeError("boom")))
    fake_tensorboard("add_scalar", boom(RuntimeError("boom")))
    return "is switched off, training continues: RuntimeError: boom"


def crashes(fake_aim, fake_tensorboard, _) -> str:
    fake_aim("Run", crash)
    fake_tensorboard("add_scalar", crash)
    return "is switched off, training continues: its process has ended (-9)"


def hangs(fake_aim, fake_tensorboard, monkeypatch) -> str:
    monkeypatch.setattr(process_module, "TIMEOUT", 0.2)
    fake_aim("track", hang)
    fake_tensorboard("add_scalar", hang)
    return "may lack the end of the run: it did not close within 0 seconds"


def is_missing(fake_aim, fake_tensorboard, monkeypatch) -> str:
    for module in ("aim", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    return "is switched off, training continues: ModuleNotFoundError: import of "


@pytest.mark.parametrize("failure", [raises, crashes, hangs, is_missing], ids=lambda f: f.__name__)
def test_a_run_whose_trackers_fail_is_one_warning_each_and_the_same_run(
    failure, train, text_file, fake_aim, fake_tensorboard, monkeypatch
):
    """It ends with the bytes of a run without trackers."""
    plain = ["--runs-dir", "plain", *QUIET_TRACKERS]
    assert train(*RUN_TINY, *plain).code == 0
    reason = failure(fake_aim, fake_tensorboard, monkeypatch)
    result = train(*RUN_TINY)
    assert result.code == 0
    first, second = sorted(result.err.splitlines())
    assert first.startswith(f"warning: Aim {reason}")
    assert second.startswith(f"warning: TensorBoard {reason}")
    (expected,) = list_runs("plain")
    assert export_and_metrics(the_run()) == export_and_metrics(expected)


@pytest.mark.parametrize("lost", ["Aim", "TensorBoard"])
def test_the_summary_names_no_tracker_that_failed_while_it_was_closed(
    lost, train, text_file, fake_aim, fake_tensorboard
):
    fake_aim("close" if lost == "Aim" else "none", boom(RuntimeError("boom")))
    fake_tensorboard("close" if lost == "TensorBoard" else "none", boom(RuntimeError("boom")))
    result = train(*with_changes(["--data", "text.txt", *TINY, *NO_LOOKS]))
    assert result.err == f"warning: {lost} is switched off, training continues: RuntimeError: boom\n"
    labels = {line.split()[0] for line in result.out.splitlines() if line.strip()}
    assert labels & {"aim", "curves"} == ({"curves"} if lost == "Aim" else {"aim"})


def test_the_threads_and_exit_hooks_of_a_tracker_hold_up_nobody(tmp_path):
    code = (
        "import atexit, functools, pathlib, threading\n"
        "from utils_alg1.base.summaries import Tracker\n"
        "from utils_alg1.tracking import background, closing, tracker_process\n"
        "never, path = threading.Event(), pathlib.Path('none')\n"
        "def create(warn, hangs):\n"
        "    atexit.register(never.wait)\n"
        "    threading.Thread(target=never.wait).start()\n"
        "    return never.wait() if hangs else Tracker()\n"
        "trackers = [\n"
        "    background.BackgroundTracker(str(h), functools.partial(create, hangs=h), print, path)\n"
        "    for h in (False, True)\n"
        "]\n"
        "for tracker in trackers: tracker.start()\n"
        "closing.close_all(trackers[:1])\n"
        "tracker_process.TIMEOUT = 0.2\n"
        "closing.close_all(trackers[1:])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    reason = f"it did not close within 0 seconds; {REMEDY}. --send-to true"
    assert done.stdout == f"True lacks the whole run: {reason}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_run_waits_for_a_tracker_goes_without_it(number, text_file, workdir):
    flags = [word for word in with_changes([*RUN_TINY, "--no-aim", *NO_LOOKS]) if word != "--quiet"]
    code = (
        "import train, threading\n"
        "from utils_alg1.console.script import run_script\n"
        "from utils_alg1.tracking import closing, trackers\n"
        "closing.NOTICE_AFTER = 0.1\n"
        "trackers.TensorBoardWriter = lambda *_, **__: threading.Event().wait()\n"
        f"run_script(lambda: train.main({flags!r}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as process:
        while not (line := process.stdout.readline()).startswith("waiting for TensorBoard"):
            assert line, process.stderr.read()
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    (run,) = list_runs("runs")
    to_send = f"{REMEDY}{run} --send-to tensorboard"
    assert err == f"warning: TensorBoard lacks the whole run: it was not waited for; {to_send}\n"
    assert "\nreached   step " in out and "\na sample:\n" in out


def test_a_signal_while_a_tracker_is_started_is_no_failure_of_it(monkeypatch):
    def raise_exit(*_):
        raise SystemExit(143)

    monkeypatch.setattr(BackgroundTracker, "_start_process", raise_exit)
    with pytest.raises(SystemExit):
        background(of(Tracker()))


def test_the_user_is_told_what_a_run_waits_for(tmp_path, monkeypatch):
    monkeypatch.setattr(closing_module, "NOTICE_AFTER", 0.01)
    messages: list[str] = []
    monkeypatch.setattr(closing_module.LOGGER, "info", lambda text, *words: messages.append(text % words))
    slow = Recorder(tmp_path, "close")
    aim = BackgroundTracker("Aim", of(slow), pytest.fail, NO_METRICS).start()
    background_trackers = [aim, background(of(Tracker()))]
    close(background_trackers[1])
    threading.Timer(0.3, slow.gate.set).start()
    closing_module.close_all(background_trackers)
    assert messages == ["waiting for Aim to take the rest, at most 20 seconds (Ctrl-C: do not wait)"]
