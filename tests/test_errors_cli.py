"""What users get wrong: one error line, a hint, an exit code, and a working folder left as it was."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, QUIET_TRACKERS, TINY, run_process

from errors import Alg1Error, Guard, disk_error
from utils_alg1.utils_output import Console, loss_in_words, run_script
from utils_alg1.utils_run_manager import LOCK_NAME, RunDirectoryCreator, RunIDGenerator, create_run, lock_run

SHOWS = "python train.py --help explains every value"
LISTS = "python train.py --help lists every flag"
LISTS_SAMPLING = "python inference.py --help lists every flag"
CHECK_DATA = "check the path of --data; --data python-docs is there without a file or a network"
HAS_WEIGHTS = "train one: python train.py, or name a --model"

# (command line, error, hint); text.txt is a text, folder/ is empty, notes.txt is no configuration or model.
TRAIN_MISTAKES = [
    # values
    ("--max-iters five", "max_iters = 'five' must be a whole number (from --max-iters)", SHOWS),
    ("--max-iters 1.5", "max_iters = '1.5' must be a whole number (from --max-iters)", SHOWS),
    ("--max-iters=", "max_iters = '' must be a whole number (from --max-iters)", SHOWS),
    ("--max-iters 0", "max_iters = 0 must be above 0 (max_iters from --max-iters)", SHOWS),
    ("--batch-size -5", "batch_size = -5 must be above 0 (batch_size from --batch-size)", SHOWS),
    ("--learning-rate nan", "learning_rate = 'nan' must be finite (from --learning-rate)", SHOWS),
    ("--learning-rate 0", "learning_rate = 0.0 must be above 0 (learning_rate from --learning-rate)", SHOWS),
    ("--dropout 1", "dropout = 1.0 must be below 1 (dropout from --dropout)", SHOWS),
    ("--device ''", "device = '' must not be empty (device from --device)", SHOWS),
    (
        "--optimizer adam",
        "optimizer = 'adam' must be one of adamw, sgd, muon (optimizer from --optimizer)",
        SHOWS,
    ),
    (
        "--n-embd 30",
        "n_embd = 30 must be divisible by n_head = 4 (n_embd = 32 is) (n_embd from --n-embd)",
        SHOWS,
    ),
    ("--n-embd 30 --n-head 0", "n_head = 0 must be above 0 (n_head from --n-head)", SHOWS),
    (
        "--warmup-iters 7 --max-iters 6",
        "warmup_iters = 7 is longer than the run, max_iters = 6"
        " (warmup_iters from --warmup-iters, max_iters from --max-iters)",
        SHOWS,
    ),
    (
        "--patience 2 --max-iters 5",
        "patience = 2 needs evaluations on the way, but eval_interval = 100 is longer than max_iters = 5"
        " (patience from --patience, max_iters from --max-iters)",
        SHOWS,
    ),
    (
        "--grad-accum-steps 0",
        "grad_accum_steps = 0 must be above 0 (grad_accum_steps from --grad-accum-steps)",
        SHOWS,
    ),
    (
        "--serve-tensorboard --no-tensorboard",
        "--serve-tensorboard has nothing to show: tensorboard is off (--tensorboard)",
        SHOWS,
    ),
    ("--min-lr 1", "min_lr = 1 is above learning_rate = 0.001 (min_lr from --min-lr)", SHOWS),
    # flags
    ("--max-iter 5", "unknown flag --max-iter; did you mean --max-iters?", SHOWS),
    ("--batch_size=5", "unknown flag --batch_size; did you mean --batch-size?", SHOWS),
    ("--no-data", "unknown flag --no-data; did you mean --data?", SHOWS),
    ("--qqqqqqq 5", "unknown flag --qqqqqqq", SHOWS),
    ("stray words", "'stray' belongs to no flag", SHOWS),
    ("--max-iters", "argument --max-iters: expected one argument", LISTS),
    ("--run-tag --aim", "argument --run-tag: expected one argument", LISTS),
    ("--resume latest --init-from x", "argument --init-from: not allowed with argument --resume", LISTS),
    ("--quiet --verbose", "argument --verbose: not allowed with argument --quiet", LISTS),
    # files
    (
        "--config nowhere",
        "--config nowhere: no such file or folder",
        "name a JSON file or a folder like configs/",
    ),
    ("--config notes.txt", "notes.txt: line 1, column 1: not JSON: Expecting value", None),
    ("--resume latest", "there is no run in runs", "start one: python train.py"),
    (
        "--resume 2026-01-01_001 --runs-dir folder",
        "2026-01-01_001: no such run in folder, and no run directory",
        "start one: python train.py",
    ),
    (
        "--resume folder",
        "folder: no such run in runs, and no run directory",
        "start one: python train.py",
    ),
    ("--init-from nowhere.safetensors", "nowhere.safetensors: no such file", None),
    ("--init-from folder", "folder: cannot be read: Is a directory", None),
    ("--data nowhere.txt", "nowhere.txt: no such text file", CHECK_DATA),
    ("--data folder", "folder is a folder", "name a text file in it: --data PATH"),
    (
        "--output nowhere/m.safetensors",
        "--output nowhere/m.safetensors: there is no folder nowhere",
        "create it",
    ),
    ("--output folder", "--output folder: this is a folder", "name a file in it"),
    # machine
    ("--device nonsense", "--device nonsense: not one of auto, cpu, cuda, cuda:N, mps", None),
    ("--device meta", "--device meta: not one of auto, cpu, cuda, cuda:N, mps", None),
    (
        "--device cuda:77",
        "--device cuda:77: this machine has no such device",
        "use --device auto or --device cpu",
    ),
    (
        "--device cpu --dtype float16",
        "--dtype float16 needs CUDA, and the device is cpu",
        "use --dtype float32 or --dtype bfloat16",
    ),
]

SAMPLING_MISTAKES = [
    ("", "no run in runs has any weights yet", HAS_WEIGHTS),
    ("--runs-dir notes.txt", "no run in notes.txt has any weights yet", HAS_WEIGHTS),
    (
        "--run 2026-01-01_001",
        "2026-01-01_001: no such run in runs, and no run directory",
        "start one: python train.py",
    ),
    ("--run folder", "folder: no such run in runs, and no run directory", "start one: python train.py"),
    ("--run latest", "there is no run in runs", "start one: python train.py"),
    ("--model nowhere", "nowhere: no such file", None),
    ("--model folder", "folder: cannot be read: Is a directory", None),
    ("--run x --model y", "argument --model: not allowed with argument --run", LISTS_SAMPLING),
    ("--modl x", "unknown flag --modl; did you mean --model?", LISTS_SAMPLING),
    ("ROMEO", "'ROMEO' belongs to no flag", LISTS_SAMPLING),
    ("--prompt", "argument --prompt: expected one argument", LISTS_SAMPLING),
    ("--top-k some", "argument --top-k: invalid int value: 'some'", LISTS_SAMPLING),
    ("--max-new-tokens -1", "--max-new-tokens -1: must be at least 0", LISTS_SAMPLING),
    ("--num-samples 0", "--num-samples 0: must be at least 1", LISTS_SAMPLING),
    ("--temperature -0.5", "--temperature -0.5: must be 0 or above", LISTS_SAMPLING),
    ("--temperature nan", "--temperature nan: must be 0 or above", LISTS_SAMPLING),
    ("--temperature inf", "--temperature inf: must be 0 or above", LISTS_SAMPLING),
    ("--top-k 0", "--top-k 0: must be at least 1", LISTS_SAMPLING),
    ("--top-p 0", "--top-p 0.0: must be above 0, at most 1", LISTS_SAMPLING),
    ("--top-p 1.5", "--top-p 1.5: must be above 0, at most 1", LISTS_SAMPLING),
    ("--seed -1", "--seed -1: must be at least 0 and below 2**63", LISTS_SAMPLING),
    (
        "--top-k 0 --num-samples 0 --modl x",
        "3 problems:\n  - unknown flag --modl; did you mean --model?"
        "\n  - --num-samples 0: must be at least 1\n  - --top-k 0: must be at least 1",
        LISTS_SAMPLING,
    ),
    ("--device nonsense", "--device nonsense: not one of auto, cpu, cuda, cuda:N, mps", None),
    (
        "--device cuda:77",
        "--device cuda:77: this machine has no such device",
        "use --device auto or --device cpu",
    ),
]

TOO_LONG = "x" * 300


def snapshot(folder: Path, *ignored: str) -> dict[str, bytes | None]:
    """Every path below a folder: a file's bytes, None for a folder."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {
        name: path.read_bytes() if path.is_file() else None
        for name, path in paths.items()
        if not name.startswith(ignored)
    }


