"""Tokenize a text file, and cache the tokens next to it.

A corpus is one UTF-8 text file. It is read twice, in pieces: `open_corpus` validates it and computes its
SHA-256 and vocabulary; the first use of `Corpus.tokens` writes them to a cache file, which is memory-mapped.
So a text larger than memory trains in constant memory, and the same text is tokenized only once (for each
vocabulary: a model that is trained further has its own, `Corpus.with_vocabulary`).
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils import N_CODE_POINTS, Tokenizer
from utils_alg1.base.errors import Alg1Error, disk_error, unreadable
from utils_alg1.base.files import atomic_file, write_all, write_json

LOGGER = logging.getLogger("alg1")

CACHE_FOLDER = ".tokens"  # next to the text file
CACHE_FORMAT = 2
CHUNK_BYTES = 1 << 17  # bytes read at a time: what is made of them stays in the processor's cache
NO_TEXT = "this is hardly a text file"
UTF_16 = "if it is UTF-16: iconv -f UTF-16LE -t UTF-8 OLD > NEW"


@dataclass
class Corpus:
    """A validated text file."""

    path: Path
    sha256: str  # hex digest of the file's bytes
    tokenizer: Tokenizer  # its vocabulary has every character of the text, and no other by default
    n_characters: int  # also the number of tokens
    cache_name: str  # of its files in the cache

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """(n,) of the tokenizer's token_type, memory-mapped, from the cache or tokenized now.

        Raises:
            Alg1Error: the text has changed since it was validated, or there is no space for its tokens.
        """
        return _write_cache(self)

    def tokenize(self) -> None:
        """Make `tokens` now, and raise what they raise."""
        _ = self.tokens

    def with_vocabulary(self, characters: Iterable[str]) -> Corpus:
        """Return the same text with a tokenizer of these characters, which include those of the text."""
        tokenizer = Tokenizer(characters)
        if tokenizer.vocabulary == self.tokenizer.vocabulary:
            return self
        assert not tokenizer.unseen("".join(self.tokenizer.vocabulary))
        name = f"{self.sha256}-{_vocabulary_sha256(tokenizer).hexdigest()[:16]}"
        cached = _read_cache(self.path, self.sha256, name)
        return cached or dataclasses.replace(self, tokenizer=tokenizer, cache_name=name)

    def split_sizes(self, train_split: float, val_split: float | None) -> tuple[int, int]:
        """Return how many characters are for training and for validation; see `split`."""
        n_train = int(train_split * self.n_characters)
        n_other = self.n_characters - n_train
        return n_train, n_other if val_split is None else min(n_other, round(val_split * self.n_characters))

    def split(
        self, train_split: float = 0.9, val_split: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the first `train_split` of the tokens, and the last `val_split` (default: all others)."""
        n_train, n_val = self.split_sizes(train_split, val_split)
        return self.tokens[:n_train], self.tokens[self.n_characters - n_val :]

    def check_block_size(self, block_size: int, train_split: float, val_split: float | None) -> None:
        """Raise Alg1Error, with the largest block_size that fits, if a split is too short for this one."""
        largest = min(self.split_sizes(train_split, val_split)) - 1
        if block_size <= largest:
            return
        text = f"{self.path}: {self.n_characters:,} characters are too few for block_size = {block_size}"
        if largest >= 1:
            raise Alg1Error(text, f"use a longer text, or --block-size {largest} at most")
        hint = "use a longer text: each of train_split and val_split needs two characters"
        raise Alg1Error(f"{text}, and for any other", hint)

    def warning(self) -> str | None:
        """Return a one-line warning if the file is valid UTF-8 but probably not a text, else None."""
        if "\0" not in self.tokenizer.stoi:
            return None
        return f"{self.path}: it has characters of value 0: {NO_TEXT}; {UTF_16}"


def open_corpus(path: Path | str) -> Corpus:
    """Validate a text file and find its digest, vocabulary and length; write nothing.

    If the cache holds this text, the text is only hashed, not decoded.

    Raises:
        Alg1Error: empty, not UTF-8 (naming the first invalid byte), or not readable.
    """
    path = Path(path)
    corpus = _find_cache(path) or _scan_text(path)
    if not corpus.n_characters:
        raise Alg1Error(f"{path}: the file is empty", "give it some text, or name another file")
    return corpus


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise unreadable(path, error) from None


