"""What the texts tell a user to type works: every command of their bash blocks is run, or it is said why not.

The commands are taken from the texts themselves. What makes one short is appended to it, so its own flags are
read as they stand there. (The commands of benchmarks/README.md are run by test_benchmarks.py.)
"""

from __future__ import annotations

import contextlib
import http.client
import io
import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import PROJECT, QUIET_TRACKERS, TEXT, TINY, Result, printed_config, runner, stop_at

READMES = ("README.md", "README-TENSORBOARD.md", "README-AIM.md", "README-ARCH.md", "CONTRIBUTING.md")
TEXTS = (*READMES, *(f"docs/{path.name}" for path in sorted(PROJECT.glob("docs/*.md"))))
SCRIPTS = ("train.py", "inference.py", "search.py", "compare.py")

# Commands that a test cannot run, by their first words, and why not.
NOT_RUN = {
    "pip install": "needs the network; its extras are looked up in pyproject.toml",
    "python3 -m venv": ".ci/run makes one and runs all tests in it",
    "source .venv/bin/activate": "changes the shell that it is typed in",
    "uv run": "uv is no part of the project; its extras are looked up, what it runs is run without it",
    "pytest": "it is what runs this; its flags are parsed",
    "ruff": ".ci/run runs it; that it does is looked up",
    "mypy": ".ci/run runs it; that it does is looked up",
    ".ci/lint-imports": ".ci/run runs it; that it does is looked up",
    ".ci/run": "runs all tests; the shell reads it",
    "torchrun": "test_processes.py starts and resumes so; torchrun and train.py parse their flags",
}


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a text in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (PROJECT / name).read_text("utf-8"), re.M | re.S)


def commands() -> dict[str, list[str]]:
    """Every command of the bash blocks -> its words, without its comment."""
    lines = [line for name in TEXTS for block in blocks(name, "bash") for line in block.splitlines()]
    parts = [shlex.split(part) for line in lines for part in line.partition(" #")[0].split("&&")]
    return {shlex.join(words): words for words in parts if words}


def not_run(command: str) -> bool:
    return command.startswith(tuple(NOT_RUN))


COMMANDS = commands()
RUN = [command for command in COMMANDS if not not_run(command)]


def of(*programs: str) -> list[str]:
    """The commands to run that begin so."""
    return [command for command in RUN if command.startswith(programs)]


OURS = {script: of(f"python {script}") for script in SCRIPTS}


def test_every_command_has_a_test_and_every_reason_a_command():
    tested = [*itertools.chain(*OURS.values()), *of("tensorboard ", "aim ")]
    assert sorted(RUN) == sorted(tested)
    assert [reason for reason in NOT_RUN if not any(c.startswith(reason) for c in COMMANDS)] == []
    assert min(map(len, OURS.values())) > 1


# --- a folder with what the texts take for granted ---


