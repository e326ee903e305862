"""Tokenize a text file, and cache the tokens next to it.

A corpus is one UTF-8 text file. It is read in chunks, twice: `scan_corpus` validates it and computes its
SHA-256 and vocabulary; `CorpusScan.tokenize` then writes its tokens to a cache file, which is memory-mapped.
So a text larger than memory trains in constant memory, and the same text is tokenized only once.

For speed, a chunk fits in the processor's cache, pure ASCII is never decoded, and hashing, checksums and disk
writes run in background threads (`BackgroundWorker`).
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

CACHE_FOLDER = ".tokens"  # next to the text file
CACHE_FORMAT = 1
CHUNK_BYTES = 1 << 19  # bytes read at a time; their code points, 4 bytes each, fit in a typical L2 cache
SYNC_BYTES = 1 << 26  # fsync after so many bytes of tokens
BOM = "\ufeff"
NO_TEXT = "this is hardly a text file"
UTF_16 = "if it is UTF-16: iconv -f UTF-16LE -t UTF-8 OLD > NEW"


@dataclass(frozen=True)
class Corpus:
    """A validated, tokenized text.

    Attributes:
        path: the text file.
        sha256: hex digest of the file's bytes.
        tokenizer: its vocabulary is every character of the text.
        tokens: (n,) of the tokenizer's token_type, memory-mapped.
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


@dataclass(frozen=True)
class CorpusScan:
    """What is known of a text before it is tokenized. Making one writes nothing.

    Attributes:
        path, sha256, tokenizer: as in `Corpus`.
        n_characters: the length of the text, which is also its number of tokens.
        cached_tokens: the tokens that an earlier run left in the cache, or None.
    """

    path: Path
    sha256: str
    tokenizer: Tokenizer
    n_characters: int
    cached_tokens: np.ndarray | None = None

    def tokenize(self) -> Corpus:
        """Return the corpus. Unless its tokens are cached already, tokenize the text into the cache.

        Where the cache cannot be written, the tokens go to an unnamed temporary file instead.

        Raises:
            Alg1Error: the text has changed since the scan, or there is no space for its tokens.
        """
        tokens = self.cached_tokens
        if tokens is None:
            tokens = _write_cache(self)
        return Corpus(self.path, self.sha256, self.tokenizer, tokens)


def scan_corpus(path: Path | str) -> CorpusScan:
    """Validate a text file and find its digest, vocabulary and length; write nothing.

    If the cache holds this text, the text is only hashed, not decoded.

    Raises:
        Alg1Error: empty, not UTF-8 (naming the first invalid byte), or not readable.
    """
    path = Path(path)
    cached = _read_cache(path) if (path.parent / CACHE_FOLDER).is_dir() else None
    if cached is not None:
        LOGGER.debug("%s: using the tokens cached in %s", path, path.parent / CACHE_FOLDER)
        return cached
    scan = _scan_text(path)
    if not scan.n_characters:
        raise Alg1Error(f"{path}: the file is empty", "give it some text, or name another file")
    return scan


def open_corpus(path: Path | str) -> Corpus:
    """`scan_corpus` and `CorpusScan.tokenize` in one, for callers with nothing to check in between."""
    return scan_corpus(path).tokenize()


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


def text_warning(path: Path, tokenizer: Tokenizer) -> str | None:
    """A one-line warning if a file is valid UTF-8 but probably not a text, else None."""
    if "\0" in tokenizer.stoi:
        return f"{path}: it has characters of value 0: {NO_TEXT}; {UTF_16}"
    return None


class BackgroundWorker:
    """Runs calls in order in one background thread while the caller goes on.

    This helps with calls that release the GIL: hashing, checksums, disk writes. Leaving the `with` block
    waits for all calls. What a call raises is raised again by a later `submit`, or at the end of the block.

    Args:
        max_pending: how many calls may be pending before a further one blocks the caller.
    """

    def __init__(self, max_pending: int):
        self._max_pending = max_pending
        self._executor = ThreadPoolExecutor(1)
        self._pending: deque[Future] = deque()

    def __enter__(self) -> BackgroundWorker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._executor.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._wait(0)

    def submit(self, function: Callable, *arguments: Any) -> None:
        self._wait(self._max_pending)
        self._pending.append(self._executor.submit(function, *arguments))

    def _wait(self, max_pending: int) -> None:
        while len(self._pending) > max_pending:
            self._pending.popleft().result()


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise unreadable(path, error) from None


