"""What training tells TensorBoard, under the tags that people look for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from utils_tensorboard.writer import TensorBoardWriter

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

HISTOGRAM_BINS = 64
HISTOGRAM_TAGS = {"parameter": "Parameters", "gradient": "Gradients"}


@dataclass(frozen=True)
class Histogram:
    """The distribution of a tensor's finite values.

    Attributes:
        name: of the parameter.
        kind: "parameter" or "gradient".
        counts: (HISTOGRAM_BINS,) how many values lie between two edges.
        edges: (HISTOGRAM_BINS + 1,), evenly spaced.
    """

    name: str
    kind: str
    counts: np.ndarray
    edges: np.ndarray


def model_histograms(model: nn.Module) -> Iterator[Histogram]:
    """A histogram of each parameter, and of its gradient where it has one with a finite value in it."""
    import numpy as np

    for name, parameter in model.named_parameters():
        tensors = {"parameter": parameter.detach(), "gradient": parameter.grad}
        for kind, tensor in tensors.items():
            if tensor is None:
                continue
            values = tensor.float().cpu().numpy().ravel()
            values = values[np.isfinite(values)].astype(np.float64)
            if not values.size:
                continue
            low, high = float(values.min()), float(values.max())
            if low == high:  # give a single value some width, in proportion
                width = max(abs(low), 1e-6) * 0.5
                low, high = low - width, high + width
            counts, edges = np.histogram(values, bins=HISTOGRAM_BINS, range=(low, high))
            yield Histogram(name, kind, counts, edges)


class MetricLogger:
    """Logs the metrics of training through a `TensorBoardWriter`."""

    def __init__(self, writer: TensorBoardWriter):
        self.writer = writer

    @property
    def enabled(self) -> bool:
        """Whether points are still being written."""
        return self.writer.enabled

    def log_training_loss(self, loss: float, step: int) -> None:
        """The loss of one training step."""
        self.writer.add_scalar("Loss/train_step", loss, step)

    def log_evaluation_metrics(self, train_loss: float, val_loss: float, lr: float, step: int) -> None:
        """The mean losses of an evaluation, and the learning rate."""
        self.writer.add_scalar("Loss/train", train_loss, step)
        self.writer.add_scalar("Loss/val", val_loss, step)
        self.writer.add_scalar("Learning_Rate", lr, step)

    def log_histograms(self, histograms: Iterable[Histogram], step: int) -> None:
        """Histograms that are already counted."""
        for h in histograms:
            tag = f"{HISTOGRAM_TAGS[h.kind]}/{h.name}"
            self.writer.add_histogram(tag, h.counts, h.edges, step)

    def log_model_histograms(self, model: nn.Module, step: int) -> None:
        """A histogram of each parameter and each gradient."""
        self.log_histograms(model_histograms(model), step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