@pytest.fixture
def place(text_file: Path) -> Path:
    """A working folder with a text, an empty folder and a file that is of no use."""
    folder = text_file.parent
    (folder / "folder").mkdir()
    (folder / "notes.txt").write_text("remember the milk\n", encoding="utf-8")
    return folder


def report(error: str, hint: str | None) -> str:
    return f"error: {error}\n" + (f"hint: {hint}\n" if hint else "")


# --- mistakes ---


@pytest.mark.parametrize(
    ("command", "error", "hint"), TRAIN_MISTAKES, ids=[mistake[0] for mistake in TRAIN_MISTAKES]
)
def test_a_mistake_in_training_is_reported_and_changes_nothing(place, train, command, error, hint):
    before = snapshot(place)
    data = [] if "--data" in command else ["--data", "text.txt"]
    result = train(*data, *shlex.split(command))
    assert result.err == report(error, hint)
    assert (result.code, result.out) == (2, "")
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("command", "error", "hint"), SAMPLING_MISTAKES, ids=[mistake[0] for mistake in SAMPLING_MISTAKES]
)
def test_a_mistake_in_sampling_is_reported_and_changes_nothing(place, sample, command, error, hint):
    before = snapshot(place)
    result = sample(*shlex.split(command))
    assert result.err == report(error, hint)
    assert (result.code, result.out) == (2, "")
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("command", "error", "hint"),
    [
        (
            "--block-size 500",
            "text.txt: {n:,} characters are too few for block_size = 500",
            "use a longer text, or --block-size {largest} at most",
        ),
        ("--runs-dir notes.txt", "notes.txt: a file is in the way of this folder", "name another"),
        (
            "--runs-dir notes.txt/runs",
            "notes.txt/runs: a file is in the way of this folder",
            "name another",
        ),
    ],
)
def test_a_mistake_found_after_reading_the_text_leaves_only_its_tokens(place, train, command, error, hint):
    n = len((place / "text.txt").read_text(encoding="utf-8"))
    numbers = {"n": n, "largest": round(0.1 * n) - 1}
    before = snapshot(place)
    result = train("--data", "text.txt", *command.split())
    assert result.err == report(error, hint).format(**numbers)
    assert (result.code, result.out) == (2, "")
    assert snapshot(place, ".tokens") == before


