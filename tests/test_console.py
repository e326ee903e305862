"""Console output: the lines of a run with and without a terminal, the progress bar, signals, --verbose."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import pty
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import pytest
from conftest import PROJECT, QUIET_TRACKERS, TEXT, TINY, run_process
from rich.live import Live

import train as script
from parameters import Parameters
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.text import format_duration
from utils_alg1.console import terminal as terminal_module
from utils_alg1.console.messages import print_error
from utils_alg1.console.signals import StopSignals
from utils_alg1.console.terminal import Bar
from utils_alg1.data.corpus import Corpus
from utils_alg1.data.text_files import TextFiles
from utils_alg1.data.texts import Text
from utils_alg1.report import results as results_module
from utils_alg1.report import summary as summary_module
from utils_alg1.run_directory import list_runs
from utils_alg1.training.arithmetic import Arithmetic
from utils_alg1.training.distributed import SINGLE_PROCESS, Distributed
from utils_alg1.training.runtime import Runtime
from utils_alg1.utils_output import LOGGER, MAX_BUFFERED_LINES, Console, ShellCommand

COLOUR = re.compile(r"\x1b\[[0-9;]*\b(3[0-7]|4[0-7]|9[0-7]|38|48)[0-9;]*m")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
RUN_ID = re.compile(r"\d{4}-\d\d-\d\d_\d{3}")


@pytest.fixture(autouse=True)
def terminal_settings(monkeypatch):
    """Set the environment of an ordinary terminal, whatever the tests themselves run in."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "XTERM_VERSION", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("utils_alg1.report.pictures.draw_loss_curve", lambda *_: None)
    monkeypatch.setattr(results_module, "SAMPLE_LENGTH", 4)


@pytest.fixture
def start(train, text_file):
    return lambda *flags: train("--data", "text.txt", *TINY, *QUIET_TRACKERS, *flags)


class Screen:
    """A pseudo-terminal: the program writes to `stream`, and `text()` returns what was written."""

    def __init__(self):
        self._ours, theirs = pty.openpty()
        self.stream = open(theirs, "w", encoding="utf-8")  # noqa: SIM115
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(self._ours, 4096):
                self._seen += data

    def text(self) -> str:
        """Close the terminal and return everything that was written to it."""
        self.stream.close()
        self._reader.join(timeout=30)
        return self._seen.decode().replace("\r\n", "\n")


@pytest.fixture
def open_screen(monkeypatch) -> Callable[[], Screen]:
    """Returns a function that replaces stdout by a screen, for use after pytest has replaced it itself."""

    def make() -> Screen:
        shown = Screen()
        monkeypatch.setattr(sys, "stdout", shown.stream)
        return shown

    return make


def lasting(text: str) -> list[str]:
    """Return the lines of a screen that were not overwritten."""
    text = text.replace("\x1b[J", "\x1b[2K")
    text = re.sub(r"\n(\r|\x1b\[\?25h)*\x1b\[1A\r?\x1b\[2K", "\x1b[2K", text)  # one row up, and clear that
    return [ESCAPE.sub("", line.split("\x1b[2K")[-1]).rstrip() for line in text.rstrip("\n").split("\n")]


def masked(out: str) -> list[str]:
    """Split into lines and mask what differs between runs: losses, speeds, times and the date."""
    out = RUN_ID.sub("RUN", out)
    out = re.sub(r"\d\.\d{4}", "LOSS", out)
    out = re.sub(r"perplexity [\d.]+, [\d.]+ bits", "perplexity P, B bits", out)
    out = re.sub(r"  [\d,]+ tok/s", "  SPEED tok/s", out)
    out = out.replace("  best  ", " " * 8)
    return re.sub(r"in (\d:\d\d|[\d.]+ s)$", "in TIME", out, flags=re.M).splitlines()


# --- without a terminal -------------------------------------------------------------------------------


