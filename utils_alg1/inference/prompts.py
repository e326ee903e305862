"""What a model is given to continue: where it comes from, and how it is made to fit the vocabulary."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import unicodedata
from io import BufferedReader
from pathlib import Path
from typing import cast

from utils import Tokenizer, show_characters
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.scripts import command
from utils_alg1.base.text import shell_quote
from utils_alg1.console.messages import print_note

STANDARD_INPUT = "-"  # as the name of a file


def read_prompt(prompt: str | None, path: str | None) -> str:
    """Return the text of --prompt or of --prompt-file, which is UTF-8; "" if both are None.

    Raises:
        Alg1Error: the file cannot be read, or --prompt names a file as other programs would read it.
    """
    if path == STANDARD_INPUT:
        from utils_alg1.data.texts import read_stream

        return "".join(read_stream(standard_input()))
    if path is not None:
        return read_prompt_file(Path(path))
    prompt = prompt or ""
    name = re.fullmatch(r"FILE:(\S+)|@(.+)", prompt)  # as in nanoGPT, and as in curl
    if name and (name[1] or os.path.isfile(name[2])):
        literally = f"printf %s {shell_quote(prompt)} | {command('inference.py')} --prompt-file -"
        raise Alg1Error(
            f"--prompt {prompt}: a prompt is not read from a file this way",
            f"the content of the file: --prompt-file {shell_quote(name[1] or name[2])};"
            f" these very characters: {literally}",
        )
    return prompt


def read_prompt_file(path: Path) -> str:
    """Return the text of a file, which may be empty, or of a pipe; both may be packed with gzip."""
    import hashlib

    from utils_alg1.data.diagnosis import refuse_other_kinds
    from utils_alg1.data.sources import file_mode, is_stream
    from utils_alg1.data.text_files import TextFiles
    from utils_alg1.data.texts import read_stream, read_text

    if not file_mode(path):
        raise Alg1Error(f"{path}: no such file", "check its path")
    if is_stream(path):
        return "".join(read_stream(path))
    refuse_other_kinds(path)
    return "".join(read_text(TextFiles.of(path), hashlib.sha256()))


def standard_input() -> BufferedReader:
    """Return the bytes of the standard input."""
    return cast(BufferedReader, sys.stdin.buffer)


def note_unread_input() -> None:
    """Print a note if a pipe or a file waits at the standard input, which nothing is going to read."""
    with contextlib.suppress(OSError):  # it is closed, or a device
        import fcntl
        import termios

        n_bytes = fcntl.ioctl(0, termios.FIONREAD, bytes(4))
        if any(n_bytes) and not os.isatty(0):
            print_note("the standard input is not read: --prompt-file - makes it the prompt")


def fit_prompt(
    prompt: str, tokenizer: Tokenizer, unknown: str, flag: str = "--unknown", line_end: str = ""
) -> str:
    """Return a prompt of known characters only: in their normal form, and the others skipped or replaced.

    Args:
        unknown: "error", "skip" or "replace".
        flag, line_end: for the hint: what sets `unknown`, and how a line end is typed (default: in a shell).

    Raises:
        Alg1Error: there are others, and `unknown` is "error".
    """
    prompt = in_normal_form(prompt, tokenizer, "the prompt")
    unseen = set(tokenizer.unseen(prompt))
    if not unseen:
        return prompt
    if unknown == "error":
        raise Alg1Error(
            f"not in the model's vocabulary: {show_characters(unseen)}",
            line_end_hint(prompt, unseen, line_end or in_shell("--prompt", prompt))
            + f"leave them out with {flag} skip, or {flag} replace",
        )
    replacement = "" if unknown == "skip" else tokenizer.replacement
    return "".join(replacement if character in unseen else character for character in prompt)


def fit_stop(stop: str, tokenizer: Tokenizer, flag: str = "--stop", line_end: str = "") -> str:
    """Return the text that ends a text in the normal form that the model knows.

    Raises:
        Alg1Error: it has characters that the model does not know.
    """
    stop = in_normal_form(stop, tokenizer, flag)
    if never_drawn := set(tokenizer.unseen(stop)):
        raise Alg1Error(
            f"{flag}: not in the model's vocabulary: {show_characters(never_drawn)}",
            line_end_hint(stop, never_drawn, line_end or in_shell(flag, stop))
            + f"no text would ever stop there: leave {flag} out, or name characters that the model knows",
        )
    return stop


def in_normal_form(text: str, tokenizer: Tokenizer, name: str) -> str:
    """Return a text in NFC or NFD, with a note, if the model knows it in that Unicode normal form only."""
    unseen = set(tokenizer.unseen(text))
    for form in ("NFC", "NFD") if unseen else ():
        converted = unicodedata.normalize(form, text)
        if set(tokenizer.unseen(converted)) < unseen:
            print_note(f"{name} is converted to {form}, the Unicode normal form of the model's characters")
            return converted
    return text


def line_end_hint(text: str, unseen: set[str], typed: str) -> str:
    r"""Return the beginning of a hint if \n stands in a text as two characters, one of them unknown."""
    return f"a line end is typed {typed}; else " if "\\n" in text and "\\" in unseen else ""


def in_shell(flag: str, text: str) -> str:
    r"""Return a flag with a text whose \n are line ends to bash and zsh."""
    quoted = text.replace("'", "\\'")
    return f"{flag} $'{quoted}'"
