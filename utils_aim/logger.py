"""What training tells Aim, under the names that its pages group by."""

from __future__ import annotations

from typing import Any

from utils_aim.pictures import draw_embedding
from utils_aim.tracker import AimTracker
from utils_alg1.base.summaries import Embedding, Histogram, Image

# The name and the context that Aim's pages group by.
NAMES: dict[str, tuple[str, dict[str, str] | None]] = {
    "loss/train_step": ("loss", {"subset": "train_step"}),
    "loss/train": ("loss", {"subset": "train"}),
    "loss/val": ("loss", {"subset": "val"}),
    "learning_rate": ("learning_rate", None),
    "gradient_norm": ("gradient_norm", None),
    "tokens_per_second": ("tokens_per_second", None),
}


class AimLogger:
    """Tells an `AimTracker`, under those names, what a `Tracker` of utils_alg1.utils_metrics is told."""

    def __init__(self, aim: AimTracker, hparams: dict[str, Any], metadata: dict[str, Any]):
        self.aim = aim
        aim.track_config(hparams)
        for key, value in metadata.items():
            aim.track_metadata(key, value)

    @property
    def enabled(self) -> bool:
        return self.aim.enabled

    @property
    def identity(self) -> str | None:
        return self.aim.run_hash

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            name, context = NAMES[key]
            self.aim.track_metric(name, value, step, context)

    def log_histograms(self, histograms: list[Histogram], step: int) -> None:
        for h in histograms:
            self.aim.track_distribution(h.name, (h.counts, h.edges), step, {"kind": h.kind})

    def log_images(self, images: list[Image], step: int) -> None:
        for image in images:
            self.aim.track_image(image.name, image.pixels(), step, image.context)

    def log_texts(self, texts: dict[str, str], step: int) -> None:
        for name, text in texts.items():
            self.aim.track_text(name, text, step)

    def log_embedding(self, embedding: Embedding, step: int) -> None:
        if self.enabled:  # drawing takes a while
            self.aim.track_image(embedding.name, draw_embedding(embedding), step)

    def flush(self) -> None:
        """Aim writes at once."""

    def close(self) -> None:
        self.aim.close()