def test_without_a_terminal_a_run_prints_these_lines_and_no_others(start):
    result = start("--learning-rate", 2e-3, "--eval-interval", 3)
    best = max(int(n) for n in re.findall(r"step +(\d+) .*  best  ", result.out))
    before, _, after = result.out.partition("a sample:\n")
    *lines, _ = masked(before + "a sample:\n\nsample " + after.rpartition("\nsample ")[2])
    assert result.err == ""
    assert lines == [
        "run      RUN",
        "device   cpu, float32, 1 thread",
        "model    4,976 parameters: n_embd 16, n_head 2, n_layer 1, block_size 8",
        "text     text.txt: 4,130 characters, vocabulary of 48",
        "steps    6 of 2 x 8 characters",
        "folder   runs/RUN: meta/, logs/, artifacts/, eval/",
        "changed  n_embd=16, n_head=2, n_layer=1, block_size=8, batch_size=2, max_iters=6,"
        " learning_rate=0.002, eval_interval=3, eval_iters=2, threads=1, aim=False, data_path=text.txt,"
        " tensorboard=False, histogram_interval=3",
        "",
        "step      0  train loss LOSS  val loss LOSS        lr 2.0e-03",
        "step      3  train loss LOSS  val loss LOSS        lr 2.0e-03  SPEED tok/s",
        "step      6  train loss LOSS  val loss LOSS        lr 2.0e-03  SPEED tok/s",
        "",
        "reached   step 6: train loss LOSS, val loss LOSS, in TIME",
        f"best      step {best}: val loss LOSS",
        f"exported  runs/RUN/artifacts/export/model.safetensors (best weights, of step {best})",
        "measured  val loss LOSS (perplexity P, B bits per character) of the export,"
        " over all of the val part: 412 characters",
        "report    runs/RUN/eval/report.html",
        "",
        "a sample:",
        "",
        "sample    python inference.py --run runs/RUN",
        "continue  python train.py --resume runs/RUN --max-iters 12",
    ]


def test_the_first_lines_of_a_run_that_goes_on_in_two_processes_with_aim_and_a_copy():
    params = Parameters.from_values({"max_iters": 8, "output": "mine.safetensors", "aim": True}, {})
    params.origins |= {"max_iters": "--max-iters", "output": "resumed run"}
    text = Text(TextFiles.of("text.txt"), "", list(TEXT), [], 4130, n_crlf=0, n_cr=0)
    corpus = Corpus(text)
    runtime = Runtime(arithmetic=Arithmetic(compiled=True), dist=Distributed(world_size=2))
    model = SimpleNamespace(config=SimpleNamespace(n_parameters=4976))
    trainer: Any = SimpleNamespace(
        model=model, runtime=runtime, step=6, tokens_per_step=4 * 32, ends_here=False
    )
    lines = summary_module.describe_start(RUN, params, corpus, trainer)
    assert lines["device"] == "cpu, float32, 1 thread, compiled, in each of 2 processes"
    assert lines["steps"] == "6 to 8, of 4 x 32 characters"
    assert lines["folder"].endswith("eval/; the export also to mine.safetensors; Aim's copy in .aim")
    assert lines["changed"] == "max_iters=8; output=mine.safetensors (as before)"
    trainer.step = 8
    finished = summary_module.describe_steps(params, trainer)
    assert finished == "all 8 are taken; the results are written again"


def test_changed_values_stand_with_where_they_came_from():
    values = {"n_embd": 128, "seed": 5, "dropout": 0.0, "max_iters": 7}
    origins = {
        "n_embd": "a/model.json",
        "seed": "--seed",
        "dropout": "a/model.json",
        "max_iters": "a/train.yaml",
    }
    params = Parameters.from_values(values, origins)
    assert params.changed() == {"n_embd": 128, "max_iters": 7, "seed": 5}
    shown = "seed=5; n_embd=128 (a/model.json); max_iters=7 (a/train.yaml)"
    assert summary_module.describe_changes(params) == shown
    assert summary_module.describe_changes(Parameters.from_values({}, {})) == ""


