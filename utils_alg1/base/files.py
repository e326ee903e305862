"""Atomic writing of files, and reading of JSON and text files with errors that name the fault."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from utils_alg1.base.errors import Alg1Error, disk_error, first_line, unreadable

LOGGER = logging.getLogger("alg1")
TEMPORARY_SUFFIX = ".tmp"
# What file systems answer to an operation that they lack, such as fsync of a folder or a lock. The last
# two are one number on Linux, and two on macOS.
NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[int]:
    """Yield a file descriptor whose content replaces `path` atomically when the block ends without error.

    The content is written to an exclusive temporary file in the same folder, fsynced and renamed; then the
    folder is fsynced. On any failure the temporary file is removed and `path` is left unchanged; an error of
    the file system is raised as Alg1Error (exit code 4).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process that had the same process ID
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
        sync_folder(path.parent)
        LOGGER.debug("wrote %s", path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_error(f"write {path}", error) from error
        raise


def sync_folder(path: Path) -> None:
    """Fsync a folder; a file system that cannot do that costs one warning. Raises OSError if it fails."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)  # a renamed file survives a power loss only after this
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        _warn_of_power_loss(error.strerror)
    finally:
        os.close(folder)


@functools.cache
def _warn_of_power_loss(reason: str) -> None:
    """Print the warning once."""
    LOGGER.warning(
        "warning: the file system cannot fsync folders (%s): a power loss may undo the newest files", reason
    )


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all bytes; `os.write` may write only a part of them at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_atomically(path: Path | str, data: bytes) -> None:
    """Write `data` to `path`; after a crash the file holds either the old content or the new."""
    with atomic_file(Path(path)) as descriptor:
        write_all(descriptor, data)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def write_or_warn(path: Path, write: Callable[[Path], object], warn: Callable[[str], None]) -> None:
    """Create an optional file with `write(path)`; any failure is a warning, and no older file remains."""
    try:
        path.unlink(missing_ok=True)
        write(path)
    except Exception as error:  # plotting libraries raise many types
        warn(f"{path} was not written: {first_line(error)}")


def check_target(flag: str, name: str, kind: str, is_kind: Callable[[Path], bool]) -> None:
    """Check that a file which a flag names can be written, and that this replaces nothing but such a file.

    Args:
        kind: what is to be written, with its article.
        is_kind: whether a file is of this kind, which alone is overwritten.

    Raises:
        Alg1Error: it cannot (exit code 4 if the file system refuses).
    """
    path = Path(name).absolute()
    if name == "-":
        raise Alg1Error(f"{flag} -: {kind} is not written to standard output", "name a file")
    if not path.parent.is_dir():
        raise Alg1Error(f"{flag} {name}: there is no folder {Path(name).parent}", "create it")
    if path.is_dir():
        raise Alg1Error(f"{flag} {name}: this is a folder", "name a file in it")
    if path.exists() and not is_kind(path):
        hint = f"name another file: {kind} would take its place"
        raise Alg1Error(f"{flag} {name}: this file is not {kind}", hint)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise disk_error(f"write {flag} {name}", error) from error


def make_folder(path: Path) -> None:
    """Create a folder and its parents where they do not exist; raises Alg1Error where it cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise Alg1Error(f"{path}: a file is in the way of this folder", "name another") from None
        raise disk_error(f"create {path}", error) from error


def remove_temporary_files(folder: Path) -> None:
    """Remove temporary files that killed processes left in `folder`. The caller holds the folder's lock."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):
            path.unlink()


JSON_EXAMPLE = '{"batch_size": 8, "n_embd": 128}'
JSON_HINT = f"as in {JSON_EXAMPLE}: double quotes, no comment, no comma behind the last value"


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds one object; raises Alg1Error if it does not, or repeats a key."""
    return parse_json_object(read_bytes(path), path)


def parse_json_object(data: bytes, path: str | Path) -> dict[str, Any]:
    """Parse the content of such a file, which was read from `path`."""

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        refuse_repeats(path, [name for name, _ in pairs])
        return dict(pairs)

    try:
        value = json.loads(decode(data, path), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # not JSON, or a number or a nesting that is too long
        raise Alg1Error(f"{path}: not JSON: {error}", JSON_HINT) from None
    if not isinstance(value, dict):
        raise Alg1Error(f"{path}: must hold one JSON object of names and values", f"such as {JSON_EXAMPLE}")
    return value


def refuse_repeats(path: str | Path, names: Iterable[str]) -> None:
    """Raise Alg1Error if a file defines a name twice: one of the two values would be dropped silently."""
    for name, count in Counter(names).items():
        if count > 1:
            raise Alg1Error(f"{path}: {name!r} stands there twice", "keep one of them")


def read_bytes(path: str | Path) -> bytes:
    """Read a small file named by the user; raises Alg1Error if it does not exist or cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise Alg1Error(f"{path}: no such file", "check its path") from None
    except OSError as error:
        raise unreadable(path, error) from None


def decode(data: bytes, path: str | Path) -> str:
    """Decode UTF-8 and drop a byte order mark; raises Alg1Error naming the file and the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Alg1Error(f"{path}: not UTF-8 at byte {error.start}", "save it as UTF-8") from None
