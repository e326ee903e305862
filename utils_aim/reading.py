"""Reading back what Aim has of a run."""

from __future__ import annotations

import contextlib
from pathlib import Path

from utils_aim.tracker import NAMES, PARAMETERS


def last_steps(repo: Path, run_hash: str) -> dict[str, int]:
    """Return the step of the last point of each curve of a run in Aim, by its metric's name.

    A scalar of PARAMETERS, which is no curve, has the step of the last `loss/val`. There is nothing if Aim
    lacks the run or cannot be read: opening it to write tells why.
    """
    names = {(name, *(context or {}).items()): key for key, (name, context) in NAMES.items()}
    steps: dict[str, int] = {}
    with contextlib.suppress(Exception):
        import aim

        run = aim.Run(run_hash, repo=str(repo), read_only=True)
        for metric in run.metrics():
            key = names.get((metric.name, *metric.context.to_dict().items()), metric.name)
            steps[key] = int(max(metric.data.indices_list()))
        if "loss/val" in steps:
            steps |= {key: steps["loss/val"] for key in PARAMETERS if run.get(key) is not None}
    return steps