def _read_chunks(path: Path, sha256: Any, worker: BackgroundWorker) -> Iterator[bytes | np.ndarray]:
    """Yield the text in chunks, without its BOM: bytes if pure ASCII, otherwise (n,) uint32 code points.

    Args:
        sha256: a hashlib object that is updated with the file's bytes, by the worker.

    Raises:
        Alg1Error: naming the first byte that is not UTF-8.
    """
    consumed = 0  # bytes of the file that have been decoded
    rest = b""  # the first bytes of a character that continues in the next chunk
    with _open_text(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            worker.submit(sha256.update, chunk)
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
        if encoding != "UTF-16" and b"\0" in data:  # text in an 8-bit encoding has no zero bytes
            hint = f"{NO_TEXT}; {UTF_16}"
        raise Alg1Error(f"{path}: not UTF-8 at byte {at} (0x{data[error.start]:02X})", hint) from None


def _scan_text(path: Path) -> CorpusScan:
    ascii_seen = b""
    seen = np.zeros(N_CODE_POINTS, dtype=bool)
    n = 0
    sha256 = hashlib.sha256()
    with BackgroundWorker(max_pending=2) as worker:
        for chunk in _read_chunks(path, sha256, worker):
            n += len(chunk)
            if isinstance(chunk, bytes):
                unseen = chunk.translate(None, ascii_seen)  # without the characters seen so far
                ascii_seen += bytes(set(unseen))
            else:
                seen[chunk.astype(np.intp)] = True  # indexing with any other integer type is slow
    seen[list(ascii_seen)] = True
    return CorpusScan(path, sha256.hexdigest(), Tokenizer(map(chr, np.flatnonzero(seen))), n)


def _hash_file(path: Path) -> str:
    with _open_text(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_cache(path: Path) -> CorpusScan | None:
    """The scan of a text whose tokens are in the cache; None if they are missing or damaged."""
    sha256 = _hash_file(path)
    folder = path.parent / CACHE_FOLDER
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads((folder / f"{sha256}.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer(about["vocabulary"])
        tokens = np.memmap(folder / f"{sha256}.bin", mode="r", dtype=tokenizer.token_type())
        crc = _vocabulary_crc32(tokenizer)
        # Not through the memmap: reading that would count as resident memory.
        with (folder / f"{sha256}.bin").open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                crc = zlib.crc32(chunk, crc)
        intact = len(tokens) == about["n_tokens"] and crc == about["crc32"]
        if about["format"] == CACHE_FORMAT and intact:
            return CorpusScan(path, sha256, tokenizer, len(tokens), tokens)
    return None


def _vocabulary_crc32(tokenizer: Tokenizer) -> int:
    """The start value of the cache's CRC-32, so that it covers the vocabulary and then the tokens."""
    return zlib.crc32("".join(tokenizer.vocabulary).encode("utf-8", "surrogatepass"))


def _write_cache(scan: CorpusScan) -> np.ndarray:
    """Tokenize into the cache, or if that fails into a temporary file without a name; map the tokens."""
    folder = scan.path.parent / CACHE_FOLDER
    dtype = scan.tokenizer.token_type()
    try:
        folder.mkdir(exist_ok=True)
        with atomic_file(folder / f"{scan.sha256}.bin") as descriptor:
            crc32 = _write_tokens(scan, descriptor)
    except (OSError, Alg1Error):
        try:
            with tempfile.TemporaryFile() as file:
                _write_tokens(scan, file.fileno())
                return np.memmap(file, mode="r", dtype=dtype)
        except OSError as error:
            raise disk_error(f"write the tokens of {scan.path} to a temporary file", error) from error
    tokens = np.memmap(folder / f"{scan.sha256}.bin", mode="r", dtype=dtype)
    about = {
        "format": CACHE_FORMAT,
        "text": scan.path.name,
        "n_tokens": len(tokens),
        "crc32": crc32,
        "vocabulary": scan.tokenizer.vocabulary,
    }
    with contextlib.suppress(Alg1Error):  # without this file the text is only tokenized again next time
        write_json(folder / f"{scan.sha256}.json", about)
    return tokens


def _write_tokens(scan: CorpusScan, descriptor: int) -> int:
    """Write the text's tokens to a file and sync it. Returns the CRC-32 of vocabulary and tokens.

    Raises:
        Alg1Error: the text has changed since the scan.
    """
    table = scan.tokenizer.lookup_table()
    ascii_table = table[:256].tobytes()  # for bytes.translate, if tokens are single bytes
    sha256 = hashlib.sha256()
    crc = _vocabulary_crc32(scan.tokenizer)

    def write(tokens: memoryview) -> None:
        nonlocal crc
        write_all(descriptor, tokens)
        crc = zlib.crc32(tokens, crc)

    unsynced = 0
    with BackgroundWorker(max_pending=1) as syncer, BackgroundWorker(max_pending=4) as worker:
        for chunk in _read_chunks(scan.path, sha256, worker):
            if not isinstance(chunk, bytes):
                tokens = table.take(chunk).data
            elif table.itemsize == 1:
                tokens = memoryview(chunk.translate(ascii_table))
            else:
                tokens = table.take(np.frombuffer(chunk, dtype=np.uint8)).data
            worker.submit(write, tokens.cast("B"))
            unsynced += tokens.nbytes
            if unsynced >= SYNC_BYTES:  # sync as we go, so that the disk works in parallel
                syncer.submit(os.fsync, descriptor)
                unsynced = 0
    if sha256.hexdigest() != scan.sha256:  # new characters would have no token in this vocabulary
        raise Alg1Error(f"{scan.path}: it changed while it was read", "train on a copy of it")
    os.fsync(descriptor)
    return crc
