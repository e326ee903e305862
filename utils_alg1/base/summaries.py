"""What trackers log, as plain numpy data, and the base class of all trackers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

# The kinds of data that a tracker can be given, and the type of each one's payload:
#   scalars      dict[str, float]: values by name, such as {"loss/val": 1.5}: a row of metrics.jsonl, and
#                "best_val_loss", the lowest "loss/val" so far, beside each "loss/val"
#   histograms   list[Histogram]: of parameters, gradients or activations
#   images       list[Image]
#   texts        dict[str, str]: texts by name
#   embedding    Embedding
Kind = Literal["scalars", "histograms", "images", "texts", "embedding"]

HISTOGRAM_BINS = 64


class Tracker:
    """Base class of trackers. This one discards everything; subclasses override what they need.

    Attributes:
        run_hash: the tracker's own name of the run, if it has one: a resumed run gets it back.
        first_step: it has the scalars of the steps before, and is given those of this step and later ones.
        remark: what the user should know of how it was opened.
    """

    run_hash: str | None = None
    first_step = 0
    remark = ""

    def log(self, kind: Kind, payload: Any, step: int) -> None:
        """Log data of a step, which is the number of updates done before.

        `kind` says what the payload is (see `Kind`). A tracker ignores the kinds that it does not handle.
        """

    def flush(self) -> None:
        """Make everything logged so far durable."""

    def close(self) -> None:
        """Flush, and release files and locks."""


@dataclass(frozen=True)
class Histogram:
    """The histogram of the finite values of a tensor."""

    name: str  # of the parameter or module
    kind: str  # "parameter", "gradient" or "activation"
    counts: np.ndarray  # (HISTOGRAM_BINS,) number of values in each bin
    edges: np.ndarray  # (HISTOGRAM_BINS + 1,) evenly spaced bin edges


@dataclass(frozen=True)
class Image:
    """A grid of matrices of weights, shown as one labelled greyscale image."""

    name: str
    weights: np.ndarray  # (rows, columns, T, T), each between 0 and 1
    row_name: str  # what a row of the grid is, such as "layer"
    column_name: str

    def pixels(self) -> np.ndarray:
        """Return the image, (H, W) uint8."""
        from utils_alg1.base.pictures import draw_grid

        return draw_grid(self.weights, self.row_name, self.column_name)


@dataclass(frozen=True)
class Embedding:
    """Vectors, with a label for each."""

    name: str
    vectors: np.ndarray  # (V, C) float32
    labels: list[str]  # without newlines and tabs


def compute_histograms(name: str, kind: str, tensor: Tensor | None) -> list[Histogram]:
    """Compute the histogram of a tensor of any shape: a list of it, or [] if it has no finite value."""
    import numpy as np

    values = np.empty(0) if tensor is None else tensor.detach().cpu().double().numpy()
    values = values[np.isfinite(values)]
    if not values.size:
        return []
    low, high = float(values.min()), float(values.max())
    if low == high:  # widen the range of a constant tensor, in proportion to its value
        width = max(abs(low), 1e-6) * 0.5
        low, high = low - width, high + width
    return [Histogram(name, kind, *np.histogram(values, bins=HISTOGRAM_BINS, range=(low, high)))]


def model_histograms(model: nn.Module) -> list[Histogram]:
    """Compute a histogram of each parameter and each gradient that has a finite value."""
    return [
        histogram
        for name, parameter in model.named_parameters()
        for kind, tensor in (("parameter", parameter), ("gradient", parameter.grad))
        for histogram in compute_histograms(name, kind, tensor)
    ]
