"""How to look at runs in Aim."""

from __future__ import annotations

LAUNCH_COMMAND = "aim up"
FOLDER = ".aim"  # Aim's name for its repository
PORT = 43800  # Aim's own default


def instructions() -> str:
    """One line: what to type and where to look."""
    return f"{LAUNCH_COMMAND}   then open http://localhost:{PORT}"