@pytest.mark.parametrize(
    "flags, way_on",
    [
        ([], "--resume runs/RUN --max-iters 12"),
        (
            ["--lr-schedule", "cosine"],
            "--config runs/RUN/meta/full_config.json --init-from runs/RUN/artifacts/export/model.safetensors"
            " --max-iters=6",
        ),
        (["--patience", 1, "--learning-rate", 9, "--eval-interval", 1], "--resume runs/RUN --patience 0"),
    ],
    ids=["constant", "cosine", "patience"],
)
def test_the_command_that_trains_on_does_so(flags, way_on, start, train):
    lines = start(*flags).out.splitlines()
    command = next(line for line in lines if line.startswith("continue")).removeprefix("continue  ")
    assert RUN_ID.sub("RUN", command) == f"python train.py {way_on}"
    anew = "longer    only as a new run from the exported weights (optimizer, schedule and steps start again)"
    assert (f"{anew}:" in lines) == ("cosine" in flags)
    result = train(*shlex.split(command)[2:])
    assert result.code == 0, result.err
    schedule = "cosine" if "cosine" in flags else "constant"
    record = json.loads((list_runs("runs")[-1] / "meta/full_config.json").read_text())["parameters"]
    assert (record["lr_schedule"], record["data_path"]) == (schedule, "text.txt")


def test_rich_is_not_imported_without_a_terminal(workdir):
    code = (
        "import contextlib, sys, train\n"
        "train.main(['--print-config'])\n"
        "with contextlib.suppress(SystemExit): train.main(['--help'])\n"
        "with train.Console() as console:\n"
        "    console.block({'label': 'text'})\n"
        "    console.begin_progress(0, 10, 1)\n"
        "    console.progress(1, 2.0)\n"
        "sys.exit('rich' in sys.modules or 'torch' in sys.modules)"
    )
    Path("code.py").write_text(code)
    path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    assert run_process(workdir / "code.py", env=os.environ | {"PYTHONPATH": path}).code == 0


# --- logging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verbose", [False, True])
def test_a_record_of_any_module_is_a_line_of_verbose_and_of_the_log(verbose, workdir, capsys, caplog):
    Console()  # an earlier one speaks no more
    console = Console(verbose=verbose)
    console.log_to(Path("train.log"))
    logging.getLogger("alg1").debug("%d%% inside", 5)
    console.close()
    assert capsys.readouterr() == ("5% inside\n" * verbose, "")
    assert Path("train.log").read_text()[20:] == "5% inside\n"
    assert caplog.records == [] and LOGGER.handlers == []


def test_lines_wait_for_the_log_but_not_without_end(workdir, capsys):
    console = Console(quiet=True)
    for _ in range(MAX_BUFFERED_LINES):
        console.say("too early")
    console.say("said")
    assert sum(len(getattr(handler, "buffer", ())) for handler in LOGGER.handlers) == 1
    console.log_to(Path("train.log"))
    console.close()
    assert Path("train.log").read_text()[20:] == "said\n"


def test_quiet_leaves_the_warnings_and_what_to_do_next(workdir, capsys):
    console = Console(quiet=True)
    console.say("said")
    console.warn("careful")
    console.remind("stopped; continue with", "python train.py")
    console.close()
    assert capsys.readouterr() == ("", "warning: careful\nstopped; continue with: python train.py\n")


@pytest.mark.parametrize(
    "error, logged",
    [
        (ValueError("no such thing"), "ValueError: no such thing"),
        (Alg1Error("a is wrong"), "Alg1Error: a is wrong"),
        (SystemExit(3), None),
        (KeyboardInterrupt(), None),
    ],
    ids=repr,
)
def test_an_exception_that_leaves_the_console_is_in_the_log_and_nowhere_else(error, logged, workdir, capsys):
    with pytest.raises(type(error)), Console(verbose=True) as console:
        console.log_to(Path("train.log"))
        console.say("said")
        raise error
    assert capsys.readouterr() == ("said\n", "") and LOGGER.handlers == []
    first, *traceback = Path("train.log").read_text().splitlines()
    assert first[20:] == "said"
    if logged is None:
        assert traceback == []
    else:
        assert traceback[1] == "Traceback (most recent call last):" and traceback[-1].endswith(logged)


def test_a_full_disk_costs_only_the_line_of_the_log(workdir, capsys):
    console = Console()
    console.log_to(Path("/dev/full"))
    console.say("said")
    console.close()
    assert capsys.readouterr() == ("said\n", "")


# --- at a terminal ------------------------------------------------------------------------------------