def run_ids(monkeypatch: pytest.MonkeyPatch, run_id: str) -> None:
    from utils_alg1.utils_run_manager import RunIDGenerator

    monkeypatch.setattr(RunIDGenerator, "generate", lambda self, tag: run_id)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A checkout's configs/, texts, a finished run, an interrupted one, and weights."""
    from safetensors.torch import load_file, save_file

    import train as script

    folder = tmp_path_factory.mktemp("home")
    text = "ROMEO: " + TEXT
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as monkeypatch:
        shutil.copytree(PROJECT / "configs", "configs")
        Path("my.yaml").write_text("n_layer: [1, 2]\ndropout: {low: 0, high: 0.2, step: 0.1}\n")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert script.main(["--print-config"]) == 0
        Path("mine.yaml").write_text(printed.getvalue())
        Path("data").mkdir()
        Path("poems.txt").write_text("Straße\n" * 20 + text, encoding="utf-8")
        Path("books/poems").mkdir(parents=True)
        names = (
            "data/input.txt input.txt book.txt another.txt books/1.txt books/2.txt books/poems/a.md".split()
        )
        for name in names:
            Path(name).write_text(text, encoding="utf-8")
        Path("opening.txt").write_text("ROMEO:\n")
        Path("another.txt").write_text(text[::-1], encoding="utf-8")
        run_ids(monkeypatch, "2026-01-31_001")
        assert script.main([*TINY, *QUIET_TRACKERS]) == 0
        run_ids(monkeypatch, "2026-01-31_002_search")
        stop_at(3, monkeypatch, lambda: signal.raise_signal(signal.SIGTERM))
        assert script.main([*TINY, *QUIET_TRACKERS]) == 143
        export = "runs/2026-01-31_001/artifacts/export/model.safetensors"
        for name in ("model.safetensors", "old.safetensors"):
            shutil.copy(export, name)
        save_file(load_file(export), "lecture.safetensors")
    return folder


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder to work in."""
    folder = tmp_path / "place"
    shutil.copytree(home, folder)
    monkeypatch.chdir(folder)
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# --- our own scripts ---


@pytest.fixture
def search(capsys, place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """search.py in this process, with trials that take a moment; they read their flags as train.py does."""
    from test_search import FAKE_TRAIN

    import search as script
    from utils_alg1.search import results as results_module
    from utils_alg1.search import trials as trials_module

    (place / "fake_train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(trials_module, "TRAIN_SCRIPT", place / "fake_train.py")
    monkeypatch.setattr(trials_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(results_module, "draw_pictures", lambda *_: None)
    return runner(script.main, capsys)


def short_training(words: list[str]) -> list[object]:
    """What makes a command of train.py short."""
    if "--resume" in words:  # the sizes are the run's
        return [*QUIET_TRACKERS, *(["--max-iters", 8] if "--max-iters" in words else [])]
    if "--serve-tensorboard" in words:
        return [*TINY, "--no-aim", "--port", free_port()]
    return [*TINY, *QUIET_TRACKERS, "--warmup-iters", 0]


@pytest.mark.parametrize("command", OURS["train.py"])
def test_a_command_that_trains(command, place, train, request):
    words = shlex.split(command.partition(" '>' ")[0])
    if any(word.startswith("searches/") for word in words):
        assert request.getfixturevalue("search")("--trials", 1).code == 0
    before = set(os.listdir("runs"))
    result = train(*words[2:], *short_training(words))
    assert (result.code, result.err) == (0, "")
    if "--print-config" in words:
        assert printed_config(result.out)["max_iters"] == (6, "--max-iters")
        assert set(os.listdir("runs")) == before
        return
    last = 8 if words[-2:-1] == ["--max-iters"] and "--resume" in words else 4 if "--finish" in words else 6
    assert f"reached   step {last}: " in result.out
    assert bool(set(os.listdir("runs")) - before) == ("--resume" not in words)


@pytest.mark.parametrize("command", OURS["inference.py"])
def test_a_command_that_samples(command, place, sample, monkeypatch):
    words = COMMANDS[command]
    answers = iter(["fox", ":length 3", EOFError()])

    def answer(_):
        given = next(answers)
        if isinstance(given, str):
            return given
        raise given

    monkeypatch.setattr("builtins.input", answer)
    shorter = [] if {"--score", "--page"} & set(words) else ["--max-new-tokens", 20]
    result = sample(*words[2:], *shorter)
    assert (result.code, "error" in result.err) == (0, False)
    assert len(result.out) > 20


@pytest.mark.parametrize("command", OURS["search.py"])
def test_a_command_that_searches(command, place, search):
    words = COMMANDS[command]
    Path("tiny.json").write_text('{"eval_interval": 2, "eval_iters": 1}')
    result = search(*words[2:], "--trials", 2, "--max-iters", 4, "--config", "tiny.json")
    assert (result.code, result.err) == (0, "")
    (name,) = os.listdir("searches")
    assert len(Path("searches", name, "results.csv").read_text().splitlines()) == 1 + 2
    assert Path("searches", name, "best.yaml").exists()


@pytest.mark.parametrize("command", OURS["compare.py"])
def test_a_command_that_compares(command, place, capsys):
    import compare as script

    words, _, file = command.partition(" '>' ")
    result = runner(script.main, capsys)(*shlex.split(words)[2:])
    assert (result.code, result.err) == (0, "")
    assert "2026-01-31_002_search" in result.out
    assert result.out.startswith("run,") == bool(file)


def in_the_text(pattern: str) -> list[str]:
    """The commands between backticks that match, outside of blocks."""
    found = set()
    for name in TEXTS:
        text = re.sub(r"^```.*?^```$", "", (PROJECT / name).read_text("utf-8"), flags=re.M | re.S)
        found |= {" ".join(command.split()) for command in re.findall(rf"`({pattern}[^`]*)`", text)}
    return sorted(found)


IN_THE_TEXT = in_the_text(rf"python (?:{'|'.join(map(re.escape, SCRIPTS))})")


@pytest.mark.parametrize("command", IN_THE_TEXT)
def test_the_flags_of_a_command_in_the_text_are_known(command, capsys):
    _, script, *words = shlex.split(command)
    module = __import__(script.removesuffix(".py"))
    with contextlib.suppress(SystemExit):  # --help
        module.parse_command_line(words)


def test_the_table_of_parameters_is_whole():
    from parameters import specs

    text = (PROJECT / "docs/parameters.md").read_text("utf-8")
    table = text.partition("| topic | flags |")[2].partition("\n\n")[0]
    others = (
        "--config --resume --finish --init-from --print-config --serve-tensorboard --quiet --verbose".split()
    )
    assert sorted(re.findall(r"--[a-z0-9-]+\w", table)) == sorted(
        [*others, *(spec.flag for spec in specs().values())]
    )


@pytest.mark.parametrize("script", ["train", "inference", "search", "compare"])
def test_every_flag_of_a_script_is_in_the_texts(script, capsys):
    with pytest.raises(SystemExit):
        __import__(script).parse_command_line(["--help"])
    flags = re.findall(r"^ +(--[a-z0-9-]+)", capsys.readouterr().out, flags=re.M)
    text = "".join((PROJECT / name).read_text("utf-8") for name in TEXTS)
    assert flags and [flag for flag in flags if not re.search(rf"{flag}\b(?!-)", text)] == []


def test_the_readme_is_short():
    assert len((PROJECT / "README.md").read_text("utf-8").split()) <= 1500


@pytest.mark.parametrize("name", [*TEXTS, "benchmarks/README.md"])
def test_what_a_text_links_to_exists(name):
    text = (PROJECT / name).read_text("utf-8")
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", text)
    for link in links:
        path, _, anchor = link.partition("#")
        target = (PROJECT / name).parent / path if path else PROJECT / name
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.M)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], link


@pytest.mark.parametrize("code", blocks("README.md", "python"))
def test_the_python_of_the_readme_runs(code, place):
    names: dict = {}
    exec(code, names)
    assert names["model"].config.n_embd == 16 and not names["model"].training


# --- other programs ---


@pytest.mark.parametrize("command", [*of("aim "), *in_the_text("aim ")])
def test_aim_knows_a_command_of_the_text(command):
    commands = pytest.importorskip("aim.cli.cli", reason="Aim is not installed")
    from click.testing import CliRunner

    words = shlex.split(command.replace("<hash>", 24 * "f"))[1:]
    assert CliRunner().invoke(commands.cli_entry_point, [*words, "--help"]).exit_code == 0


@pytest.mark.parametrize("command", in_the_text("tensorboard "))
def test_tensorboard_knows_a_command_of_the_text(command):
    from tensorboard import default, program

    server = program.TensorBoard(default.get_plugins())
    server.configure(["tensorboard", *shlex.split(command)[1:]])  # SystemExit where it does not
    assert server.flags.logdir == "runs"


def program(name: str) -> str:
    """Where a program lies that was installed with this Python."""
    path = shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


@contextlib.contextmanager
def serving(words: list[str]) -> Iterator[subprocess.Popen]:
    """A server in a session of its own, which is ended with all that it started."""
    with subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def ask(port: int, process: subprocess.Popen) -> int:
    """The status of the answer to a browser's first question, once there is a server."""
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(ConnectionError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/")
            return connection.getresponse().status
        time.sleep(0.1)
    process.kill()
    raise AssertionError(process.communicate()[0])


@pytest.mark.parametrize("command", of("tensorboard "))
def test_a_server_answers(command, place):
    words, port = COMMANDS[command], free_port()
    with serving([program(words[0]), *words[1:], "--host=127.0.0.1", f"--port={port}"]) as process:
        assert ask(port, process) == 200


def of_torchrun(command: str) -> list[str]:
    """The words of train.py's command line in one of torchrun, which reads its own."""
    from torch.distributed.run import parse_args

    arguments = parse_args(COMMANDS[command][1:])
    assert arguments.training_script == "train.py"
    return arguments.training_script_args


# --- what is not run ---


def skipped(*programs: str) -> list[str]:
    return [command for command in COMMANDS if not_run(command) and command.startswith(programs)]


@pytest.mark.parametrize("command", skipped("torchrun "))
def test_torchrun_and_train_read_their_flags(command):
    from utils_alg1.console.command_line import parse_command_line

    parse_command_line(of_torchrun(command))


@pytest.mark.parametrize("command", skipped("pip install", "uv run"))
def test_extras_are_those_of_the_project(command):
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    words = COMMANDS[command]
    if words[0] == "pip":
        assert words[:3] == ["pip", "install", "-e"] and words[3][0] == "."
        named = [extra for extra in words[3][1:].strip("[]").split(",") if extra]
        assert words[4:] == []
    else:
        named = [word for flag, word in itertools.pairwise(words) if flag == "--extra"]
        rest = [word for word in words[2:] if word not in ("--extra", *named)]
        assert rest == ["pytest"] or shlex.join(rest) in RUN
    assert set(named) <= set(project["optional-dependencies"])


def test_pytest_knows_its_flags():
    flags = {flag for command in skipped("pytest") for flag in COMMANDS[command][1:]}
    words = [
        sys.executable,
        "-m",
        "pytest",
        *flags,
        "--collect-only",
        "-q",
        "-n",
        "0",
        "tests/test_tokenizer.py",
    ]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "tests/test_tokenizer.py::" in done.stdout


def test_ci_runs_what_a_change_must_pass():
    script = (PROJECT / ".ci/run").read_text("utf-8")
    for command in skipped("ruff", "mypy", ".ci/lint-imports"):
        wanted = command.replace("ruff format", "ruff format --check").removesuffix(
            " ." * (command == "mypy .")
        )
        assert f"\n{wanted}\n" in script, command
    assert skipped(".ci/run") == [".ci/run"]
    assert os.access(PROJECT / ".ci/run", os.X_OK)
    assert subprocess.run(["bash", "-n", PROJECT / ".ci/run"]).returncode == 0
