"""What the tests share: a small text, an empty folder to work in, and the scripts as functions."""

from __future__ import annotations

import contextlib
import os
import pickle
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import settings

from utils_alg1.console.signals import STOP_SIGNALS

if TYPE_CHECKING:
    import faults
    from browser import Browser

    from utils_alg1.training.trainer import Trainer

CAMPAIGN = pytest.StashKey["Campaign"]()
PROJECT = Path(__file__).resolve().parent.parent

# Examples are drawn from a fixed seed, so that a failure on one machine is a failure on every machine;
# there is no deadline, because machines are shared and slow at times.
settings.register_profile("alg1", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("alg1")

# A model and a run that take a fraction of a second.
TINY = (
    "--n-embd 16 --n-head 2 --n-layer 1 --block-size 8 --batch-size 2 --max-iters 6 --eval-interval 2"
    " --eval-iters 2 --histogram-interval 3 --threads 1"
).split()
QUIET_TRACKERS = ["--no-aim", "--no-tensorboard"]

TEXT = "".join(
    f"{i}. The quick brown fox jumps over the lazy dog; café, naïve, 日本, 🙂!\n" for i in range(60)
)


class Notes:
    """A list on disk: what the process of a tracker appends is seen in that of the test."""

    def __init__(self, path: Path):
        self.path = path
        path.touch()

    def append(self, item: object) -> None:
        with self.path.open("ab") as file:
            file.write(pickle.dumps(item))

    def read(self) -> list:
        with self.path.open("rb") as file, contextlib.suppress(EOFError):
            items: list = []
            while True:
                items.append(pickle.load(file))
        return items


def lasting_metrics(path: Path) -> bytes:
    """A metrics file without the rows that hold a time, which no two runs share."""
    lines = path.read_bytes().splitlines(keepends=True)
    return b"".join(line for line in lines if b'"tokens_per_second"' not in line)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="try all faults, not a seeded sample of them")


@dataclass
class Campaign:
    """How many faults a test tries, and the table of those that were survived."""

    whole: bool
    table: dict[str, int] = field(default_factory=dict)

    def count(self, fault: str, cases: int) -> None:
        """Note that so many cases of a fault were tried and nothing was lost."""
        self.table[fault] = self.table.get(fault, 0) + cases


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CAMPAIGN] = Campaign(config.getoption("--campaign"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if output := getattr(session.config, "workeroutput", None):  # in a worker of pytest-xdist
        output["campaign"] = session.config.stash[CAMPAIGN].table


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add up the tables of the workers of pytest-xdist."""
    for fault, cases in getattr(node, "workeroutput", {}).get("campaign", {}).items():
        node.config.stash[CAMPAIGN].count(fault, cases)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    table = config.stash[CAMPAIGN].table
    if table:
        terminalreporter.section("faults survived: cases tried, nothing lost")
        for fault, cases in table.items():
            terminalreporter.write_line(f"{cases:6d}  {fault}")


@pytest.fixture(scope="session")
def campaign(request: pytest.FixtureRequest) -> Campaign:
    return request.config.stash[CAMPAIGN]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> faults.Reference:
    """The uninterrupted run of the fault tests."""
    import faults

    # A first run in this process loads everything that its children would else load one by one.
    with contextlib.chdir(faults.new_folder(tmp_path_factory.mktemp("warm"), "up")):
        assert faults.train_here(faults.ARGUMENTS) == 0
    return faults.Reference(faults.new_folder(tmp_path_factory.mktemp("reference"), "run"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small models are slower on several threads, much slower where the cores are busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser, for tests that are marked with `needs_chromium`."""
    from browser import start_browser

    with start_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@dataclass
class Result:
    """How a script ended."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every download fails at once: a proxy that is not there."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def same_signal_handlers() -> Iterator[None]:
    """Put back what a script, which takes itself for a process that is about to end, leaves behind."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder: no configs/, no data/, no runs/."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def text_file(workdir: Path) -> Path:
    """A small text with characters of one to four bytes, in the working folder."""
    path = workdir / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """train.py in this process: `train("--max-iters", "5")`."""
    import train as script

    return runner(script.main, capsys)


@pytest.fixture
def sample(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """inference.py in this process."""
    import inference as script

    return runner(script.main, capsys)


@pytest.fixture
def type_in(monkeypatch):
    """Answers for input(): texts, or exceptions; after the last one comes Ctrl-D."""

    def prepare(*answers):
        remaining = iter([*answers, EOFError])
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))

        def answer(question):
            assert question == "> "
            given = next(remaining)
            if isinstance(given, str):
                return given
            raise given

        monkeypatch.setattr("builtins.input", answer)

    return prepare


@pytest.fixture
def terminal(monkeypatch):
    """Puts a terminal in the place of both streams; what it returns gives all that it was shown."""

    def prepare(term: str = "xterm"):
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("NO_COLOR", "1")
        ours, theirs = pty.openpty()
        stream = open(theirs, "w", encoding="utf-8")  # noqa: SIM115
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)

        def shown() -> str:
            stream.close()
            seen = b""
            with contextlib.suppress(OSError):  # nobody is at the other end any more
                while data := os.read(ours, 65536):
                    seen += data
            os.close(ours)
            return seen.decode().replace("\r\n", "\n")

        return shown

    return prepare


