"""Few threads: what needs one does without it, or says so in a line. Runs are in test_faults_process.py."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import socket
import subprocess
import threading

import pytest
import torch

from parameters import ModelConfig
from utils_alg1.base import threads
from utils_alg1.base.guard import Guard
from utils_alg1.base.threads import thread_limit
from utils_alg1.console.script import run_script
from utils_alg1.network import dropout
from utils_tensorboard.server import serve_tensorboard

REACHED = "the limit on threads and processes is reached (ulimit -u: 7)"


@pytest.fixture
def limit(monkeypatch, tmp_path):
    """Sets the limit that the system tells, and how many threads may be alive besides those there are."""

    def set_limit(told: int, more: int, of_container: str = "max") -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (told, told))
        monkeypatch.setattr(threads, "CGROUPS", tmp_path)
        monkeypatch.setattr(threads, "OWN_CGROUP", tmp_path / "cgroup")
        threads.OWN_CGROUP.write_text("1:name=systemd:/x\n0::/job/step\n")
        (tmp_path / "job/step").mkdir(parents=True, exist_ok=True)
        (tmp_path / "job/step/pids.max").write_text("max\n")
        (tmp_path / "job/pids.max").write_text(f"{of_container}\n")
        start, most = threading.Thread.start, threading.active_count() + more

        def limited(thread: threading.Thread) -> None:
            started.append(thread)
            if threading.active_count() >= most:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)

    started: list[threading.Thread] = []
    set_limit.started = started
    return set_limit


@pytest.mark.parametrize(
    "told, of_container, more, is_enough, tries",
    [
        (resource.RLIM_INFINITY, "max", 0, True, 0),
        (30000, "max", 0, True, 0),
        (60, "max", threads.ENOUGH, True, threads.ENOUGH),
        (60, "max", threads.ENOUGH - 1, False, threads.ENOUGH),
        (5, "max", 0, False, 1),
        (resource.RLIM_INFINITY, "20", 19, False, 20),
    ],
)
def test_where_a_limit_is_low_it_is_tried_out(told, of_container, more, is_enough, tries, limit):
    threads_before = threading.active_count()
    limit(told, more, of_container)
    assert threads.enough_threads() is is_enough
    assert len(limit.started) == tries
    assert threading.active_count() == threads_before


@pytest.mark.parametrize("more, values", [(0, ["1", "1"]), (threads.ENOUGH, [None, None])])
def test_libraries_get_one_thread_where_there_are_few(more, values, limit, monkeypatch):
    names = ["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"]
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    limit(60, more)
    threads.spare_threads()
    assert [os.environ.get(name) for name in names] == values


def test_a_worker_without_a_thread_works_at_once(limit):
    limit(7, 0)
    warnings: list[str] = []
    worker = threads.single_worker("x", warnings.append)
    assert worker.submit(threading.get_ident).result() == threading.get_ident()
    failed = worker.submit(int, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        failed.result()
    assert warnings == [REACHED]


@pytest.mark.parametrize("text", ["can't start new thread", "Resource temporarily unavailable"])
def test_a_tracker_that_gets_no_thread_is_switched_off_with_the_limit(text, limit):
    limit(7, 0)
    warnings: list[str] = []

    def fail() -> None:
        raise RuntimeError(text)

    Guard("Aim", warnings.append).attempt(fail)
    assert warnings == [f"Aim is switched off, training continues: {REACHED}"]


def test_a_script_that_gets_no_thread_says_so(limit, capsys):
    limit(7, 0)
    with pytest.raises(SystemExit) as end:
        run_script(lambda: threading.Thread().start() or 0)
    assert end.value.code == 3
    assert capsys.readouterr().err == f"error: {REACHED}\nhint: raise it, or end other programs\n"


def test_other_limits_than_that_of_the_shell(limit):
    limit(resource.RLIM_INFINITY, 0)
    assert "(of the system or its container)" in thread_limit()


def test_the_server_that_cannot_be_forked_is_not_blamed_on_its_port(limit, tmp_path, monkeypatch):
    def fork(*_, **__):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    limit(7, 0)
    monkeypatch.setattr(subprocess, "Popen", fork)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    warnings: list[str] = []
    with serve_tensorboard(tmp_path, port, warn=warnings.append) as server:
        assert server is None
    assert warnings == [f"TensorBoard is not served on port {port}: {REACHED}"]


def test_dropout_draws_the_same_without_threads(limit, monkeypatch):
    config = ModelConfig(n_embd=16, n_head=2, n_layer=3, block_size=8, dropout=0.5)
    monkeypatch.setattr(dropout, "THREADS_PAY", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = dropout.draw_masks(config, 2, 8, seed=1)
    limit(7, 1)  # the first of two
    drawn = dropout.draw_masks(dataclasses.replace(config), 2, 8, seed=1)
    for layer, same in zip(drawn.layers, expected.layers, strict=True):
        assert torch.equal(layer.proj, same.proj) and torch.equal(layer.down, same.down)
