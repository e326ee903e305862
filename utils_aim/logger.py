"""Logs a run to Aim: each kind of data under the name and context that Aim's pages group by."""

from __future__ import annotations

from typing import Any

from utils_aim.pictures import draw_embedding
from utils_aim.tracker import AimTracker
from utils_alg1.base.summaries import Kind, Tracker

# Name and context in Aim. A scalar that is not listed keeps its own name and has no context.
NAMES: dict[str, tuple[str, dict[str, str] | None]] = {
    "loss/train_step": ("loss", {"subset": "train_step"}),
    "loss/train": ("loss", {"subset": "train"}),
    "loss/val": ("loss", {"subset": "val"}),
}


class AimLogger(Tracker):
    """Logs through an `AimTracker`, and keeps the run's parameters and metadata there."""

    def __init__(self, aim: AimTracker, hparams: dict[str, Any], metadata: dict[str, Any]):
        self.aim = aim
        aim.track_config(hparams)
        for key, value in metadata.items():
            aim.track_metadata(key, value)

    @property
    def identity(self) -> str | None:
        """The run's hash in Aim."""
        return self.aim.run_hash

    def log(self, kind: Kind, payload: Any, step: int) -> None:
        match kind:
            case "scalars":
                for key, value in payload.items():
                    name, context = NAMES.get(key, (key, None))
                    self.aim.track_metric(name, value, step, context)
            case "histograms":
                for h in payload:
                    self.aim.track_distribution(h.name, (h.counts, h.edges), step, {"kind": h.kind})
            case "images":
                for image in payload:
                    self.aim.track_image(image.name, image.pixels(), step, image.context)
            case "texts":
                for name, text in payload.items():
                    self.aim.track_text(name, text, step)
            case "embedding":
                if self.aim.enabled:  # drawing takes a while
                    self.aim.track_image(payload.name, draw_embedding(payload), step)

    def close(self) -> None:  # there is nothing to flush: Aim writes at once
        self.aim.close()
