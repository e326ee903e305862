"""How to look at a run in TensorBoard."""

from __future__ import annotations

import shlex

from parameters import TensorBoardConfig


def launch_command(runs_dir: str = "runs", port: int = TensorBoardConfig.port) -> str:
    """Return the command that starts TensorBoard with all runs."""
    return f"tensorboard --logdir={shlex.quote(runs_dir)} --port={port}"


def instructions(runs_dir: str = "runs", port: int = TensorBoardConfig.port) -> tuple[str, str]:
    """Return the command to type, and a line with the address to open."""
    return launch_command(runs_dir, port), f"then open http://localhost:{port}"
