"""Tensor files: safetensors with metadata and a SHA-256.

A tensor file has one metadata string, JSON, with a description of the content and a SHA-256 of that and of
every tensor. safetensors itself has no checksum, so a flipped bit would go unnoticed. (It is a single string
because safetensors writes several in varying order, so that the same content would give different bytes.)

A file is read as numpy arrays, without PyTorch, which takes seconds to import; `read_tensors` gives tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils_alg1.base.errors import Alg1Error, first_line, unreadable
from utils_alg1.base.files import write_atomically
from utils_alg1.base.memory import memory_guard, out_of_memory
from utils_alg1.base.text import shell_join

if TYPE_CHECKING:
    import numpy as np
    import torch

METADATA_KEY = "alg1"
DTYPES = {  # of the format -> of numpy
    "F64": "float64", "F32": "float32", "F16": "float16", "BOOL": "bool", "U8": "uint8", "I8": "int8",
    "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32", "I64": "int64", "U64": "uint64",
}  # fmt: skip
FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # of the format -> of PyTorch
WHERE_WEIGHTS_ARE = (
    "the weights of a run are runs/RUN/artifacts/export/model.safetensors; inference.py --run RUN finds them"
)

# Converts a file of torch.save to safetensors, without running code that it may contain: the state dict of a
# model, also among other things in a dictionary. Tensors that share memory are copied.
CONVERSION = (
    "import sys, torch, safetensors.torch;"
    " file = torch.load(open(sys.argv[1], 'rb'), 'cpu', weights_only=True);"
    " parts = [part for part in (file, *file.values()) if isinstance(part, dict)];"
    " state = max(parts, key=lambda part: sum(map(torch.is_tensor, part.values())));"
    " state = {name: x.contiguous().clone() for name, x in state.items() if torch.is_tensor(x)};"
    " safetensors.torch.save_file(state, sys.argv[2])"
)


def _compact_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> str:
    """Compute the SHA-256 (hex) of the metadata and of every array's name, dtype, shape and bytes."""
    pieces: list[bytes | memoryview] = [_compact_json(metadata).encode()]
    for name, array in sorted(arrays.items()):
        pieces += [f"\0{name}\0torch.{array.dtype}\0{array.shape}\0".encode(), array.data]
    # Joined first: hundreds of short calls would take the interpreter lock from the training as often.
    return hashlib.sha256(b"".join(pieces)).hexdigest()


def write_tensors(path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    """Write a tensor file of float32 tensors atomically. The same content always gives the same bytes.

    They are the bytes of safetensors.numpy.save, which would copy every tensor three times and hold the
    interpreter lock meanwhile: the training would wait for the thread that writes a checkpoint.
    """
    arrays = {name: tensors[name].detach().cpu().contiguous().numpy() for name in sorted(tensors)}
    about = {"metadata": metadata, "sha256": digest(arrays, metadata)}
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: _compact_json(about)}}
    size = 0
    for name, array in arrays.items():
        assert array.dtype.name == "float32", f"{name} is {array.dtype}"
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": (size, size + array.nbytes)}
        size += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = [array.data for array in arrays.values()]
    write_atomically(path, b"".join([len(text).to_bytes(8, "little"), text, *data]))


def read_metadata(path: Path | str) -> dict[str, Any]:
    """Read the metadata of a tensor file without its tensors, so that the SHA-256 is not verified.

    Return {} if the file cannot be read, or was not written by `write_tensors`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            return dict(json.loads(file.metadata()[METADATA_KEY])["metadata"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def read_tensors(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Read a tensor file as PyTorch tensors; see `read_arrays`."""
    import torch

    arrays, metadata = read_arrays(path)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, metadata


def read_arrays(path: Path | str) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Read a tensor file and verify its SHA-256.

    Returns:
        the arrays by name, float32 in place of types that numpy does not have, and the metadata, which is
        None for a safetensors file of another program.

    Raises:
        Alg1Error: not found, not a safetensors file, truncated, or altered since it was written; or larger
            than the memory (exit code 3).
    """
    with memory_guard(f"while reading {path}"):
        return _read_arrays(Path(path))


def _read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    import numpy as np
    from safetensors import SafetensorError, safe_open

    refuse_pickle(path)
    try:
        with safe_open(str(path), framework="numpy"):  # checks the header and the size
            content = np.fromfile(path, np.uint8)
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:start].tobytes())
        strings = header.pop("__metadata__", None) or {}
        if unknown := {tensor["dtype"] for tensor in header.values()}.difference(DTYPES, FLOAT8, ["BF16"]):
            hint = "convert it to float32 with the program that wrote it"
            raise Alg1Error(f"{path}: its numbers are of the type {min(unknown)}, which is not known", hint)
        arrays = {name: _to_array(content[start:], **header[name]) for name in sorted(header)}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if out_of_memory(error):
            raise
        # Types and messages vary between releases of safetensors.
        hint = "it may be truncated or of another format; use another file"
        raise Alg1Error(f"{path}: not a whole safetensors file ({first_line(error)})", hint) from None
    if METADATA_KEY not in strings:
        return arrays, None
    try:
        about = json.loads(strings[METADATA_KEY])
        metadata = about["metadata"]
        intact = isinstance(metadata, dict) and about["sha256"] == digest(arrays, metadata)
    except (ValueError, TypeError, KeyError, RecursionError):
        intact = False
    if not intact:
        raise Alg1Error(f"{path}: damaged: its bytes do not match its SHA-256", "use another copy of it")
    return arrays, metadata


def refuse_pickle(path: Path) -> None:
    """Raise Alg1Error, with the command that converts it, for a file of torch.save, which is a pickle."""
    start = _first_bytes(path)
    if start.startswith(b"\x80\x02") or (start.startswith(b"PK") and b"/data.pkl" in start):
        converted = path.with_suffix(".safetensors")
        if converted.exists():
            converted = path.with_name(f"{path.name}.safetensors")
        command = f'python -c "{CONVERSION}" {shell_join([str(path), str(converted)])}'
        problem = f"{path}: this is a PyTorch pickle file (.pt), which could run code when it is read"
        raise Alg1Error(problem, f"convert it: {command}")


def _first_bytes(path: Path) -> bytes:
    """Return the first 512 bytes of a file; Alg1Error if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(512)
    except FileNotFoundError:
        if path.parts[0] in ("http:", "https:"):
            url = str(path).replace(":/", "://", 1)  # Path has merged the two slashes
            raise Alg1Error(f"{url}: must be a file on this machine", "download it first") from None
        raise Alg1Error(f"{path}: no such file", WHERE_WEIGHTS_ARE) from None
    except IsADirectoryError:
        raise Alg1Error(f"{path}: this is a folder, not a file of weights", WHERE_WEIGHTS_ARE) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _to_array(content: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    """Return a stored tensor as a view of the bytes of all, or as float32 if numpy lacks the dtype."""
    import numpy as np

    data = content[slice(*data_offsets)]
    if dtype in DTYPES:
        return np.require(data.view(DTYPES[dtype]).reshape(shape), requirements="A")
    if dtype == "BF16":  # the upper half of a float32
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    import torch

    stored = torch.from_numpy(data).view(getattr(torch, FLOAT8[dtype]))
    return stored.float().reshape(shape).numpy()