def _read_text(path: Path, sha256: Any) -> Iterator[str]:
    """Yield the text in pieces, without its BOM, and update a hashlib object with the bytes of the file.

    Raises:
        Alg1Error: naming the first byte that is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_bytes, at_start, chunk = 0, True, b"first"
    with _open_text(path) as file:
        while chunk:
            chunk = file.read(CHUNK_BYTES)
            sha256.update(chunk)
            n_bytes += len(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, error, n_bytes) from None
            yield text.removeprefix("\ufeff") if at_start else text
            at_start = at_start and not text


def _not_utf8(path: Path, error: UnicodeDecodeError, n_bytes: int) -> Alg1Error:
    """Return the error for a text that the decoder refused after reading so many bytes of the file."""
    data, offset = error.object, n_bytes - len(error.object)  # of what was decoded at last
    encoding = "UTF-16" if offset == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
    hint = f"save the file as UTF-8, for instance: iconv -f {encoding} -t UTF-8 OLD > NEW"
    if encoding != "UTF-16" and b"\0" in data:  # text in an 8-bit encoding has no zero bytes
        hint = f"{NO_TEXT}; {UTF_16}"
    at, byte = offset + error.start, data[error.start]
    return Alg1Error(f"{path}: not UTF-8 at byte {at} (0x{byte:02X})", hint)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def _scan_text(path: Path) -> Corpus:
    sha256, n = hashlib.sha256(), 0
    ascii_seen, seen = b"", np.zeros(N_CODE_POINTS, dtype=bool)
    for text in _read_text(path, sha256):
        n += len(text)
        if text.isascii():  # four times as fast as the general form
            ascii_seen += bytes(set(text.encode().translate(None, ascii_seen)))
        else:
            seen[_code_points(text).astype(np.intp)] = True  # any other integer type is slow
    seen[list(ascii_seen)] = True
    digest = sha256.hexdigest()
    return Corpus(path, digest, Tokenizer(map(chr, np.flatnonzero(seen))), n, digest)


def _vocabulary_sha256(tokenizer: Tokenizer) -> Any:
    """Start the SHA-256 of a cache, which covers the vocabulary and then the tokens."""
    return hashlib.sha256("".join(tokenizer.vocabulary).encode())


def _find_cache(path: Path) -> Corpus | None:
    """Return a text whose tokens, of its own vocabulary, are in the cache; None if they are not."""
    if not (path.parent / CACHE_FOLDER).is_dir():
        return None
    with _open_text(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return _read_cache(path, sha256, sha256)


def _read_cache(path: Path, sha256: str, name: str) -> Corpus | None:
    """Return the text with the tokens of this name in the cache; None if they are missing or damaged."""
    folder = path.parent / CACHE_FOLDER
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer(about["vocabulary"])
        with (folder / f"{name}.bin").open("rb") as file:
            found = hashlib.file_digest(file, lambda: _vocabulary_sha256(tokenizer)).hexdigest()
        if (about["format"], about["sha256"]) == (CACHE_FORMAT, found):
            tokens = np.memmap(folder / f"{name}.bin", mode="r", dtype=tokenizer.token_type())
            LOGGER.debug("%s: using the tokens cached in %s", path, folder)
            corpus = Corpus(path, sha256, tokenizer, len(tokens), name)
            corpus.tokens = tokens
            return corpus
    return None


def _write_cache(corpus: Corpus) -> np.ndarray:
    """Tokenize into the cache, or if that fails into a temporary file without a name; map the tokens."""
    folder = corpus.path.parent / CACHE_FOLDER
    dtype = corpus.tokenizer.token_type()
    try:
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / f"{corpus.cache_name}.bin") as descriptor:
            sha256 = _write_tokens(corpus, descriptor)
    except (OSError, Alg1Error):
        try:
            with tempfile.TemporaryFile() as file:
                _write_tokens(corpus, file.fileno())
                return np.memmap(file, mode="r", dtype=dtype)
        except OSError as error:
            raise disk_error(f"write the tokens of {corpus.path} to a temporary file", error) from error
    about = {"format": CACHE_FORMAT, "text": corpus.path.name, "sha256": sha256}
    with contextlib.suppress(Alg1Error):  # without this file the text is only tokenized again next time
        write_json(folder / f"{corpus.cache_name}.json", about | {"vocabulary": corpus.tokenizer.vocabulary})
    return np.memmap(folder / f"{corpus.cache_name}.bin", mode="r", dtype=dtype)


def _write_tokens(corpus: Corpus, descriptor: int) -> str:
    """Write the text's tokens to a file. Returns the SHA-256 of vocabulary and tokens.

    Raises:
        Alg1Error: the text has changed since it was validated.
    """
    table = corpus.tokenizer.lookup_table()
    ascii_table = table[:256].tobytes()  # for bytes.translate, if tokens are single bytes
    text_sha256, sha256 = hashlib.sha256(), _vocabulary_sha256(corpus.tokenizer)
    for text in _read_text(corpus.path, text_sha256):
        if text.isascii() and table.itemsize == 1:
            tokens = memoryview(text.encode().translate(ascii_table))
        else:
            tokens = table.take(_code_points(text)).data.cast("B")
        sha256.update(tokens)
        write_all(descriptor, tokens)
    if text_sha256.hexdigest() != corpus.sha256:  # new characters would have no token in this vocabulary
        raise Alg1Error(f"{corpus.path}: it changed while it was read", "train on a copy of it")
    return sha256.hexdigest()
