"""Text -> tokens, kept in a cache beside the text.

A corpus is one UTF-8 text file. It is read in pieces, twice: once to check it, digest it and collect its
characters, once to write its tokens to a cache file that training then maps into memory. So a text larger
than memory trains in constant memory, and the same text is tokenised once.

What takes long is done in few passes over pieces that stay in the processor's cache: pieces of pure ASCII are
never decoded, and digest, checksum and disk have a thread beside (`Beside`).
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils import N_CODE_POINTS, Tokenizer
from utils_alg1.base.errors import Alg1Error, disk_error, unreadable
from utils_alg1.base.files import atomic_file, write_all, write_json

LOGGER = logging.getLogger("alg1")


CACHE_FOLDER = ".tokens"  # beside the corpus
CACHE_FORMAT = 1
CHUNK_BYTES = 1 << 19  # of text in a piece: its code points still fit the second-level cache
SYNC_BYTES = 1 << 26  # of tokens that the disk may be behind
BOM = "\ufeff"
NO_TEXT = "this is hardly a text file"


UTF_16 = "if it is UTF-16: iconv -f UTF-16LE -t UTF-8 OLD > NEW"


@dataclass(frozen=True)
class Corpus:
    """A checked, tokenised text.

    Attributes:
        path: the text file.
        sha256: of the file's bytes.
        tokenizer: over all characters of the text.
        tokens: (n,) of the tokenizer's token_type, mapped from a file.
    """

    path: Path
    sha256: str
    tokenizer: Tokenizer
    tokens: np.ndarray

    def split(
        self, train_split: float = 0.9, val_split: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first `train_split` of the tokens, and the last `val_split` (default: all others)."""
        n_train, n_val = split_sizes(len(self.tokens), train_split, val_split)
        return self.tokens[:n_train], self.tokens[len(self.tokens) - n_val :]


def split_sizes(n: int, train_split: float, val_split: float | None) -> tuple[int, int]:
    """How many of n characters are for training and for validation; see `Corpus.split`."""
    n_train = int(train_split * n)
    return n_train, n - n_train if val_split is None else min(n - n_train, round(val_split * n))


def check_block_size(
    path: Path, n: int, block_size: int, train_split: float, val_split: float | None
) -> None:
    """Check that both splits of a text of n characters hold at least one sequence and its target.

    Raises:
        Alg1Error: naming block_size, the text's length and the largest block_size that fits.
    """
    largest = min(split_sizes(n, train_split, val_split)) - 1
    if block_size <= largest:
        return
    text = f"{path}: {n:,} characters are too few for block_size = {block_size}"
    if largest >= 1:
        raise Alg1Error(text, f"use a longer text, or --block-size {largest} at most")
    hint = "use a longer text: each of train_split and val_split needs two characters"
    raise Alg1Error(f"{text}, and for any other", hint)


def doubt(corpus: Corpus) -> str | None:
    """What is odd about a text that is UTF-8 all the same, in one line; None where nothing is."""
    if "\0" in corpus.tokenizer.stoi:
        return f"{corpus.path}: it has characters of value 0: {NO_TEXT}; {UTF_16}"
    return None


def open_corpus(path: Path | str, check: Callable[[int, int], None] = lambda n, vocab_size: None) -> Corpus:
    """Check and tokenise a text file, or map the tokens of an earlier time.

    The cache lies beside the text, keyed by its content. Where that folder cannot be written, the tokens
    go to an unnamed temporary file instead.

    Args:
        check: called with the text's length and vocab_size before anything is written; it may raise.

    Raises:
        Alg1Error: empty, not UTF-8 (naming the byte), or not readable.
    """
    path = Path(path)
    cached = _cached_tokens(path) if (path.parent / CACHE_FOLDER).is_dir() else None
    if cached is not None:
        LOGGER.debug("%s: the tokens that an earlier run has kept in %s", path, path.parent / CACHE_FOLDER)
        check(len(cached.tokens), cached.tokenizer.vocab_size)
        return cached
    sha256, tokenizer, n = _survey(path)
    if not n:
        raise Alg1Error(f"{path}: the file is empty", "give it some text, or name another file")
    check(n, tokenizer.vocab_size)
    return Corpus(path, sha256, tokenizer, _write_tokens(path, sha256, tokenizer))


class Beside:
    """A thread that makes calls in their order while the caller goes on: for what lets go of Python's lock.

    Leaving the `with` block waits for all. What a call raises is raised by a later call, or at the end.

    Args:
        behind: how many calls may be waiting; with more, the caller waits.
    """

    def __init__(self, behind: int):
        self._behind = behind
        self._executor = ThreadPoolExecutor(1)
        self._waiting: deque[Future] = deque()

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._executor.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._wait(0)

    def __call__(self, function: Callable, *arguments: Any) -> None:
        self._wait(self._behind)
        self._waiting.append(self._executor.submit(function, *arguments))

    def _wait(self, behind: int) -> None:
        while len(self._waiting) > behind:
            self._waiting.popleft().result()


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise unreadable(path, error) from None