def test_at_a_terminal_the_lines_stay_and_a_bar_moves_below_them(start, open_screen):
    screen = open_screen()
    assert start("--eval-interval", 3).code == 0
    text = screen.text()
    assert "step 1/6" in ESCAPE.sub("", text) and "━" in text and COLOUR.search(text)
    lines = masked("\n".join(lasting(text)))
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split("  lr")[0].rstrip() for line in steps] == [
        f"step      {n}  train loss LOSS  val loss LOSS" for n in (0, 3, 6)
    ]
    assert not any("━" in line for line in lines)
    assert all(len(line) <= 80 for line in lasting(text))
    hidden, shown = text.rfind("\x1b[?25l"), text.rfind("\x1b[?25h")
    assert -1 < hidden < shown  # the cursor is there at the end, and was while it trained
    assert text.index("\x1b[?25h") < text.index("train loss")


def test_a_narrow_terminal_breaks_no_command(open_screen, monkeypatch):
    screen = open_screen()
    monkeypatch.setenv("COLUMNS", "40")
    command = "tensorboard --logdir=runs --port=6006"
    console = Console()
    console.block(
        {"model": "one two three four five six seven eight", "curves": ShellCommand(command, "then look")}
    )
    console.evaluation(300, 2.5, 2.6, 1e-3, True, 1234.0)
    console.remind("stopped at step 300; continue with", "python train.py --resume x")
    console.close()
    assert ESCAPE.sub("", screen.text()).splitlines() == [
        "model   one two three four five six",
        "  seven eight",
        f"curves  {command}   then look",
        "",
        "step 300 train 2.5000 val 2.6000 best",
        "stopped at step 300; continue with: python train.py --resume x",
    ]


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_keeps_the_bar_and_drops_the_colours(no_color, open_screen, monkeypatch):
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    screen = open_screen()
    console = Console()
    console.begin_progress(0, 10, 1)
    console.progress(4, 2.0)
    console.evaluation(4, 2.5, 2.6, 1e-3, True, 1234.0)
    console.close()
    text = screen.text()
    assert bool(COLOUR.search(text)) is not no_color
    assert "step  4/10 ━━━━━━━" in ESCAPE.sub("", text) and "val loss 2.6000  best  lr" in ESCAPE.sub(
        "", text
    )


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_knows_only_lines_gets_only_lines(open_screen, monkeypatch, term):
    screen = open_screen()
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "40")
    console = Console()
    console.block({"label": "a text that is longer than the terminal is wide"})
    console.begin_progress(0, 10, 1)
    console.progress(1, 2.0)
    console.close()
    assert screen.text() == "label  a text that is longer than the terminal is wide\n\n"


def test_quiet_shows_nothing_at_a_terminal(open_screen):
    screen = open_screen()
    console = Console(quiet=True)
    console.begin_progress(0, 10, 1)
    console.progress(1, 2.0)
    console.say("said")
    console.close()
    assert screen.text() == ""


def test_warnings_go_to_a_file_behind_stderr_while_the_bar_is_shown(open_screen, monkeypatch):
    screen = open_screen()
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    console = Console()
    console.begin_progress(0, 10, 1)
    console.progress(1, 2.0)
    console.warn("careful")
    print("from elsewhere", file=sys.stderr)
    console.close()
    assert errors.getvalue() == "warning: careful\nfrom elsewhere\n"
    assert "careful" not in screen.text()


def test_lines_of_others_stand_above_the_bar(open_screen):
    screen = open_screen()
    console = Console()
    console.begin_progress(0, 10, 1)
    console.progress(1, 2.0)
    print("from elsewhere")
    console.close()
    assert "from elsewhere" in lasting(screen.text())


