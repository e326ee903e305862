"""Where the scripts lie: the commands that name them, and the files that are shipped beside them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from utils_alg1.base.text import shell_quote

FOLDER = Path(__file__).resolve().parents[2]
SCRIPTS = ("train.py", "inference.py", "search.py", "compare.py")


def script(name: str) -> str:
    """Return the path of a script on a command line, in the folder that the running one was started from."""
    folder, running = os.path.split(sys.argv[0])
    return shell_quote(os.path.join(folder, name) if running in SCRIPTS else name)


def command(name: str) -> str:
    """Return the command that starts a script: `python train.py`, or `python /path/to/train.py`."""
    return f"python {script(name)}"


def shipped(path: str | Path) -> Path:
    """Return a path, or that in the folder of the scripts if it is there only, such as configs/laptop.

    A path with `..` means the current folder alone.
    """
    beside = FOLDER / path
    if os.pardir in Path(path).parts or os.path.lexists(path) or not beside.exists():
        return Path(path)
    return beside
