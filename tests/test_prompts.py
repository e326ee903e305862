"""Where a prompt comes from, and how its characters are made those of the model."""

from __future__ import annotations

import gzip
import io
import os
import pty
import shlex
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path

import pytest
from conftest import PROJECT, run_process
from small_model import RUN, build, export, greedy

GREEDY = ("--temperature", 0, "--max-new-tokens", 12)
WEIGHTS = f"{RUN}/artifacts/export/model.safetensors"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(workdir):
    """The model of the only run in the working folder."""
    model = build()
    export(RUN, model)
    return model


SAVE_IT = "save it to a file and name that: the error then tells its encoding and how to convert it"


def give_input(monkeypatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))


# --- a file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["ab\n", "ab", "\n\n a\n", "é🙂" * 20, ""])
@pytest.mark.parametrize("source", ["prompt.txt", "-"])
def test_a_prompt_is_every_character_of_a_file(sample, model, source, prompt, monkeypatch):
    Path("prompt.txt").write_bytes(prompt.encode())
    give_input(monkeypatch, prompt.encode())

    result = sample("--prompt-file", source, *GREEDY)

    assert (result.code, result.err) == (0, f"{WEIGHTS}\n")
    assert result.out == sample("--prompt", prompt, *GREEDY).out
    assert result.out.startswith(prompt)


def test_a_text_of_the_command_line_is_utf8_whatever_the_locale(model):
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C"}
    result = run_process(
        "inference.py", "--device=cpu", "--prompt=ab é", "--stop=é", *GREEDY, env=environment
    )
    assert (result.code, result.out[:4]) == (0, "ab é")
    result = run_process("inference.py", "--device=cpu", "--prompt=hï", env=environment)
    assert (result.code, "'ï'" in result.err, "udc" in result.err) == (2, True, False)


def test_carriage_returns_are_kept_and_a_byte_order_mark_is_not(sample, workdir):
    model = build(vocabulary=sorted("\r\n ab"))
    export(RUN, model)
    Path("prompt.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")

    assert sample("--prompt-file", "prompt.txt", *GREEDY).out == greedy(model, "a\r\nb\r\n", 12) + "\n"


@pytest.mark.parametrize(
    ("name", "error", "hint"),
    [
        ("nowhere", "nowhere: no such file", "check its path"),
        ("folder", "folder: cannot be read: Is a directory", "this is a folder; name a file in it"),
        ("latin", "latin: not UTF-8 at byte 1 (0xE9), in line 1", None),
        ("-", "the standard input: not UTF-8 at byte 1", SAVE_IT),
    ],
)
def test_a_file_that_holds_no_prompt_is_one_error_before_the_model_is_read(
    sample, workdir, name, error, hint, monkeypatch
):
    Path("folder").mkdir()
    Path("latin").write_bytes(b"a\xe9")
    give_input(monkeypatch, b"a\xe9")

    result = sample("--prompt-file", name)

    said, told = result.err.splitlines()
    assert (result.code, result.out, said) == (2, "", f"error: {error}")
    assert told == f"hint: {hint}" if hint else "; then use latin-utf8.txt" in told


@pytest.mark.parametrize("source", ["prompt.txt.gz", "-", "pipe"])
def test_a_packed_prompt_is_unpacked(sample, model, source, monkeypatch):
    packed = gzip.compress(b"ab\n")
    Path("prompt.txt.gz").write_bytes(packed)
    give_input(monkeypatch, packed)
    os.mkfifo("pipe")
    writer = threading.Thread(target=Path("pipe").write_bytes, args=(packed,), daemon=True)
    if source == "pipe":
        writer.start()

    result = sample("--prompt-file", source, *GREEDY)

    assert (result.code, result.out) == (0, greedy(model, "ab\n", 12) + "\n")


def test_of_a_long_prompt_only_the_context_is_made_tokens(sample, model):
    Path("prompt.txt").write_text("abcdefg\n" * 50_000)
    result = sample("--prompt-file", "prompt.txt", *GREEDY)
    assert result.out == "abcdefg\n" * 50_000 + greedy(model, "cdefg\n", 12)[6:] + "\n"


# --- the habits of other programs ---------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "name"), [("FILE:", "prompt.txt"), ("@", "prompt.txt"), ("@", "a b")])
def test_a_file_named_as_in_another_program_is_pointed_to_the_flag(sample, workdir, prefix, name):
    export(RUN, build(vocabulary=sorted({*"FILE:@prompt.tx abc"})))
    Path(name).write_text("tx")
    prompt = prefix + name

    result = sample("--prompt", prompt)

    said, hint = result.err.splitlines()
    assert (result.code, result.out) == (2, "")
    assert said == f"error: --prompt {prompt}: a prompt is not read from a file this way"
    content, literally = hint.split("; these very characters: ")
    _, *flags = shlex.split(content.partition("file: ")[2].join(["x ", ""]))
    assert sample(*flags, *GREEDY).out.startswith("tx")
    command = literally.replace("python", shlex.quote(sys.executable), 1)
    command = command.replace("inference.py", f"{shlex.quote(str(PROJECT / 'inference.py'))} --device cpu")
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout[: len(prompt)]) == (0, prompt), done.stderr