@pytest.mark.parametrize("colour", [True, False])
def test_an_error_is_coloured_at_a_terminal_only(colour, monkeypatch, capsys):
    shown = Screen()
    monkeypatch.setattr(sys, "stderr", shown.stream if colour else sys.stderr)
    print_error(Alg1Error("a [red]is[/] wrong", "mend a"))
    text = shown.text() + capsys.readouterr().err
    assert ESCAPE.sub("", text) == "error: a [red]is[/] wrong\nhint: mend a\n"
    assert bool(COLOUR.search(text)) is colour


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_no_terminal_obeys_a_text_or_the_name_of_a_file(term, open_screen, monkeypatch, workdir):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("NO_COLOR", "1")
    screen = open_screen()
    console = Console()
    console.log_to(Path("train.log"))
    lines = {
        "text": "evil\x1b[2J.txt: 5 characters",
        "sample": ShellCommand("python inference.py --run \x9b"),
    }
    console.block(lines)
    console.begin_progress(0, 10, 1)
    console.warn("above the bar\x1b[2J")
    sample = "one\r\ntwo\rthree\t\x07\x1b]0;title\x07"
    console.summary({"reached": "step 1"}, sample, {"next": "1"})
    console.close()
    shown = lasting(screen.text())
    assert shown[:2] == ["text    evil␛[2J.txt: 5 characters", "sample  python inference.py --run \ufffd"]
    assert (shown[-4], shown[-1]) == ("one", "next  1")
    assert shown[-3].expandtabs() == "two␍three       ␇␛]0;title␇"
    assert sample in Path("train.log").read_bytes().decode()


def test_an_error_shows_control_characters_at_a_terminal_only(monkeypatch, capsys):
    error = Alg1Error("evil\x1b[2J: no such file", "mend \x07")
    print_error(error)
    assert capsys.readouterr().err == "error: evil\x1b[2J: no such file\nhint: mend \x07\n"
    for term in ("xterm", "dumb"):
        monkeypatch.setenv("TERM", term)
        shown = Screen()
        monkeypatch.setattr(sys, "stderr", shown.stream)
        print_error(error)
        assert ESCAPE.sub("", shown.text()) == "error: evil␛[2J: no such file\nhint: mend ␇\n"


def test_the_values_of_print_config_are_visible_at_a_terminal(train, open_screen, workdir):
    flags = ["--data", "evil\x1b[2J.txt", "--print-config"]
    assert '\ndata_path: "evil\\e[2J.txt"  ' in train(*flags).out  # as YAML escapes it
    screen = open_screen()
    script.main(flags)
    text = screen.text()
    assert "evil\\e[2J.txt" in text and "\x1b" not in text


def test_a_notice_shows_control_characters_at_a_terminal(monkeypatch):
    written = []
    monkeypatch.setattr(os, "isatty", lambda descriptor: descriptor == 2)
    monkeypatch.setattr(os, "write", lambda descriptor, data: written.append((descriptor, data)))
    Console().interrupted("continue: --resume a\x1bb")
    assert written == [(2, "\ncontinue: --resume a␛b\n".encode())]


def test_a_terminal_that_goes_away_does_not_stop_the_training(open_screen, monkeypatch, capsys):
    open_screen()

    def gone(_):
        raise OSError(errno.EIO, "Input/output error")

    before = sys.stdout
    console = Console()
    console.begin_progress(0, 10, 1)
    monkeypatch.setattr(Live, "refresh", gone)
    console.progress(1, 2.0)
    console.progress(2, 2.0)
    console.say("said")
    console.warn("careful")
    console.close()
    assert sys.stdout is before and capsys.readouterr().err == "warning: careful\n"


# --- the bar ------------------------------------------------------------------------------------------


