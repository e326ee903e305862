"""How to look at a run in TensorBoard."""

from __future__ import annotations

from parameters import TensorBoardConfig
from utils_alg1.base.text import shell_quote


def address(port: int, host: str = "localhost") -> str:
    """Return the address of TensorBoard's first page, with the losses alone, not smoothed."""
    return f"http://{host}:{port}/?tagFilter=Loss&smoothing=0"


def instructions(runs_dir: str = "runs", port: int = TensorBoardConfig.port) -> tuple[str, str]:
    """Return the command to type, which shows all runs, and a line with the address to open."""
    return f"tensorboard --logdir={shell_quote(runs_dir)} --port={port}", f"then open {address(port)}"
