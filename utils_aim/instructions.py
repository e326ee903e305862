"""How to look at runs in Aim."""

from __future__ import annotations

import shlex


def instructions(repo: str = "") -> tuple[str, str]:
    """Return the command to type, and a line with the address to open.

    `repo` is the folder of `.aim`, if it is not the current one.
    """
    command = f"aim up --repo={shlex.quote(repo)}" if repo else "aim up"
    return command, "then open http://localhost:43800"