@pytest.fixture
def fake_clock(monkeypatch):
    """A clock whose time only changes when a test sets it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(terminal_module, "running_time", lambda: clock.now)
    return clock


@pytest.fixture
def new_bar(fake_clock, open_screen) -> Iterator[Callable[..., tuple[Bar, Screen]]]:
    """Creates a progress bar on a screen of its own."""
    bars = []

    def make(*arguments: int) -> tuple[Bar, Screen]:
        screen = open_screen()
        bars.append(Bar(screen.stream, *arguments))
        return bars[-1], screen

    yield make
    for bar in bars:
        with contextlib.suppress(ValueError, OSError):  # the screen was closed
            bar.stop()


def drawn(screen: Screen) -> list[str]:
    """Return each bar that was drawn on a screen."""
    return [part for part in ESCAPE.sub("", screen.text()).split("\r") if part.startswith("step")]


def test_the_bar_is_redrawn_a_few_times_a_second_and_at_the_end(new_bar, fake_clock):
    bar, screen = new_bar(0, 1000, 32)
    for step in range(1, 1001):
        fake_clock.now += 0.001
        if step % 100 == 50:
            bar.evaluated(step, 2.0)  # an evaluation makes no step dearer
        bar.update(step, 2.0)
    bars = drawn(screen)
    assert 5 <= len(bars) <= 7 and bars[-1].startswith("step 1000/1000")


def test_the_bar_shows_the_speed_of_the_training_and_the_time_that_all_takes(new_bar, fake_clock):
    bar, screen = new_bar(0, 1000, 32)
    for step in range(1, 101):
        fake_clock.now += 0.01
        bar.update(step, 2.0)
    bar.evaluated(100, 2.5)
    fake_clock.now += 9.0  # an evaluation, a checkpoint
    for step in range(101, 202):
        fake_clock.now += 0.01
        bar.update(step, 2.1234)
    speed, left = re.search(r"([\d,]+) tok/s  (\d+) s left", drawn(screen)[-1]).groups()
    assert speed == "3,200"
    assert int(left) == pytest.approx(10.8 / 180 * 820, abs=2)


@pytest.mark.parametrize(
    "width, shown",
    [
        (140, "step  250/1000 ━ loss 2.1234  val 2.2345  2,283 tok/s  8 s left"),
        (80, "step  250/1000 ━ loss 2.1234  val 2.2345  2,283 tok/s  8 s left"),
        (79, "step  250/1000 ━ loss 2.1234  val 2.2345  8 s left"),
        (60, "step  250/1000 ━ loss 2.1234  val 2.2345  8 s left"),
        (40, "step  250/1000 ━ loss 2.1234  8 s left"),
        (30, "step  250/1000 ━ loss 2.1234"),
        (20, None),
    ],
)
def test_the_bar_leaves_out_what_does_not_fit(width, shown, new_bar, fake_clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    bar, screen = new_bar(0, 1000, 32)
    bar.evaluated(0, 2.2345)
    for step in range(1, 251):
        fake_clock.now += 0.01
        if step == 250:
            fake_clock.now += 1
        bar.update(step, 2.1234)
    bars = drawn(screen)
    assert all(len(line) <= width for line in bars)
    if shown:
        assert re.sub("[━╸╺]+", "━", bars[-1]) == shown


def test_what_a_narrower_window_wraps_lies_behind_the_cursor_and_is_cleared(new_bar):
    bar, screen = new_bar(0, 1000, 32)
    bar.update(1, 2.0)
    bar.print("a line", "")
    bar.erase()
    text = screen.text()
    parts = re.split(r"step[^\r]*", text)  # what is written between the bars
    assert len(parts) == 4
    # The cursor goes back to the start of the bar; all behind it is cleared before a line or a bar.
    assert [part[:5] for part in parts[1:]] == ["\r\x1b[J\r", "\r\r\x1b[J", "\r\r\x1b[J"]


@pytest.mark.parametrize(
    "seconds, words",
    [
        (0, "0 s"),
        (0.42, "0.4 s"),
        (9, "9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (90061, "1 d 1:01:01"),
    ],
)
def test_a_duration(seconds, words):
    assert format_duration(seconds) == words


# --- lines of a terminal ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns, line",
    [
        (80, "step    300  train loss 2.5000  val loss 2.6000  best  lr 1.0e-03  1,234 tok/s"),
        (70, "step 300 train 2.5000 val 2.6000 best lr 1.0e-03 1,234 tok/s"),
        (50, "step 300 train 2.5000 val 2.6000 best lr 1.0e-03"),
        (40, "step 300 train 2.5000 val 2.6000 best"),
        (36, "step 300 train 2.5000 val 2.6000"),
        (5, "step 300"),
    ],
)
def test_the_line_of_an_evaluation_fits_and_shows_no_part_of_a_number(
    columns, line, open_screen, monkeypatch
):
    screen = open_screen()
    monkeypatch.setenv("COLUMNS", str(columns))
    console = Console()
    console.evaluation(300, 2.5, 2.6, 1e-3, True, 1234.0)
    console.close()
    assert ESCAPE.sub("", screen.text()) == line + "\n"


# --- signals ------------------------------------------------------------------------------------------


class Exited(BaseException):
    """Raised in place of os._exit."""


def test_signals_erase_the_bar_and_say_how_to_go_on(open_screen, monkeypatch, capfd):
    screen = open_screen()

    def leave(code):
        raise Exited(code)

    monkeypatch.setattr(os, "_exit", leave)
    console = Console()
    console.begin_progress(0, 10, 1)
    console.progress(1, 2.0)

    def before_exit() -> None:
        console.interrupted("left at once; continue")

    with StopSignals(lambda: "stopping after this step", console.interrupted, before_exit) as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(Exited) as exited:
            signal.raise_signal(signal.SIGTERM)
    assert exited.value.args == (143,)
    console.close()
    notices = capfd.readouterr().err
    assert notices == "stopping after this step; a second signal exits at once\nleft at once; continue\n"
    assert screen.text().count("\r\x1b[J") >= 2


def test_a_signal_without_a_stderr_is_heard_all_the_same(monkeypatch):
    def refuse(_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    with StopSignals(lambda: "stopping", announce=refuse) as signals:
        signal.raise_signal(signal.SIGINT)
    assert signals.received == signal.SIGINT


RUN: Any = SimpleNamespace(path=Path("runs/x"), meta_dir=Path("no/meta"), run_id="x")


@pytest.mark.parametrize(
    "step, notice",
    [
        (None, "left at once: nothing had been saved"),
        (4, "left at once; continue from step 4 with: python train.py --resume runs/x"),
    ],
)
def test_the_notice_of_leaving_at_once_names_the_newest_checkpoint(step, notice):
    assert summary_module.resume_notice(step, RUN, SINGLE_PROCESS) == notice


@pytest.mark.parametrize(
    "hint, exit_code, checkpoint, expected",
    [
        ("free some space", 4, None, "free some space"),
        ("free some space", 4, "step_9", "free some space; then continue: python train.py --resume runs/x"),
        (None, 4, "step_9", "then continue: python train.py --resume runs/x"),
        ("lower it", 3, "step_0", "lower it; its newest weights, for --init-from: step_0"),
        (
            "lower it",
            3,
            "step_9",
            "lower it; its newest weights, for --init-from: step_9; to export its best:"
            " python train.py --resume runs/x --finish",
        ),
    ],
)
def test_an_error_tells_what_to_do_with_the_newest_checkpoint(hint, exit_code, checkpoint, expected):
    error = Alg1Error("full", hint, exit_code)
    found = summary_module.add_resume_hint(error, checkpoint and Path(checkpoint), RUN, SINGLE_PROCESS)
    assert (found.message, found.hint, found.exit_code) == ("full", expected, exit_code)


def test_ctrl_c_at_a_terminal_leaves_nothing_of_the_bar(text_file):
    """In a child process that is alone in a pseudo-terminal of 80 columns."""
    flags = [
        "--data",
        "text.txt",
        *TINY,
        *QUIET_TRACKERS,
        "--max-iters",
        "1000000",
        "--eval-interval",
        "100000",
    ]
    pid, terminal = pty.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
            os._exit(faults.train_here(flags))
        os._exit(99)
    patience = threading.Timer(300, os.kill, (pid, signal.SIGKILL))
    patience.start()
    seen = bytearray()
    stopped = False
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:
            break
        if not data:
            break
        seen += data
        if not stopped and re.search(rb"\d left", seen.replace(b" s left", b" left")):
            os.write(terminal, b"\x03")
            stopped = True
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    patience.cancel()
    os.close(terminal)
    lines = lasting(seen.decode().replace("\r\n", "\n"))
    assert code == 130, lines
    command = r"python \S*train.py --resume runs/\S+"
    assert lines[-3] == "stopping after this step; press Ctrl-C again to exit at once"
    assert re.fullmatch(rf"stopped at step \d+; continue with: {command}", lines[-2])
    assert re.fullmatch(rf"or end it here, with its export and report: {command} --finish", lines[-1])
    assert lines[-4].startswith("step      0  train loss")