def _pieces(path: Path, sha256: Any, beside: Beside) -> Iterator[bytes | np.ndarray]:
    """The text in pieces, without its BOM: pure ASCII as it is, other text as (n,) uint32 code points.

    Args:
        sha256: a hashlib object to feed with the file's bytes.

    Raises:
        Alg1Error: naming the first byte that is not UTF-8.
    """
    consumed = 0  # bytes of the file that are decoded
    rest = b""
    with _reading(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            beside(sha256.update, chunk)
            if not rest and chunk.isascii():
                consumed += len(chunk)
                yield chunk
                continue
            data = rest + chunk
            text, used = _decode(path, data, consumed, final=False)
            rest, start = data[used:], consumed
            consumed += used
            if start == 0:
                text = text.removeprefix(BOM)
            yield np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    _decode(path, rest, consumed, final=True)


def _decode(path: Path, data: bytes, offset: int, final: bool) -> tuple[str, int]:
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        at = offset + error.start
        encoding = "UTF-16" if offset == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        hint = f"save the file as UTF-8, for instance: iconv -f {encoding} -t UTF-8 OLD > NEW"
        if encoding != "UTF-16" and b"\0" in data:  # no 8-bit encoding of a text has it
            hint = f"{NO_TEXT}; {UTF_16}"
        raise Alg1Error(f"{path}: not UTF-8 at byte {at} (0x{data[error.start]:02X})", hint) from None


def _survey(path: Path) -> tuple[str, Tokenizer, int]:
    """The SHA-256 of a text, its tokenizer, and its length in characters."""
    ascii_seen = b""
    seen = np.zeros(N_CODE_POINTS, dtype=bool)
    n = 0
    sha256 = hashlib.sha256()
    with Beside(behind=2) as beside:
        for piece in _pieces(path, sha256, beside):
            n += len(piece)
            if isinstance(piece, bytes):
                ascii_seen += bytes(set(piece.translate(None, ascii_seen)))  # deletes what is known
            else:
                seen[piece.astype(np.intp)] = True  # as intp: any other index type is slow here
    seen[list(ascii_seen)] = True
    return sha256.hexdigest(), Tokenizer(map(chr, np.flatnonzero(seen))), n


def _digest(path: Path) -> str:
    with _reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _cached_tokens(path: Path) -> Corpus | None:
    """What an earlier run kept for this content; None if nothing, or nothing whole."""
    sha256 = _digest(path)
    folder = path.parent / CACHE_FOLDER
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads((folder / f"{sha256}.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer(about["vocabulary"])
        tokens = np.memmap(folder / f"{sha256}.bin", mode="r", dtype=tokenizer.token_type())
        crc = _crc32(tokenizer)
        with (folder / f"{sha256}.bin").open("rb") as file:  # through the map it would count as our memory
            while chunk := file.read(CHUNK_BYTES):
                crc = zlib.crc32(chunk, crc)
        whole = len(tokens) == about["n_tokens"] and crc == about["crc32"]
        if about["format"] == CACHE_FORMAT and whole:
            return Corpus(path, sha256, tokenizer, tokens)
    return None


def _crc32(tokenizer: Tokenizer) -> int:
    """Of the vocabulary; that of the tokens goes on from there."""
    return zlib.crc32("".join(tokenizer.vocabulary).encode("utf-8", "surrogatepass"))


def _write_tokens(path: Path, sha256: str, tokenizer: Tokenizer) -> np.ndarray:
    """Tokenise the text into its cache, or into a nameless file where that cannot be written."""
    folder = path.parent / CACHE_FOLDER
    try:
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / f"{sha256}.bin") as descriptor:
            crc32 = _tokenise(path, sha256, tokenizer, descriptor)
    except (OSError, Alg1Error):
        try:
            with tempfile.TemporaryFile() as file:
                _tokenise(path, sha256, tokenizer, file.fileno())
                return np.memmap(file, mode="r", dtype=tokenizer.token_type())
        except OSError as error:
            raise disk_error(f"write the tokens of {path} to a temporary file", error) from error
    tokens = np.memmap(folder / f"{sha256}.bin", mode="r", dtype=tokenizer.token_type())
    about = {
        "format": CACHE_FORMAT,
        "text": path.name,
        "n_tokens": len(tokens),
        "crc32": crc32,
        "vocabulary": tokenizer.vocabulary,
    }
    with contextlib.suppress(Alg1Error):  # without it the tokens are only made again next time
        write_json(folder / f"{sha256}.json", about)
    return tokens


def _tokenise(path: Path, sha256: str, tokenizer: Tokenizer, descriptor: int) -> int:
    """Write a text's tokens to a file, durably: their CRC-32."""
    table = tokenizer.lookup_table()
    ascii_table = table[:256].tobytes()  # where a token is a byte
    read = hashlib.sha256()
    crc = _crc32(tokenizer)

    def write(tokens: memoryview) -> None:
        nonlocal crc
        write_all(descriptor, tokens)
        crc = zlib.crc32(tokens, crc)

    unsynced = 0
    with Beside(behind=1) as disk, Beside(behind=4) as beside:
        for piece in _pieces(path, read, beside):
            if not isinstance(piece, bytes):
                tokens = table.take(piece).data
            elif table.itemsize == 1:
                tokens = memoryview(piece.translate(ascii_table))
            else:
                tokens = table.take(np.frombuffer(piece, dtype=np.uint8)).data
            beside(write, tokens.cast("B"))
            unsynced += tokens.nbytes
            if unsynced >= SYNC_BYTES:  # so that the disk works while we do
                disk(os.fsync, descriptor)
                unsynced = 0
    if read.hexdigest() != sha256:  # its new characters would be no tokens of this vocabulary
        raise Alg1Error(f"{path}: it changed while it was read", "train on a copy of it")
    os.fsync(descriptor)
    return crc
