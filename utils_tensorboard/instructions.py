"""How to look at a run in TensorBoard."""

from __future__ import annotations

import shlex

from parameters import TensorBoardConfig


def launch_command(runs_dir: str = "runs", port: int = TensorBoardConfig.port) -> str:
    """The command that serves every run on this machine."""
    return f"tensorboard --logdir={shlex.quote(runs_dir)} --port={port}"


def instructions(runs_dir: str = "runs", port: int = TensorBoardConfig.port) -> tuple[str, str]:
    """What to type, and where to look then."""
    return launch_command(runs_dir, port), f"then open http://localhost:{port}"
