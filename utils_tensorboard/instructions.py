"""How to look at a run in TensorBoard."""

from __future__ import annotations

import shlex

from parameters import TensorBoardConfig


def address(port: int, host: str = "localhost") -> str:
    """Return the address of TensorBoard's first page, with the losses alone, not smoothed."""
    return f"http://{host}:{port}/?tagFilter=Loss&smoothing=0"


def instructions(runs_dir: str = "runs", port: int = TensorBoardConfig.port) -> tuple[str, str]:
    """Return the command to type, which shows all runs, and a line with the address to open."""
    return f"tensorboard --logdir={shlex.quote(runs_dir)} --port={port}", f"then open {address(port)}"
