"""Threads and processes where the system may refuse to start one: `ulimit -u`, the limit of a container."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from utils_alg1.base.errors import CANNOT_TRAIN, Alg1Error

PLENTY = 1000  # a limit that is not reached
ENOUGH = 48  # for training with both trackers; Aim alone takes some twenty
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def lacks_threads(error: BaseException) -> bool:
    """Return whether an exception says that no thread can be started; there is no type for it."""
    texts = ("can't start new thread", os.strerror(errno.EAGAIN))  # Python's, and those of C++
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def thread_limit() -> str:
    """Return what to say where no thread or process can be started."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    is_low = 0 <= limit < PLENTY
    where = f"ulimit -u: {limit}" if is_low else "of the system or its container"
    return f"the limit on threads and processes is reached ({where})"


@contextlib.contextmanager
def thread_guard() -> Iterator[None]:
    """Turn it into an Alg1Error (exit code 3) that a thread cannot be started."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_threads(error):
            raise
        raise Alg1Error(thread_limit(), "raise it, or end other programs", CANNOT_TRAIN) from error


def cgroup_limits() -> list[int]:
    """Return the limits on threads of this process's control group (version 2) and of those above it."""
    try:
        (name,) = re.findall(r"^0::/(.*)$", OWN_CGROUP.read_text(), re.MULTILINE)
    except (OSError, ValueError):  # another system, or version 1
        return []
    group, limits = CGROUPS / name, []
    for folder in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):  # not there, as in a container, or "max"
            limits.append(int((folder / "pids.max").read_text()))
    return limits


def enough_threads() -> bool:
    """Return whether ENOUGH threads can be started: tried out where a limit is low."""
    import resource  # which Windows lacks, where the scripts say in one line that they do not run

    limits = [resource.getrlimit(resource.RLIMIT_NPROC)[0], *cgroup_limits()]
    if all(limit >= PLENTY or limit < 0 for limit in limits):
        return True
    release, started = threading.Event(), []
    try:
        for _ in range(ENOUGH):
            thread = threading.Thread(target=release.wait)
            thread.start()
            started.append(thread)
    except RuntimeError:
        return False
    finally:
        release.set()
        for thread in started:
            thread.join()
    return True


def spare_threads() -> None:
    """Where few threads can be started, let OpenBLAS and OpenMP have one, before they are imported.

    OpenMP ends the process if it cannot start another one, and OpenBLAS sends it SIGINT.
    """
    if not enough_threads():
        os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def single_worker(name: str, warn: Callable[[str], None]) -> Executor:
    """Return an executor with one thread; if that cannot be started, one that runs each call at once."""
    pool = ThreadPoolExecutor(1, name)
    try:
        pool.submit(int).result()
    except RuntimeError as error:
        if not lacks_threads(error):
            raise
        warn(thread_limit())
        return AtOnce()
    return pool


class AtOnce(Executor):
    """Runs each call in `submit`."""

    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future
