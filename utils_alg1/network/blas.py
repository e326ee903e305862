"""The number of threads of numpy's matrix products, where numpy comes with OpenBLAS."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

import numpy as np

ONE_THREAD_FLOPS = 1e10  # below this, several threads gain little, and on busy cores they wait for each other


@functools.cache
def thread_functions() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """Return the functions of OpenBLAS that get and set its number of threads, or None without OpenBLAS."""
    core = getattr(np, "_core", None) or np.core  # as numpy 1 called it
    try:
        library = ctypes.CDLL(core._multiarray_umath.__file__)  # finds the functions of what it is linked to
    except (OSError, AttributeError):
        return None
    for pattern in ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}"):
        with contextlib.suppress(AttributeError):
            found = [getattr(library, pattern.format(f"{verb}_num_threads")) for verb in ("get", "set")]
            return found[0], found[1]
    return None


@contextlib.contextmanager
def limit_threads(flops: float) -> Iterator[None]:
    """Use one thread if there is little to compute: several would mostly wait for each other."""
    functions = thread_functions() if flops < ONE_THREAD_FLOPS else None
    if functions is None:
        yield
        return
    get, set_ = functions
    threads = get()
    set_(1)
    try:
        yield
    finally:
        set_(threads)