@pytest.mark.parametrize("flag", ["--data", "--config", "--resume", "--init-from", "--output", "--device"])
def test_training_reports_a_name_that_is_too_long(place, train, flag):
    data = [] if flag == "--data" else ["--data", "text.txt"]
    check_too_long(place, lambda: train(*data, flag, TOO_LONG))


@pytest.mark.parametrize("flag", ["--model", "--run", "--runs-dir", "--device"])
def test_sampling_reports_a_name_that_is_too_long(place, sample, flag):
    check_too_long(place, lambda: sample(flag, TOO_LONG))


def check_too_long(place: Path, run) -> None:
    before = snapshot(place)
    result = run()
    assert (result.code, result.out) == (2, "")
    first, *further = result.err.splitlines()
    assert first.startswith("error: ")
    assert TOO_LONG in first
    assert [line[:6] for line in further] in ([], ["hint: "])
    assert snapshot(place) == before


def test_the_problems_of_a_command_line_come_together(place, train):
    command = "--max-iterz 5 extra --n-embd 30 --dropout=2 --train-split 0.95 --seed -1"
    result = train(*command.split())
    assert result.code == 2
    assert result.err == (
        "error: 5 problems:\n"
        "  - unknown flag --max-iterz; did you mean --max-iters?\n"
        "  - dropout = 2.0 must be below 1 (dropout from --dropout)\n"
        "  - n_embd = 30 must be divisible by n_head = 4 (n_embd = 32 is) (n_embd from --n-embd)\n"
        "  - seed = -1 must be at least 0 (seed from --seed)\n"
        "  - train_split = 0.95 and val_split = 0.1 make 1.05, more than the whole text"
        " (train_split from --train-split)\n"
        f"hint: {SHOWS}\n"
    )


def test_print_config_reports_the_same_problems_as_training(place, train):
    command = ["--data", "text.txt", "--n-embd", 30, "--max-iterz", 5]
    assert train(*command, "--print-config") == train(*command)


