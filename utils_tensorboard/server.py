"""A TensorBoard server that runs as long as a training run."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HOST = "127.0.0.1"  # this machine only, because TensorBoard has no passwords
STOP_TIMEOUT = 5  # seconds


class TensorBoardServer:
    """Serves a folder of runs in a process of its own. It never raises: a failure is a warning.

    Args:
        log_dir: folder of the runs.
        port: port to listen on.
        say: called with a line that names the address.
        warn: called with the reason if there is no server.
    """

    def __init__(
        self,
        log_dir: str | Path,
        port: int,
        say: Callable[[str], None] = print,
        warn: Callable[[str], None] = print,
    ):
        self.log_dir, self.port = Path(log_dir), port
        self._say, self._warn = say, warn
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> TensorBoardServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, without waiting until it answers."""
        command = [sys.executable, "-m", "tensorboard.main", f"--logdir={self.log_dir}"]
        command += [f"--host={HOST}", f"--port={self.port}"]
        null = subprocess.DEVNULL
        try:
            socket.create_server((HOST, self.port)).close()  # raises if the port is busy
            # In a session of its own: Ctrl-C goes to the training only, which then stops the server.
            self._process = subprocess.Popen(
                command, stdin=null, stdout=null, stderr=null, start_new_session=True
            )
        except OSError as error:
            self._warn(f"TensorBoard is not served on port {self.port}: {error.strerror}; try --port N")
        else:
            self._say(f"TensorBoard is at http://{HOST}:{self.port}/ while this run lasts")

    def kill(self) -> None:
        """Kill the server, without waiting for its end."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """Stop the server; does nothing if there is none."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is not None:
            self._warn(f"the TensorBoard server ended early (exit code {process.returncode})")
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
