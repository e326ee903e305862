"""Files that are either whole or not there: atomic writes, and tensor files that prove their own bytes; and
the JSON and text files that people write, read with what is wrong in them.

A tensor file is a safetensors file with one metadata string: JSON that says what the file holds, and a
SHA-256 over that and over every tensor. safetensors itself has no checksum: without ours, a flipped bit
would load in silence. (One string, because safetensors writes several in an order that changes.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from errors import Alg1Error, disk_error, first_line, unreadable

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
LOGGER = logging.getLogger("alg1")
METADATA_KEY = "alg1"
TEMPORARY_SUFFIX = ".tmp"
WHERE_WEIGHTS_ARE = (
    "the weights of a run are runs/RUN/artifacts/export/model.safetensors; inference.py --run RUN finds them"
)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is safe only once its folder is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[int]:
    """A file descriptor to write to; `path` appears, whole and durable, only when the block ends well.

    The bytes go to an exclusive temporary file in the same folder, are fsynced, renamed, and the folder
    is fsynced. When anything fails the temporary file is removed and `path` stays as it was.

    Raises:
        Alg1Error: the file system refused (exit code 4).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process that had our number
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                yield descriptor
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
        LOGGER.debug("wrote %s", path)
    except OSError as error:
        raise disk_error(f"write {path}", error) from error


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write every byte: the system may take fewer than it is offered."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_atomically(path: Path | str, data: bytes) -> None:
    """Write `data` to `path` so that a crash leaves the old content or the new, never a mixture."""
    with atomic_file(Path(path)) as descriptor:
        write_all(descriptor, data)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode("utf-8", "surrogatepass"))


def try_to_write(
    path: Path, write: Callable[[Path], T], failure: str, warn: Callable[[str], None]
) -> T | None:
    """Let `write` make a file that a finished run can do without; returns what it returns.

    A failure costs one line, `failure` with the reason, and gives None. No older file stays then: it would
    tell of another result.
    """
    try:
        path.unlink(missing_ok=True)
        return write(path)
    except Exception as error:  # what draws and describes fails in many ways, and the results lie elsewhere
        warn(f"{failure}: {first_line(error)}")
        return None


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed processes left half-written in `folder`. The caller holds the folder's lock."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):
            path.unlink()


# --- files that people write ----------------------------------------------------------------------------

JSON_EXAMPLE = '{"batch_size": 8, "n_embd": 128}'
JSON_HINT = f"as in {JSON_EXAMPLE}: double quotes, no comment, no comma behind the last value"


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        Alg1Error: it is not there, not UTF-8, not JSON, not an object, or names a key twice.
    """
    return parse_json_object(read_bytes(path), path)


def parse_json_object(data: bytes, path: str | Path) -> dict[str, Any]:
    """The object that the bytes of a JSON file hold; raises as `read_json_object` does."""

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        refuse_repeats(path, [name for name, _ in pairs])
        return dict(pairs)

    text = decode(data, path)
    try:
        value = json.loads(text, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Alg1Error(f"{path}: {where}: not JSON: {error.msg}", JSON_HINT) from None
    except RecursionError:
        raise Alg1Error(f"{path}: nested too deeply", "leave out the inner brackets") from None
    except ValueError:
        raise Alg1Error(f"{path}: a number in it has too many digits", "shorten it") from None
    if not isinstance(value, dict):
        raise Alg1Error(f"{path}: must hold one JSON object of names and values", f"such as {JSON_EXAMPLE}")
    return value


def refuse_repeats(path: str | Path, names: Iterable[str]) -> None:
    """Raise Alg1Error when a file says a name twice: one of the two values would be lost in silence."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise Alg1Error(f"{path}: {name!r} stands there twice", "keep one of them")
        seen.add(name)


def read_text(path: str | Path) -> str:
    """Read a small UTF-8 file (a BOM is dropped).

    Raises:
        Alg1Error: it is not there, cannot be read or is not UTF-8.
    """
    return decode(read_bytes(path), path)


def read_bytes(path: str | Path) -> bytes:
    """Read a small file that a user has named.

    Raises:
        Alg1Error: it is not there, or cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise Alg1Error(f"{path}: no such file", "check its path") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:  # a null character in the name
        raise Alg1Error(f"{path!r}: not a file name: {error}", "check its path") from None


def decode(data: bytes, path: str | Path) -> str:
    """The text of a UTF-8 file's bytes (a BOM is dropped). Raises Alg1Error naming the first bad byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Alg1Error(f"{path}: not UTF-8 at byte {error.start}", "save it as UTF-8") from None


# --- tensor files -------------------------------------------------------------------------------------


def _tensor_bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)  # a 0-dimensional tensor has no byte view
    return flat.view(torch.uint8).numpy().data


def _compact_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over the metadata and over each tensor's name, type, shape and bytes, by name."""
    sha = hashlib.sha256(_compact_json(metadata).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(_tensor_bytes(tensor))
    return sha.hexdigest()


def write_tensors(path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write a tensor file atomically. The same tensors and metadata always give the same bytes.

    The tensors are of types that numpy has too, whose arrays safetensors takes sooner.
    """
    from safetensors.numpy import save

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"metadata": metadata, "sha256": digest(ready, metadata)}
    arrays = {name: tensor.numpy() for name, tensor in ready.items()}
    write_atomically(path, save(arrays, {METADATA_KEY: _compact_json(about)}))


def read_metadata(path: Path | str) -> dict[str, Any]:
    """The metadata of a tensor file of ours, without its tensors and so unverified.

    Raises:
        Alg1Error: it cannot be read, or is no tensor file of ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = json.loads(file.metadata()[METADATA_KEY])["metadata"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Alg1Error(f"{path}: no metadata of ours: {first_line(error)}", WHERE_WEIGHTS_ARE) from None
    if not isinstance(metadata, dict):
        raise Alg1Error(f"{path}: its metadata are no names and values", WHERE_WEIGHTS_ARE)
    return metadata


def read_tensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Read and verify a tensor file: its tensors, and our metadata or None for a file of another program.

    Raises:
        Alg1Error: not there, not a safetensors file, truncated, or altered since it was written.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    try:
        with path.open("rb") as file:
            magic = file.read(2)
    except FileNotFoundError:
        if path.parts[0] in ("http:", "https:"):
            url = str(path).replace(":/", "://", 1)  # a path has lost the second one
            raise Alg1Error(f"{url}: must be a file on this machine", "download it first") from None
        raise Alg1Error(f"{path}: no such file", WHERE_WEIGHTS_ARE) from None
    except IsADirectoryError:
        raise Alg1Error(f"{path}: this is a folder, not a file of weights", WHERE_WEIGHTS_ARE) from None
    except OSError as error:
        raise unreadable(path, error) from None
    if magic in (b"PK", b"\x80\x02"):
        raise Alg1Error(
            f"{path}: this is a PyTorch pickle file (.pt), which could run code when it is read",
            "convert it to safetensors with the program that wrote it",
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            strings = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # The texts of these change between releases; only that the file cannot be used is certain.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Alg1Error(
            f"{path}: not a whole safetensors file ({reason})",
            "it may be truncated or of another format; use another file",
        ) from None
    if METADATA_KEY not in strings:
        return tensors, None
    try:
        about = json.loads(strings[METADATA_KEY])
        metadata = about["metadata"]
        genuine = isinstance(metadata, dict) and about["sha256"] == digest(tensors, metadata)
    except (ValueError, TypeError, KeyError, RecursionError):
        genuine = False
    if not genuine:
        raise Alg1Error(f"{path}: damaged: its bytes do not match its SHA-256", "use another copy of it")
    return tensors, metadata