@pytest.mark.parametrize("script", ["train.py", "inference.py"])
def test_a_script_ends_with_the_exit_code_and_without_a_traceback(workdir, script):
    result = run_process(script, "--no-such-flag", cwd=workdir)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[0] == "error: unknown flag --no-such-flag"
    assert len(result.err.splitlines()) == 2
    assert os.listdir(workdir) == []


# --- runs that are in use, and folders that cannot be written ---


def test_a_run_in_use_cannot_be_resumed(place, train):
    path = RunDirectoryCreator("runs").create("2026-01-31_001")
    with lock_run(path):
        before = snapshot(place)
        result = train("--data", "text.txt", "--resume", "latest")
        assert snapshot(place) == before
    assert result.code == 2
    assert result.err == report(f"{path} is in use by another process", "wait for it, or start a new run")


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, ending: str, number: int) -> None:
    """Let an os function fail for paths that end so."""
    real = getattr(os, function)

    def refusing(path, *arguments, **options):
        if isinstance(path, (str, Path)) and str(path).endswith(ending):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, function, refusing)


ELSEWHERE = "allow writing there, or choose another folder"
READ_ONLY = "the file system is read-only; choose another folder"
FULL = "free some space"


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.EROFS, READ_ONLY), (errno.EACCES, ELSEWHERE), (errno.EPERM, ELSEWHERE), (errno.ENOSPC, FULL)],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_a_runs_folder_that_cannot_be_made_ends_with_4(place, train, monkeypatch, number, hint):
    refuse(monkeypatch, "mkdir", "runs", number)
    before = snapshot(place)
    result = train("--data", "text.txt", *TINY, *QUIET_TRACKERS)
    assert result.err == report(f"cannot create runs: {os.strerror(number)}", hint)
    assert result.code == 4
    assert snapshot(place, ".tokens") == before


@pytest.mark.parametrize(
    ("function", "ending", "action"),
    [
        ("mkdir", "_001", "create runs/{run_id}"),
        ("mkdir", "eval", "create runs/{run_id}/eval"),
        ("mkdir", "checkpoints", "create runs/{run_id}/artifacts/checkpoints"),
        ("open", f"_001/{LOCK_NAME}", "lock runs/{run_id}"),
        ("open", f"runs/{LOCK_NAME}", "create a run in runs"),
    ],
)
def test_a_run_directory_is_whole_or_not_there(workdir, monkeypatch, function, ending, action):
    create_run("runs").__exit__()
    before = snapshot(workdir)
    monkeypatch.setattr(RunIDGenerator, "generate", lambda self, tag: "2026-01-31_001")
    refuse(monkeypatch, function, ending, errno.ENOSPC)
    with pytest.raises(Alg1Error) as caught:
        create_run("runs")
    reason = os.strerror(errno.ENOSPC)
    assert caught.value.message == f"cannot {action.format(run_id='2026-01-31_001')}: {reason}"
    assert (caught.value.hint, caught.value.exit_code) == (FULL, 4)
    assert snapshot(workdir) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_ends_with_4(place, train):
    locked = place / "folder"
    locked.chmod(0o500)
    try:
        result = train("--data", "text.txt", "--runs-dir", "folder/runs", *TINY, *QUIET_TRACKERS)
        assert os.listdir(locked) == []
    finally:
        locked.chmod(0o700)
    assert result.err == report("cannot create folder/runs: Permission denied", ELSEWHERE)
    assert result.code == 4


# --- how a script ends ---


def end_of(main, capsys) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def raising(error: BaseException):
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (Alg1Error("a is wrong"), 2, "error: a is wrong\n"),
        (Alg1Error("a is wrong", "mend a"), 2, "error: a is wrong\nhint: mend a\n"),
        (Alg1Error("the loss is not finite", None, 3), 3, "error: the loss is not finite\n"),
        (KeyboardInterrupt(), 130, ""),
        (
            OSError(errno.ENOSPC, "No space left on device", "f"),
            4,
            f"error: cannot use f: No space left on device\nhint: {FULL}\n",
        ),
        (OSError("odd"), 4, "error: cannot go on: odd\n"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "f"),
            2,
            "error: cannot use f: File name too long\nhint: choose a shorter name\n",
        ),
    ],
    ids=repr,
)
def test_a_failure_ends_in_lines_and_a_code(capsys, error, code, printed):
    assert end_of(raising(error), capsys) == (code, "", printed)