def test_a_file_of_nanogpt_need_not_exist_to_be_recognized(sample, model):
    result = sample("--prompt", "FILE:prompt.txt")
    assert result.err.startswith("error: --prompt FILE:prompt.txt: a prompt is not read from a file this way")


@pytest.mark.parametrize("prompt", ["@ab", "FILE: ab", "@", "FILE:"])
def test_other_texts_with_these_characters_are_prompts(sample, workdir, prompt):
    model = build(vocabulary=sorted("@FILE: ab"))
    export(RUN, model)
    assert sample("--prompt", prompt, *GREEDY).out == greedy(model, prompt, 12) + "\n"


NOTE = "note: the standard input is not read: --prompt-file - makes it the prompt\n"


def test_a_pipe_that_nothing_reads_is_pointed_to_the_flag(model):
    flags = ("inference.py", "--device", "cpu", "--max-new-tokens", "3")
    ignored = run_process(*flags, input="ab")
    read = run_process(*flags, "--prompt-file", "-", input="ab")

    assert (ignored.code, ignored.err) == (0, f"{WEIGHTS}\n{NOTE}")
    assert len(ignored.out) == 4
    assert (read.code, read.err, read.out[:2]) == (0, f"{WEIGHTS}\n", "ab")


@pytest.fixture
def piped():
    """Makes the standard input a pipe, a file or a terminal with this content."""
    before = os.dup(0)

    def prepare(content: bytes, kind: str = "pipe") -> None:
        if kind == "file":
            Path("input").write_bytes(content)
            reader = os.open("input", os.O_RDONLY)
        else:
            reader, writer = os.pipe() if kind == "pipe" else pty.openpty()[::-1]
            os.write(writer, content)
        os.dup2(reader, 0)

    yield prepare
    os.dup2(before, 0)
    os.close(before)


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_the_note_is_printed_where_something_waits(sample, model, piped, kind):
    piped(b"ab\n", kind)
    assert sample(*GREEDY).err == f"{WEIGHTS}\n{NOTE}"
    piped(b"", kind)
    assert sample(*GREEDY).err == f"{WEIGHTS}\n"


def test_what_is_typed_ahead_at_a_terminal_is_for_the_shell(sample, model, piped):
    piped(b"ls\n", "terminal")
    assert sample(*GREEDY).err == f"{WEIGHTS}\n"


@pytest.mark.parametrize("flags", [("--prompt", "ab"), ("--prompt-file", "prompt.txt"), ("--interactive",)])
def test_who_gives_a_prompt_is_not_told(sample, model, piped, flags, monkeypatch):
    Path("prompt.txt").write_text("ab")
    piped(b"ab")
    give_input(monkeypatch, b"ab")  # what the dialogue reads
    assert "note:" not in sample(*flags, *GREEDY).err


# --- line ends ----------------------------------------------------------------------------------------

UNKNOWN = "hint: a line end is typed {}; else leave them out with {} skip, or {} replace"


def test_a_line_end_typed_as_two_characters_is_pointed_to_the_shell(sample, model):
    result = sample("--prompt", r"a\nb'c\n")

    assert (result.code, result.out) == (2, "")
    typed = r"--prompt $'a\nb\'c\n'"
    assert result.err.splitlines()[1:] == [
        r"""error: not in the model's vocabulary: "'" (U+0027), '\\' (U+005C), 'n' (U+006E)""",
        UNKNOWN.format(typed, "--unknown", "--unknown"),
    ]
    done = subprocess.run(["bash", "-c", f"printf %s {typed.split(' ', 1)[1]}"], capture_output=True)
    assert done.stdout == b"a\nb'c\n"


def test_a_stop_at_a_line_end_is_pointed_to_the_shell_too(sample, model):
    result = sample("--stop", r"\n")
    assert result.err.splitlines()[2].startswith(r"hint: a line end is typed --stop $'\n'; else no text")


def test_a_model_that_knows_the_backslash_is_given_both_characters(sample, workdir):
    model = build(vocabulary=sorted("\n\\n ab"))
    export(RUN, model)
    assert sample("--prompt", r"a\n", *GREEDY).out == greedy(model, r"a\n", 12) + "\n"