def runner(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """A script's `main` as a function of its arguments, with what it said and its exit code.

    Of a flag that is given twice the last one counts, unless the arguments are to be taken `as_typed`.
    """
    from utils_alg1.console.script import run_script

    def run(*arguments: object, as_typed: bool = False) -> Result:
        words = [*map(str, arguments)] if as_typed else with_changes(arguments)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_script(lambda: main(words))
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return run


def with_changes(arguments: Iterable[object]) -> list[str]:
    """A command line on which a flag may be given again: the last one counts, and so changes TINY."""
    words = [str(argument) for argument in arguments]
    places: dict[str, list[int]] = {}
    for i, word in enumerate(words):
        if word.startswith("--"):
            places.setdefault(word.partition("=")[0], []).append(i)
    dropped: set[int] = set()
    for earlier in (i for of_flag in places.values() for i in of_flag[:-1]):
        has_value = "=" not in words[earlier] and not words[earlier + 1].startswith("--")
        dropped |= {earlier, earlier + has_value}
    return [word for i, word in enumerate(words) if i not in dropped]


def recorded_run(folder: Path, *arguments: str) -> Path:
    """Run train.py in `folder`, and return the run directory, with what was there to be tracked beside it.

    values.npz holds each parameter and gradient that a histogram is drawn of, under "name kind step";
    logged.pkl holds the images, texts and embeddings, under (kind, step).
    """
    import numpy as np

    import train as script
    from parameters import due
    from utils_alg1.run_directory import list_runs
    from utils_alg1.tracking.observer import Observer
    from utils_alg1.tracking.trackers import Trackers

    log, log_step = Trackers.log, Observer.log_step
    values, logged = {}, {}

    def keep_payload(trackers, kind, payload, step):
        if kind in ("images", "texts", "embedding"):
            logged[kind, step] = payload
        log(trackers, kind, payload, step)

    def keep_parameters(observer, loss, step):
        if due(step, observer._config.histogram_interval):
            for name, p in observer._trainer.model.named_parameters():
                values[f"{name} parameter {step}"] = p.detach().numpy().copy()
                values[f"{name} gradient {step}"] = p.grad.numpy().copy()
        log_step(observer, loss, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Trackers, "log", keep_payload)
        patch.setattr(Observer, "log_step", keep_parameters)
        Path("text.txt").write_text(TEXT, encoding="utf-8")
        assert script.main(with_changes([*arguments, "--quiet"])) == 0
        (path,) = list_runs("runs")
        path = path.absolute()
    np.savez(path / "values.npz", **values)
    (path / "logged.pkl").write_bytes(pickle.dumps(logged))
    return path


def at(trainer: Trainer, step: int) -> Trainer:
    """The trainer, as if so many updates had been done."""
    trainer.progress.step = step
    return trainer


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, stop: Callable[[], object]) -> None:
    """Call `stop` in the middle of a step, once."""
    from utils_alg1.training.trainer import Trainer

    optimizer_step = Trainer.optimizer_step
    pending = [step]

    def stopping(self: Trainer) -> None:
        if pending == [self.step]:
            pending.clear()
            stop()
        optimizer_step(self)

    monkeypatch.setattr(Trainer, "optimizer_step", stopping)


def printed_config(out: str) -> dict[str, tuple[Any, str]]:
    """The value and the origin of each parameter in the output of --print-config."""
    values = yaml.safe_load(out)
    origins = dict(re.findall(r"^(\w+): .*?  # (\S.*?)  +", out, re.M))
    assert values.keys() == origins.keys()
    return {name: (value, origins[name]) for name, value in values.items()}


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Callable | str) -> None:
    """Let torch.compile use that backend, which knows nothing of the usual one's options."""
    import torch

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: original(function, backend=backend))


def run_process(script: str, *arguments: object, timeout: float = 120, **options) -> Result:
    """A script as a process of its own: `run_process("train.py", "--help")`."""
    command = [sys.executable, str(PROJECT / script), *with_changes(arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=timeout, **options
    )
    return Result(done.returncode, done.stdout, done.stderr)
