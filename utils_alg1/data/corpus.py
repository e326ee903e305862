"""What a run is trained and evaluated on: a text, or a text and a held-out text, as tokens.

data/sources.py      what --data and --val-data name -> files
data/text_files.py   files -> bytes
data/texts.py        bytes -> a validated text, and its tokens, which are cached
data/diagnosis.py    what to do about a file that is no text in UTF-8
data/encodings.py    which encoding such a file is likely in
"""

from __future__ import annotations

import dataclasses
import filecmp
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parameters import DataConfig
from utils import Tokenizer, show_characters
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.text import format_count
from utils_alg1.data.diagnosis import (
    ICONV,
    NO_TEXT,
    PANDOC,
    TOKEN_IDS,
    fill_in,
    is_iso_2022_jp,
    is_markup,
    wide_encoding,
)
from utils_alg1.data.sources import Say, find_text, find_training_text
from utils_alg1.data.text_files import TextFiles, iter_bytes
from utils_alg1.data.texts import Text, load_tokens, open_text

REMOVE_CR = "tr -d '\\r' < OLD > NEW"
ALL_TO_LF = "sed 's/\\r$//' < OLD | tr '\\r' '\\n' > NEW"
CR_TO_LF = "tr '\\r' '\\n' < OLD > NEW"


@dataclass
class Corpus:
    """A text, and where one is given the held-out text that takes the place of its val split."""

    text: Text
    held_out: Text | None = None
    vocabulary: list[str] | None = None  # None: the characters of both texts

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.characters if self.vocabulary is None else self.vocabulary)

    @property
    def characters(self) -> set[str]:
        """The characters of both texts."""
        return {character for text in self.texts for character in text.vocabulary}

    def with_vocabulary(self, characters: Iterable[str]) -> Corpus:
        """Return the same texts with a tokenizer of these characters, which have to include theirs."""
        vocabulary = sorted(set(characters))
        assert self.characters.issubset(vocabulary)
        return dataclasses.replace(self, vocabulary=vocabulary)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """The tokens of the text; see `load_tokens`."""
        return load_tokens(self.text, self.tokenizer)

    @functools.cached_property
    def held_out_tokens(self) -> np.ndarray | None:
        return None if self.held_out is None else load_tokens(self.held_out, self.tokenizer)

    @property
    def texts(self) -> list[Text]:
        return [self.text] if self.held_out is None else [self.text, self.held_out]

    @property
    def sha256(self) -> str:
        """The SHA-256 of the text, followed by + and that of the held-out text if there is one."""
        return "+".join(text.sha256 for text in self.texts)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state that is sent to other processes, each of which maps the tokens itself."""
        return {"text": self.text, "held_out": self.held_out, "vocabulary": self.vocabulary}

    def tokenize(self) -> None:
        """Make the tokens now, and raise what `load_tokens` raises."""
        _ = self.tokens, self.held_out_tokens

    def split_sizes(self, train_split: float, val_split: float | None) -> tuple[int, int]:
        """Return how many characters are for training and for validation; see `split`."""
        n = self.text.n_characters
        if self.held_out is not None:
            return n, self.held_out.n_characters
        n_train = int(train_split * n)
        return n_train, n - n_train if val_split is None else min(n - n_train, round(val_split * n))

    def split(
        self, train_split: float = 0.9, val_split: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the first `train_split` of the tokens, and the last `val_split` (default: all others).

        With a held-out text: all tokens of the text, and all of the held-out text.
        """
        n_train, n_val = self.split_sizes(train_split, val_split)
        held_out = self.tokens if self.held_out_tokens is None else self.held_out_tokens
        return self.tokens[:n_train], held_out[len(held_out) - n_val :]

    def check_block_size(self, block_size: int, train_split: float, val_split: float | None) -> None:
        """Raise Alg1Error, with the largest block_size that fits, if a split is too short for this one."""
        n_train, n_val = self.split_sizes(train_split, val_split)
        largest = min(n_train, n_val) - 1
        if block_size <= largest:
            return
        short = self.text if self.held_out is None or n_train <= n_val else self.held_out
        text = f"{short.name}: {short.n_characters:,} characters are too few for block_size = {block_size}"
        part = ""
        if self.held_out is None:
            use = "training" if n_train <= n_val else "validation"
            part = f": {min(n_train, n_val):,} of them are for {use}"
        if largest >= 1:
            raise Alg1Error(f"{text}{part}", f"use a longer text, or --block-size {largest} at most")
        what = "each of train_split and val_split" if self.held_out is None else "it"
        raise Alg1Error(f"{text}, and for any other{part}", f"use a longer text: {what} needs two characters")

    def remarks(self) -> list[str]:
        """Return the lines that tell what a text is like, where nothing is wrong with it."""
        return [
            f"{text.name}: {_lines_with_crlf(text)} end with CR LF, which the samples will have too"
            + ("" if text.n_cr else _remedy(REMOVE_CR, text))
            for text in self.texts
            if text.n_crlf
        ]

    def warnings(self, train_split: float, learned: Iterable[str] = ()) -> list[str]:
        """Return a line for each property of the texts that is rarely meant.

        `learned` are the characters of the model that the run starts from.
        """
        lines = [line for text in self.texts for line in _warnings(text)]
        n_train = self.split_sizes(train_split, None)[0]
        known = {c for c, first in zip(self.text.vocabulary, self.text.first, strict=True) if first < n_train}
        if unknown := self.characters.difference(known, learned):
            where = f"in {self.held_out.name} only" if self.held_out else "not in the part for training"
            count = f"{len(unknown)} of {len(self.characters)}"
            lines.append(
                f"characters {where}, which this run cannot learn ({count}): {show_characters(unknown)}"
            )
        if self.held_out is not None and self.held_out.sha256 == self.text.sha256:
            lines.append(f"{self.held_out.name}: the held-out text is the text that is trained on")
        elif self.held_out is not None and (both := _first_in_both(self.text, self.held_out)):
            lines.append(f"{both}: it is trained on too, so the val loss does not tell of new text")
        return lines


