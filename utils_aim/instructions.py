"""How to look at runs in Aim."""

from __future__ import annotations

LAUNCH_COMMAND = "aim up"
FOLDER = ".aim"  # Aim's name for its repository
PORT = 43800  # Aim's own default


def instructions() -> tuple[str, str]:
    """Return the command to type, and a line with the address to open."""
    return LAUNCH_COMMAND, f"then open http://localhost:{PORT}"