@pytest.mark.parametrize("code", [0, 130, 143])
def test_a_script_ends_with_the_code_of_its_main(capsys, code):
    assert end_of(lambda: code, capsys) == (code, "", "")


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(raising(ZeroDivisionError()))


def test_a_reader_that_goes_away_is_no_error(workdir):
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, str(PROJECT / "train.py"), "--print-config"]
    done = subprocess.run(command, cwd=workdir, stdout=write_end, stderr=subprocess.PIPE, timeout=120)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_without_the_character_gets_a_stand_in(workdir):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = run_process("train.py", "--print-config", "--config", "café", cwd=workdir, env=environment)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[0] == "error: --config caf?: no such file or folder"


@pytest.mark.parametrize(
    ("number", "hint", "code"),
    [
        (errno.ENOSPC, FULL, 4),
        (errno.EDQUOT, "free some of your quota", 4),
        (errno.EFBIG, "raise the file-size limit (ulimit -f)", 4),
        (errno.EROFS, READ_ONLY, 4),
        (errno.EIO, None, 4),
        (errno.ENAMETOOLONG, "choose a shorter name", 2),
    ],
)
def test_an_error_of_the_system_says_what_to_do(number, hint, code):
    error = disk_error("write runs/x", OSError(number, os.strerror(number)))
    assert error.message == f"cannot write runs/x: {os.strerror(number)}"
    assert (error.hint, error.exit_code) == (hint, code)


# --- what training can do without ---


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("first line\nsecond"), "RuntimeError: first line"),
        (KeyError(), "KeyError"),
        (SystemExit(1), "SystemExit: 1"),
        (ValueError("x" * 500), "ValueError: " + "x" * 188),
    ],
)
def test_a_guard_warns_once_and_then_does_nothing_more(error, reason):
    warnings: list[str] = []
    calls: list[int] = []
    guard = Guard("Aim", warnings.append)

    def track(value: int) -> int:
        calls.append(value)
        if value == 2:
            raise error
        return value

    assert [guard.attempt(track, value) for value in (1, 2, 3)] == [1, None, None]
    guard.fail("again")
    assert calls == [1, 2]
    assert warnings == [f"Aim is switched off, training goes on: {reason}"]
    assert not guard.enabled


def test_a_guard_does_not_hold_back_an_interrupt():
    with pytest.raises(KeyboardInterrupt):
        Guard("Aim", print).attempt(raising(KeyboardInterrupt()))


# --- the console ---


@pytest.mark.parametrize(
    ("volume", "out"),
    [({}, "said\n"), ({"quiet": True}, ""), ({"verbose": True}, "said\ndetail\n")],
    ids=["normal", "quiet", "verbose"],
)
def test_the_console_prints_what_was_asked_for_and_logs_everything(workdir, capsys, volume, out):
    console = Console(**volume)
    console.log_to(Path("train.log"))
    console.say("said")
    console.detail("detail")
    console.warn("careful")
    console.close()
    assert capsys.readouterr() == (out, "warning: careful\n")
    lines = Path("train.log").read_text(encoding="utf-8").splitlines()
    assert [line[20:] for line in lines] == ["said", "detail", "warning: careful"]


def test_a_log_that_cannot_be_written_costs_only_the_log(workdir, capsys):
    console = Console()
    console.log_to(workdir)  # a folder
    console.say("said")
    console.close()
    assert capsys.readouterr().out == "said\n"


def test_a_log_is_continued(workdir):
    for word in ("one", "two"):
        console = Console(quiet=True)
        console.log_to(Path("train.log"))
        console.say(word)
        console.close()
    assert [line[20:] for line in Path("train.log").read_text().splitlines()] == ["one", "two"]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (0.0, "0.0000 (perplexity 1.00, 0.000 bits per character)"),
        (1.5, "1.5000 (perplexity 4.48, 2.164 bits per character)"),
        (1000.0, "1000.0000 (perplexity inf, 1442.695 bits per character)"),
    ],
)
def test_a_loss_in_words(loss, words):
    assert loss_in_words(loss) == words


def test_quiet_training_says_nothing(place, train):
    result = train("--data", "text.txt", *TINY, *QUIET_TRACKERS, "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")