def _first_in_both(text: Text, held_out: Text) -> Path | None:
    """Return the first file of a held-out text that is one of a text, or has the same bytes; or None."""
    sizes: dict[int, list[Path]] = {}
    for path in text.files.paths:
        sizes.setdefault(path.stat().st_size, []).append(path)
    for path in held_out.files.paths:
        size = path.stat().st_size
        if size and any(filecmp.cmp(path, other, shallow=False) for other in sizes.get(size, [])):
            return path
    return None


def _warnings(text: Text) -> Iterator[str]:
    """Yield what is rarely meant in one text."""
    paths, within = text.files.paths, text.files.within
    if "\0" in text.vocabulary:
        wide = next(((path, name) for path in paths if (name := wide_encoding(path))), None)
        remedy = f"; {TOKEN_IDS}"
        if wide is not None:
            remedy = f"; if it is {wide[1]}: {fill_in(ICONV.format(wide[1]), wide[0], within=within)}"
        yield f"{text.name}: it has characters of value 0: {NO_TEXT}{remedy}"
    if "\x1b" in text.vocabulary and (path := next(filter(is_iso_2022_jp, paths), None)):
        remedy = fill_in(ICONV.format("ISO-2022-JP"), path, within=within)
        yield f"{path}: this is hardly UTF-8, but ISO-2022-JP; if it is: {remedy}"
    if path := next(filter(is_markup, paths), None):
        remedy = fill_in(PANDOC.format("html"), path, within=within)
        yield f"{path}: this is HTML, whose tags are trained on too; for its text alone: {remedy}"
    if text.n_cr:
        remedy = _remedy(ALL_TO_LF if text.n_crlf else CR_TO_LF, text)
        yield f"{text.name}: {format_count(text.n_cr, 'line end')} of CR alone, as on old Macs{remedy}"


def _lines_with_crlf(text: Text) -> str:
    n_lines = sum(chunk.count(b"\n") for path in text.files.paths for chunk in iter_bytes(path))
    return "its lines" if n_lines == text.n_crlf and not text.n_cr else f"{text.n_crlf:,} of its lines"


def _remedy(command: str, text: Text) -> str:
    """Return the end of a line that says how to change a text; nothing for one of several files."""
    if text.files.within is not None:
        return ""
    return f"; to change that: {fill_in(command, text.files.paths[0], 'lf')}"


def open_corpus(text: TextFiles | Path | str, held_out: TextFiles | Path | str | None = None) -> Corpus:
    """Validate a text, and a held-out text; write nothing. Raises what `open_text` raises."""
    opened = open_text(TextFiles.of(text))
    return Corpus(opened, None if held_out is None else open_text(TextFiles.of(held_out)))


def find_corpus(config: DataConfig, say: Say = print) -> Corpus:
    """Find and validate the texts that the parameters name. Raises what `find_text` and `open_text` raise."""
    text = find_training_text(config.data_path, say)
    held_out = None if config.val_data is None else find_text(config.val_data, say, "--val-data")
    return open_corpus(text, held_out)
