"""Reading back what TensorBoard shows of a folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from utils_tensorboard.logger import TAGS


def last_steps(log_dir: Path) -> dict[str, int]:
    """Return the step of the last point of each curve in a folder of event files, by its metric's name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not log_dir.is_dir():
        return {}
    # How many of each tag are kept: all (0) of what a purge may cut back.
    sizes = {"scalars": 0, "histograms": 1, "images": 1, "tensors": 1}
    with _without_warnings():
        events = EventAccumulator(str(log_dir), size_guidance=sizes).Reload()
    curves = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    names = {tag: name for name, tag in TAGS.items()}
    return {names.get(tag, tag): points[-1].step for tag, points in curves.items() if points}


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence TensorBoard's warnings, such as that of steps that a resumed run has taken again."""
    logger = logging.getLogger("tensorboard")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
