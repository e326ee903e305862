"""Importing matplotlib without a word, also for an account that has no folder for its caches."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@functools.cache
def import_matplotlib() -> None:
    """Import matplotlib; raises ImportError if it is not installed. Call it before importing from it.

    It warns where it cannot keep its list of fonts, and leaves a temporary folder behind if the process ends
    without Python's exit hooks. Here that folder lasts as long as the import.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with contextlib.nullcontext() if _has_folders() else _temporary_folder():
        import matplotlib.font_manager  # noqa: F401


def _has_folders() -> bool:
    """Return whether matplotlib finds folders for settings and caches that it can write."""
    if folder := os.environ.get("MPLCONFIGDIR"):
        return _can_write(Path(folder))
    with contextlib.suppress(RuntimeError):  # the account has no home
        home = Path.home()
        if not sys.platform.startswith("linux"):
            return _can_write(home / ".matplotlib")
        config = os.environ.get("XDG_CONFIG_HOME") or home / ".config"
        cache = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
        return all(_can_write(Path(folder, "matplotlib")) for folder in (config, cache))
    return False


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@contextlib.contextmanager
def _temporary_folder() -> Iterator[None]:
    """Let matplotlib use a temporary folder until the end of the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        before = os.environ.get("MPLCONFIGDIR")
        os.environ["MPLCONFIGDIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("MPLCONFIGDIR")
            if before is not None:
                os.environ["MPLCONFIGDIR"] = before