def test_in_a_dialogue_a_line_end_has_keys(sample, model, type_in):
    typed = sample("--prompt", "a\n", "--seed", 5).out
    type_in(r"a\n", "a\n", r":stop \n", ":stop \n", ":seed 5", "a\n")

    result = sample("--interactive", "--seed", 5)

    assert result.out == typed + typed[: typed.index("\n", 2) + 1] + "\n\n"
    hints = [line for line in result.err.splitlines() if line.startswith("hint: ")]
    assert hints[0] == UNKNOWN.format("Ctrl-V Ctrl-J", ":unknown", ":unknown")
    assert hints[1].startswith("hint: a line end is typed Ctrl-V Ctrl-J; else no text would ever stop there")
    assert result.err.splitlines()[-2] == r":stop '\n'"


# --- :stop --------------------------------------------------------------------------------------------


def test_a_dialogue_changes_where_a_text_ends(sample, model, type_in):
    whole = greedy(model, "ab", 12)
    stop = whole[5:7]
    type_in("ab", f":stop {stop}", "ab", ":stop", ":stop Z", "ab", ":stop off", ":stop", "ab")

    result = sample("--interactive", *GREEDY)

    stopped = whole[: whole.index(stop, 2) + 2]
    assert len(stopped) < len(whole)
    assert result.out == f"{whole}\n{stopped}\n{stopped}\n{whole}\n\n"
    assert result.err.splitlines()[2:] == [
        f":stop {stop!r}",
        f":stop {stop!r}",
        "error: :stop: not in the model's vocabulary: 'Z' (U+005A)",
        "hint: no text would ever stop there: leave :stop out, or name characters that the model knows",
        ":stop off",
        ":stop off",
    ]


def test_spaces_and_colons_may_end_a_text(sample, workdir, type_in):
    export(RUN, build(vocabulary=sorted(": ab")))
    type_in(":stop  ", ":stop : ", ":stop :a", ":help")

    result = sample("--interactive", "--stop", "b")

    assert result.err.splitlines()[2:5] == [":stop ' '", ":stop ': '", ":stop ':a'"]
    assert "(':a')" in result.err


def test_stop_off_is_none(sample, model):
    assert sample("--stop", "off", *GREEDY).out == sample(*GREEDY).out


# --- normal forms -------------------------------------------------------------------------------------


def note(what: str, form: str) -> str:
    return f"note: {what} is converted to {form}, the Unicode normal form of the model's characters"


@pytest.mark.parametrize(("form", "typed"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_prompt_is_converted_to_the_normal_form_of_the_model(sample, workdir, form, typed):
    known, given = (unicodedata.normalize(f, "aé한b") for f in (form, typed))
    model = build(vocabulary=sorted(set(known)))
    export(RUN, model)

    result = sample("--prompt", given, "--stop", given[1:-1], *GREEDY)

    assert known != given
    assert result.out.startswith(known)
    assert result.err.splitlines() == [WEIGHTS, note("--stop", form), note("the prompt", form)]
    assert sample("--prompt", known, *GREEDY).err == f"{WEIGHTS}\n"


def test_in_a_dialogue_too(sample, model, type_in):
    type_in("e\u0301", ":stop e\u0301")

    result = sample("--interactive", *GREEDY)

    assert result.out == greedy(model, "é", 12) + "\n\n"
    assert result.err.splitlines()[2:] == [note("the prompt", "NFC"), note(":stop", "NFC"), ":stop 'é'"]


def test_what_remains_unknown_is_told(sample, model):
    result = sample("--prompt", "Ze\u0301")
    assert result.err.splitlines()[1:3] == [
        note("the prompt", "NFC"),
        "error: not in the model's vocabulary: 'Z' (U+005A)",
    ]
    assert sample("--prompt", "Ze\u0301", "--unknown", "skip", *GREEDY).out.startswith("é")


@pytest.mark.parametrize("prompt", ["è", "ñè", "ﬁ"])
def test_a_conversion_that_makes_no_character_known_is_not_made(sample, model, prompt):
    """The model knows e, but no accent; and a ligature is no normal form of its letters."""
    result = sample("--prompt", prompt)
    assert "note:" not in result.err and result.err.splitlines()[1].count("U+") == len(prompt)
    assert sample("--prompt", "a" + prompt, "--unknown", "skip", *GREEDY).out.startswith("a")


def test_a_prompt_that_is_known_stays_as_it_is(sample, workdir):
    both = sorted({*"ab e\u0301é"})
    model = build(vocabulary=both)
    export(RUN, model)
    assert sample("--prompt", "e\u0301é", *GREEDY).out == greedy(model, "e\u0301é", 12) + "\n"
