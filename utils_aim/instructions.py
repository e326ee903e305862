"""How to look at runs in Aim."""

from __future__ import annotations


def instructions() -> tuple[str, str]:
    """Return the command to type, and a line with the address to open."""
    return "aim up", "then open http://localhost:43800"
