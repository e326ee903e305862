"""Running out of memory, as PyTorch, drivers and the system tell of it: one line and exit code 3."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator

from utils_alg1.base.errors import CANNOT_TRAIN, OTHER_PROGRAMS, Alg1Error

# What PyTorch and safetensors say of too little memory, where they have no type for it. A library that cannot
# even start on a GPU, because another program holds its memory, says NOT_INITIALIZED.
BUSY_DEVICE = re.compile(r"CUDA-capable device(\(s\) is/are|s are) busy")
HOST_MEMORY = re.compile(r"can't allocate memory|not enough memory|bad_alloc|os error 12\b")
DEVICE_MEMORY = re.compile(
    r"(?i:out of memory)|[A-Z]+_STATUS_(?:ALLOC_FAILED|NOT_INITIALIZED)"  # CUDA, HIP, MPS, XPU, libraries
    r"|OUT_OF_(?:HOST_MEMORY|DEVICE_MEMORY|RESOURCES)|Invalid buffer size"  # the drivers of XPU and MPS
)
OTHERS_ON_DEVICE = "if other programs hold the memory of the GPU, end them or use --device cpu"


def out_of_memory(error: Exception, where: str = "", hint: str | None = None) -> Alg1Error | None:
    """Return the Alg1Error (exit code 3) for an exception that tells of too little memory; None for another.

    Args:
        where: in what, for the message.
        hint: what needs less memory. For a GPU, the hint also names the other programs on it.
    """
    if isinstance(error, Alg1Error):
        return None
    if BUSY_DEVICE.search(str(error)):
        message = "another program uses the GPU, and does not share it"
        return Alg1Error(message, "use --device cpu, or end that program", CANNOT_TRAIN)
    message = f"out of memory {where}".rstrip()
    status = _device_status(error)
    if status is not None:
        hints = filter(None, (hint, OTHERS_ON_DEVICE))
        return Alg1Error(f"{message} {status}".rstrip(), "; or ".join(hints), CANNOT_TRAIN)
    if _is_of_host(error):
        return Alg1Error(message, hint or OTHER_PROGRAMS, CANNOT_TRAIN)
    return None


def _device_status(error: Exception) -> str | None:
    """Return the status in parentheses, or "", if the memory of a device is too small; else None."""
    found = DEVICE_MEMORY.search(str(error)) if isinstance(error, RuntimeError) else None
    if found:
        return f"({found[0]})" if found[0].isupper() else ""
    return "" if type(error).__name__ == "OutOfMemoryError" else None  # PyTorch's, which is not imported here


def _is_of_host(error: Exception) -> bool:
    """Return whether an exception says that the memory of the machine is too small."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, MemoryError) or HOST_MEMORY.search(str(error)) is not None


@contextlib.contextmanager
def memory_guard(where: str, find_hint: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn running out of memory into an Alg1Error; see `out_of_memory`."""
    try:
        yield
    except Exception as error:
        failure = out_of_memory(error, where, find_hint and find_hint())
        if failure is None:
            raise
        raise failure from error
