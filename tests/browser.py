"""Chromium without a window, driven by its DevTools protocol over two pipes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from utils_alg1.base.files import write_all

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (path := shutil.which(name))
    ),
    None,
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine's PATH")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
    " --disable-background-networking --hide-scrollbars --proxy-server=127.0.0.1:9"
).split()
# Puts the ends of two pipes where Chromium expects them, and becomes Chromium.
START = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execv(a[3], a[3:])"
SECONDS = 60.0  # until what a test waits for has happened


class Browser:
    """A page in Chromium.

    Attributes:
        said: the messages on its console, and exceptions.
        requests: the URLs that it has requested, besides its own and those of its own parts, by their ids.
            What its policy forbids is told on the console, and is not among them.
    """

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._buffer, self._number, self._session, self._url = b"", 0, {}, ""
        self.said: list[str] = []
        self.requests: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    @property
    def asked(self) -> list[str]:
        return list(self.requests.values())

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come before it are noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | self._session
        write_all(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer.get("method", ""), answer.get("params", {}))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._answers, 1 << 20)
            assert data, "Chromium has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: str, about: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            url = about["request"]["url"]
            if url != self._url and not url.startswith(("blob:null/", "data:", "about:blank")):
                self.requests[about["requestId"]] = url
        elif event == "Network.loadingFailed" and about.get("blockedReason") == "csp":
            self.requests.pop(about["requestId"], None)
        elif event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.said.append(json.dumps(about))

    def open(self, page: Path | str, width: int = 1000, height: int = 800) -> None:
        """Open a file or address in a window of so many pixels, and forget what was said and asked before."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.said.clear()
        self.requests.clear()
        self._url = page if isinstance(page, str) else page.resolve().as_uri()
        self.call("Page.navigate", url=self._url)
        self.wait(f"location.href.startsWith({json.dumps(self._url)}) && document.readyState === 'complete'")

    def evaluate(self, code: str) -> Any:
        """Return the JSON value of an expression in the page, or of the promise that it is."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression in the page is true."""
        end = time.monotonic() + SECONDS
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)


@contextlib.contextmanager
def start_browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium, and end it at the end of the block."""
    assert CHROMIUM is not None
    command_end, command = os.pipe()
    answer, answer_end = os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (command_end, answer_end)]
    flags = [*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, ends), CHROMIUM, *flags],
        pass_fds=ends,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (command_end, answer_end, *ends):
        os.close(end)
    try:
        yield Browser(command, answer)
    finally:
        process.terminate()
        process.wait(30)
        os.close(command)
        os.close(answer)
