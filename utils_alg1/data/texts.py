"""Read a text, and turn it into tokens, which are cached next to it.

A text is read twice, in pieces: `open_text` validates it and finds what `Text` holds; `load_tokens` writes
its tokens to a file, which is memory-mapped. So a text larger than memory trains in constant memory, and the
same text is validated and tokenized only once: the cache holds

    SHA256.json              the fields of Text
    SHA256-VOCABULARY.bin    SHA-256 of the tokens (HEADER_BYTES), then the tokens for a vocabulary
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from utils import N_CODE_POINTS, Tokenizer
from utils_alg1.base.errors import Alg1Error, disk_error
from utils_alg1.base.files import atomic_file, write_all, write_atomically
from utils_alg1.base.text import format_count
from utils_alg1.data.diagnosis import not_utf8, refuse_other_kinds
from utils_alg1.data.text_files import STANDARD_INPUT, TextFiles, iter_bytes

LOGGER = logging.getLogger("alg1")

CACHE_FOLDER = ".tokens"  # next to the first file of a text
CACHE_FORMAT = 3
HEADER_BYTES = hashlib.sha256().digest_size
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)  # of a folder that is meant to stay as it is


@dataclass(frozen=True)
class Text:
    """What one reading of a text finds."""

    files: TextFiles
    sha256: str  # hex digest of the bytes of its files (see `read_text`)
    vocabulary: list[str]  # its characters, sorted by code point
    first: list[int]  # where in the text each of them occurs first
    n_characters: int
    n_crlf: int  # line ends of two characters, CR LF
    n_cr: int  # CR without LF: the line ends of old Macs

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def cache(self) -> Path:
        """The folder of its cache."""
        return _cache_folder(self.files)

    def describe(self) -> str:
        """Return its name and its size, for the user."""
        n_files = len(self.files.paths)
        of_files = f"{n_files} files, " if n_files > 1 else ""
        return f"{self.name}: {of_files}{format_count(self.n_characters, 'character')}"


def _cache_folder(files: TextFiles) -> Path:
    return files.paths[0].parent / CACHE_FOLDER


def open_text(files: TextFiles) -> Text:
    """Validate a text, or find it in the cache, for which it is only hashed. Nothing is written.

    Raises:
        Alg1Error: empty, no text, not UTF-8 (naming the first invalid byte), or not readable.
    """
    for path in files.paths:
        refuse_other_kinds(path, files.within)
    text = _read_cached(files) or scan_text(files)
    if not text.n_characters:
        what = "the file is empty" if len(files.paths) == 1 else f"its {len(files.paths)} files are empty"
        raise Alg1Error(f"{files.name}: {what}", "give it some text, or name another")
    return text


def read_text(files: TextFiles, sha256: Any) -> Iterator[str]:
    """Yield a text in pieces, and update a hashlib object with its bytes.

    The text is that of one file after the other, each without its byte order mark and with nothing between
    them. The digest is that of their unpacked bytes, less the byte order marks of all but the first file; so
    it tells texts apart, and is that of the file where there is one.

    Raises:
        Alg1Error: naming the first byte that is not UTF-8.
    """
    for i, path in enumerate(files.paths):
        try:
            chunks = iter_bytes(path, keep_bom=i == 0)
            yield from _decode(chunks, "utf-8" if i else "utf-8-sig", sha256.update)
        except UnicodeDecodeError:
            raise not_utf8(path, files.within) from None


def read_stream(source: Path | BufferedReader) -> Iterator[str]:
    """Yield a text that can be read only once, such as that of a pipe, as `read_text` does that of a file.

    Raises:
        Alg1Error: it cannot be read, or is not UTF-8.
    """
    sizes: list[int] = []  # of the chunks read so far
    try:
        yield from _decode(iter_bytes(source), "utf-8-sig", lambda chunk: sizes.append(len(chunk)))
    except UnicodeDecodeError as error:
        at = sum(sizes) - len(error.object) + error.start
        name = source if isinstance(source, Path) else STANDARD_INPUT
        hint = "save it to a file and name that: the error then tells its encoding and how to convert it"
        raise Alg1Error(f"{name}: not UTF-8 at byte {at}", hint) from None


def _decode(chunks: Iterable[bytes], codec: str, see: Callable[[bytes], object]) -> Iterator[str]:
    """Yield the text of bytes in pieces, and show each chunk to `see`. Raises UnicodeDecodeError."""
    decoder = codecs.getincrementaldecoder(codec)()
    for chunk in chunks:
        see(chunk)
        yield decoder.decode(chunk)
    decoder.decode(b"", final=True)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def scan_text(files: TextFiles) -> Text:
    """Validate a text and find what `Text` holds."""
    sha256, n, n_cr, n_crlf, end = hashlib.sha256(), 0, 0, 0, ""
    first: dict[int, int] = {}  # code point -> where it occurs first
    ascii_seen, seen = b"", np.zeros(N_CODE_POINTS, dtype=bool)
    for piece in read_text(files, sha256):
        if piece.isascii():  # four times as fast as the general form
            content = piece.encode()
            if rest := content.translate(None, ascii_seen):
                ascii_seen += bytes(set(rest))
                for code in set(rest):
                    first.setdefault(code, n + content.index(code))
        else:
            codes = _code_points(piece).astype(np.intp)  # any other integer type is slow
            fresh = np.flatnonzero(~seen[codes])
            values, at = np.unique(codes[fresh], return_index=True)
            seen[values] = True
            for code, index in zip(values.tolist(), fresh[at].tolist(), strict=True):
                first.setdefault(code, n + index)
        if "\r" in piece or end == "\r":
            n_cr += piece.count("\r")
            n_crlf += piece.count("\r\n") + (end == "\r" and piece.startswith("\n"))
        n, end = n + len(piece), piece[-1:] or end
    order = sorted(first)
    where = [first[code] for code in order]
    return Text(files, sha256.hexdigest(), [chr(code) for code in order], where, n, n_crlf, n_cr - n_crlf)


# --- the cache ----------------------------------------------------------------------------------------


def _digest(values: Any) -> str:
    """Return the SHA-256 of values as JSON."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _read_cached(files: TextFiles) -> Text | None:
    """Return what the cache holds of a text; None if that is missing or damaged."""
    folder = _cache_folder(files)
    if not folder.is_dir():
        return None
    sha256 = hashlib.sha256()
    for i, path in enumerate(files.paths):
        for chunk in iter_bytes(path, keep_bom=i == 0):
            sha256.update(chunk)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads((folder / f"{sha256.hexdigest()}.json").read_text(encoding="utf-8"))
        if (about["format"], about["sha256"]) == (CACHE_FORMAT, _digest(about["found"])):
            return Text(files, sha256.hexdigest(), **about["found"])
    return None


