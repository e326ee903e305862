"""The files of a text, and their bytes: plain or gzip."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from utils_alg1.base.errors import Alg1Error, unreadable

CHUNK_BYTES = 1 << 17  # bytes read at a time: what is made of them stays in the processor's cache
BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"  # the first bytes of a gzip file; no UTF-8 text begins with them


@dataclass(frozen=True)
class TextFiles:
    """The files of a text, in the order in which they are read, as if they were one file."""

    name: str  # as a person named them: a file, a folder or a pattern
    paths: tuple[Path, ...]

    @property
    def within(self) -> str | None:
        """What was named if that is not the one file itself: a folder or a pattern."""
        return None if self.name == str(self.paths[0]) else self.name

    @classmethod
    def of(cls, text: TextFiles | Path | str) -> TextFiles:
        """Return `text`, or the one file that it names."""
        return text if isinstance(text, TextFiles) else cls(str(text), (Path(text),))


STANDARD_INPUT = "the standard input"  # what messages call a stream


@contextlib.contextmanager
def open_bytes(source: Path | BufferedReader) -> Iterator[Any]:
    """Open a file, or a stream that stays open, as a stream of bytes, which are unpacked if it is gzip.

    Raises:
        Alg1Error: it cannot be read, or is damaged gzip.
    """
    name = source if isinstance(source, Path) else STANDARD_INPUT
    try:
        with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
            packed = file.peek(len(GZIP)).startswith(GZIP)  # a pipe cannot be read from the start again
            with gzip.GzipFile(fileobj=file) if packed else contextlib.nullcontext(file) as stream:
                yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise Alg1Error(f"{name}: damaged gzip: {error}", "get it again, whole") from None
    except OSError as error:
        raise unreadable(name, error) from None


def iter_bytes(source: Path | BufferedReader, keep_bom: bool = True) -> Iterator[bytes]:
    """Yield the bytes of a file or stream in pieces, unpacked, with or without its byte order mark."""
    with open_bytes(source) as stream:
        if not keep_bom and (head := stream.read(len(BOM))) != BOM:
            yield head
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk
