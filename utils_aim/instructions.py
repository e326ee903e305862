"""How to look at runs in Aim."""

from __future__ import annotations

import base64
import json
from typing import Any

from utils_alg1.base.text import shell_quote

# What Aim's Metrics explorer is to show, in the form of its addresses: train and val loss, a colour for each
# run, and solid or dashed lines.
QUERY = {"query": "metric.name=='loss' and metric.context.subset!='train_step'"}
GROUPING = {"color": ["run.props.name"], "stroke": ["context.subset"]}


def address(host: str = "localhost", port: int = 43800) -> str:
    """Return the address of the train and val losses of all runs in Aim."""
    return f"http://{host}:{port}/metrics?grouping={_encoded(GROUPING)}&select={_encoded(QUERY)}"


def _encoded(value: Any) -> str:
    """Encode a value as Aim's explorers do: JSON, in base64 without padding, after a mark."""
    text = json.dumps(value, separators=(",", ":"))
    return "O-" + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def instructions(repo: str = "") -> tuple[str, str]:
    """Return the command to type, and a line with the address to open.

    `repo` is the folder of `.aim`, if it is not the current one.
    """
    command = f"aim up --repo={shell_quote(repo)}" if repo else "aim up"
    return command, f"then open {address()}"
