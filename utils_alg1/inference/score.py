"""inference.py --score: how well a model predicts a text: nats and bits per character, perplexity."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils import N_CODE_POINTS, Tokenizer, show_characters
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.text import bits_per_character, format_count, format_loss, perplexity
from utils_alg1.console.messages import is_terminal, print_note
from utils_alg1.data.sources import find_files, is_stream
from utils_alg1.data.texts import Text, open_text, read_stream, read_text
from utils_alg1.inference.prompts import STANDARD_INPUT, standard_input
from utils_alg1.network.sampling import LogitsDecoder
from utils_alg1.network.scoring import score_tokens

if TYPE_CHECKING:
    from utils_alg1.console.terminal import Bar

BAR_DELAY = 1.0  # seconds: a text that takes no longer gets no progress bar


@dataclass
class Score:
    """How well the characters read so far were predicted.

    Attributes:
        nats: the sum of the losses of those that were scored.
        unknown: the number of those that the model does not know.
    """

    nats: float = 0.0
    scored: int = 0
    unknown: int = 0

    def add(self, losses: np.ndarray) -> None:
        self.nats += float(losses.sum(dtype=np.float64))
        self.scored += len(losses)

    @property
    def read(self) -> int:
        return self.scored + self.unknown

    @property
    def loss(self) -> float:
        """Nats per character; NaN where none was scored."""
        return self.nats / self.scored if self.scored else math.nan

    def lines(self, unknown: str) -> str:
        """Return the figures as YAML; `unknown` is what was done with unknown characters."""
        done = {"skip": "left out", "replace": "replaced where they are context", "error": ""}[unknown]
        remark = f"  # not scored; {done}" if self.unknown else ""
        return (
            f"nats_per_character: {self.loss:.6f}\n"
            f"bits_per_character: {bits_per_character(self.loss):.6f}\n"
            f"perplexity: {perplexity(self.loss) or math.inf:.6f}\n"
            f"characters_scored: {self.scored}  # the first is not: it has no context\n"
            f"characters_unknown: {self.unknown}{remark}"
        )


def score_text(name: str, decoder: LogitsDecoder, tokenizer: Tokenizer, unknown: str) -> Score:
    """Score a text; `score_tokens` says from what each character is predicted.

    Args:
        name: a file, a folder or a pattern (see `find_files`), or "-" for the standard input.
        unknown: what to do with characters that the model does not know, which are not scored: "error",
            "skip" (leave them out), or "replace" (others see the tokenizer's replacement in their place).

    Raises:
        Alg1Error: the text cannot be read, or has nothing to score, or unknown characters that are an error.
        NotFiniteError: see `score_tokens`.
    """
    texts, text = find_pieces(name)
    if text is not None and unknown == "error":  # before all that can take long
        refuse_unknown(name, tokenizer.unseen("".join(text.vocabulary)))
    score = Score()
    pieces = tokenize(texts, tokenizer, unknown, score, name)
    try:
        with progress_bar(None if text is None else text.n_characters) as show:
            for losses in score_tokens(decoder, pieces):
                score.add(losses)
                show(score)
    except KeyboardInterrupt:
        if score.scored:
            print_note(f"{format_count(score.scored, 'character')} so far: loss {format_loss(score.loss)}")
        raise
    if not score.scored:
        hint = "name a text with two characters or more that the model knows"
        raise Alg1Error(f"--score {name}: nothing in this text can be scored", hint)
    return score


def find_pieces(name: str) -> tuple[Iterator[str], Text | None]:
    """Return a text in pieces and, if it can be read twice, what a first reading tells of it."""
    if name == STANDARD_INPUT:
        return read_stream(standard_input()), None
    path = Path(os.path.expanduser(name))
    if is_stream(path):
        return read_stream(path), None
    text = open_text(find_files(name, "--score"))
    return read_text(text.files, hashlib.sha256()), text


def refuse_unknown(name: str, characters: Iterable[str]) -> None:
    """Raise Alg1Error if there are characters that the model does not know."""
    if unseen := show_characters(characters):
        raise Alg1Error(
            f"--score {name}: not in the model's vocabulary: {unseen}",
            "to score the others: --unknown skip leaves these out, --unknown replace puts a space there",
        )


def tokenize(
    texts: Iterable[str], tokenizer: Tokenizer, unknown: str, score: Score, name: str
) -> Iterator[np.ndarray]:
    """Yield a text in the tokens of `score_tokens`, and count its unknown characters."""
    table = np.full(N_CODE_POINTS, ~tokenizer.stoi[tokenizer.replacement])  # code point -> token
    table[[ord(character) for character in tokenizer.vocabulary]] = np.arange(tokenizer.vocab_size)
    for text in texts:
        tokens = table.take(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"))
        known = tokens >= 0
        if not known.all():
            if unknown == "error":
                refuse_unknown(name, tokenizer.unseen(text))
            score.unknown += len(tokens) - int(known.sum())
            if unknown == "skip":
                tokens = tokens[known]
        yield tokens


@contextlib.contextmanager
def progress_bar(total: int | None) -> Iterator[Callable[[Score], None]]:
    """Yield a function that shows how far a score is, at a terminal, if it takes long."""
    start = time.monotonic()
    bar: Bar | None = None

    def show(score: Score) -> None:
        nonlocal bar
        if bar is None and is_terminal(sys.stderr) and time.monotonic() - start > BAR_DELAY:
            from utils_alg1.console.terminal import Bar

            bar = Bar(sys.stderr, score.read, total, 1, "character")
        if bar is not None:
            bar.update(score.read, score.loss)

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()
