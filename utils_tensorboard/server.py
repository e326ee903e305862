"""A TensorBoard server that runs as long as a training run."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from utils_alg1.base.threads import thread_limit
from utils_tensorboard.instructions import address

HOST = "127.0.0.1"  # this machine only, because TensorBoard has no passwords
STOP_TIMEOUT = 5  # seconds


@contextlib.contextmanager
def serve_tensorboard(
    log_dir: str | Path, port: int, say: Callable[[str], None] = print, warn: Callable[[str], None] = print
) -> Iterator[subprocess.Popen | None]:
    """Serve a folder of runs until the end of the block, in a process of its own, which is yielded.

    It never raises: a failure is a warning. `say` is given a line that names the address. The server is not
    waited for until it answers.
    """
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={log_dir}"]
    command += [f"--host={HOST}", f"--port={port}"]
    null = subprocess.DEVNULL
    process = None
    try:
        socket.create_server((HOST, port)).close()  # raises if the port is busy
        # In a session of its own: Ctrl-C goes to the training only, which then stops the server.
        process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
    except OSError as error:
        reason = f"{error.strerror}; try --port N"
        if isinstance(error, BlockingIOError):  # of the fork
            reason = thread_limit()
        warn(f"TensorBoard is not served on port {port}: {reason}")
    else:
        say(f"TensorBoard is at {address(port, HOST)} while this run lasts")
    try:
        yield process
    finally:
        if process is not None:
            _stop(process, warn)


def _stop(process: subprocess.Popen, warn: Callable[[str], None]) -> None:
    if process.poll() is not None:
        warn(f"the TensorBoard server ended early (exit code {process.returncode})")
        return
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except (subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):  # a signal only ends the waiting
        process.kill()
        process.wait()
