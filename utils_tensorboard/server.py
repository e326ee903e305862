"""A TensorBoard server of our own, for as long as a run lasts."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HOST = "127.0.0.1"  # TensorBoard has no passwords: it is never offered to other machines
START_TIMEOUT = 30  # seconds
STOP_TIMEOUT = 5


class TensorBoardServer:
    """Serves a folder of runs; no failure of it reaches the caller.

    Args:
        log_dir: folder of the runs.
        port: where to listen; a busy one is a warning.
        say, warn: told the address, or why there is none.
    """

    def __init__(
        self,
        log_dir: str | Path,
        port: int,
        say: Callable[[str], None] = print,
        warn: Callable[[str], None] = print,
    ):
        self.log_dir, self.port = Path(log_dir), port
        self.url = f"http://{HOST}:{port}/"
        self._say, self._warn = say, warn
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> TensorBoardServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server without waiting for it."""
        if _answers(self.port):
            self._warn(f"TensorBoard is not served: port {self.port} is busy; try --port N")
            return
        command = [sys.executable, "-m", "tensorboard.main", f"--logdir={self.log_dir}"]
        command += [f"--host={HOST}", f"--port={self.port}"]
        try:
            # A session of its own: Ctrl-C reaches the training, which then stops the server.
            self._process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            self._warn(f"TensorBoard is not served: {error}")
            return
        self._say(f"TensorBoard is at {self.url} while this run lasts")

    def wait_until_ready(self, timeout: float = START_TIMEOUT) -> bool:
        """Wait until the server answers; False when it ended or did not in time."""
        end = time.monotonic() + timeout
        while self._process is not None and self._process.poll() is None:
            if _answers(self.port):
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return False

    def kill(self) -> None:
        """End the server without waiting for it."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """End the server; harmless when there is none."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is not None:
            self._warn(f"the TensorBoard server ended early (exit code {process.returncode})")
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)
            return
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
        return True
    return False