def load_tokens(text: Text, tokenizer: Tokenizer) -> np.ndarray:
    """Return the tokens of a text, (n,) of the tokenizer's token_type, memory-mapped: cached or written now.

    Raises:
        Alg1Error: the text has changed since it was validated, or there is no space for its tokens.
    """
    key = f"{text.sha256}-{_digest(tokenizer.vocabulary)[:16]}"
    path, shape, dtype = text.cache / f"{key}.bin", (text.n_characters,), tokenizer.token_type()
    with contextlib.suppress(OSError), path.open("rb") as file:
        if (
            file.read(HEADER_BYTES)
            == hashlib.file_digest(file, lambda: hashlib.sha256(key.encode())).digest()
        ):
            LOGGER.debug("%s: using the tokens cached in %s", text.name, text.cache)
            _write_found(text)
            return np.memmap(path, dtype, "r", HEADER_BYTES, shape)
    try:
        text.cache.mkdir(exist_ok=True)
        with atomic_file(path) as descriptor:
            _write_tokens(text, tokenizer, descriptor, key)
        tokens = np.memmap(path, dtype, "r", HEADER_BYTES, shape)
    except (OSError, Alg1Error) as failure:  # the folder cannot be written, or its files cannot be mapped
        _tell_of_no_cache(text, failure)
        try:
            with tempfile.TemporaryFile() as file:
                _write_tokens(text, tokenizer, file.fileno(), key)
                return np.memmap(file, dtype, "r", HEADER_BYTES, shape)
        except OSError as error:
            raise disk_error(f"write the tokens of {text.name} to a temporary file", error) from error
    _write_found(text)
    return tokens


def _write_found(text: Text) -> None:
    """Write what `Text` holds to the cache, unless it is there; without it the next start reads the text."""
    found = {name: value for name, value in vars(text).items() if name not in ("files", "sha256")}
    about = {"format": CACHE_FORMAT, "text": text.name, "sha256": _digest(found), "found": found}
    path, content = text.cache / f"{text.sha256}.json", json.dumps(about).encode()
    try:
        if not path.exists() or path.read_bytes() != content:
            write_atomically(path, content)
    except (OSError, Alg1Error) as failure:
        _tell_of_no_cache(text, failure)


def _tell_of_no_cache(text: Text, failure: OSError | Alg1Error) -> None:
    """Warn that a text is not cached, unless its folder is read-only; raise any failure but the disk's."""
    error = failure.__cause__ if isinstance(failure, Alg1Error) else failure
    if not isinstance(error, OSError):
        raise failure
    line = f"{text.name} cannot be cached in {text.cache}: {error.strerror}; every start reads it anew"
    if error.errno in READ_ONLY:
        LOGGER.debug(line)
    else:
        LOGGER.warning("warning: %s", line)


def _write_tokens(text: Text, tokenizer: Tokenizer, descriptor: int, key: str) -> None:
    """Write the tokens of a text to a file, behind the SHA-256 of `key` and them.

    Raises:
        Alg1Error: the text has changed since it was validated.
    """
    table = tokenizer.lookup_table()
    ascii_table = table[:256].tobytes()  # for bytes.translate, if tokens are single bytes
    text_sha256, sha256 = hashlib.sha256(), hashlib.sha256(key.encode())
    write_all(descriptor, bytes(HEADER_BYTES))
    for piece in read_text(text.files, text_sha256):
        if piece.isascii() and table.itemsize == 1:
            tokens = memoryview(piece.encode().translate(ascii_table))
        else:
            tokens = table.take(_code_points(piece)).data.cast("B")
        sha256.update(tokens)
        write_all(descriptor, tokens)
    if text_sha256.hexdigest() != text.sha256:  # new characters would have no token in this vocabulary
        raise Alg1Error(f"{text.name}: it changed while it was read", "train on a copy of it")
    os.lseek(descriptor, 0, os.SEEK_SET)
    write_all(descriptor, sha256.digest())
