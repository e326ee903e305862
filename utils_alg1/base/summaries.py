"""What trackers are shown beside scalars: plain numpy data that knows neither the loop nor a tracker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn

HISTOGRAM_BINS = 64
PICTURE_SIZE = 256  # pixels along a side, about


@dataclass(frozen=True)
class Histogram:
    """The distribution of a tensor's finite values.

    Attributes:
        name: of the parameter or module.
        kind: "parameter", "gradient" or "activation".
        counts: (HISTOGRAM_BINS,) how many values lie between two edges.
        edges: (HISTOGRAM_BINS + 1,), evenly spaced.
    """

    name: str
    kind: str
    counts: np.ndarray
    edges: np.ndarray


@dataclass(frozen=True)
class Image:
    """A matrix of weights as a grey picture.

    Attributes:
        name: what it shows.
        context: which of that name, such as {"layer": "0", "head": "0"}.
        weights: (H, W), each between 0 and 1.
    """

    name: str
    context: dict[str, str]
    weights: np.ndarray

    def pixels(self, size: int = PICTURE_SIZE) -> np.ndarray:
        """uint8, a whole number of pixels for a weight along each side, `size` of them or fewer in all.

        More weights than that have a pixel each. The brightness is the root of the weight: of many small
        weights one would see nothing otherwise.
        """
        grey = np.rint(255 * np.sqrt(np.nan_to_num(self.weights))).astype(np.uint8)
        factor = max(1, size // max(grey.shape))
        return grey.repeat(factor, axis=0).repeat(factor, axis=1)


@dataclass(frozen=True)
class Embedding:
    """Vectors with a label each.

    Attributes:
        name: what they are.
        vectors: (V, C) float32.
        labels: V of them, on one line and without a tab.
    """

    name: str
    vectors: np.ndarray
    labels: list[str]


def count_values(name: str, kind: str, tensor: Tensor) -> Histogram | None:
    """The histogram of a tensor of any shape; None where no value of it is finite."""
    values = tensor.detach().float().cpu().numpy().ravel()
    values = values[np.isfinite(values)].astype(np.float64)
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    if low == high:  # give a single value some width, in proportion
        width = max(abs(low), 1e-6) * 0.5
        low, high = low - width, high + width
    counts, edges = np.histogram(values, bins=HISTOGRAM_BINS, range=(low, high))
    return Histogram(name, kind, counts, edges)


def model_histograms(model: nn.Module) -> Iterator[Histogram]:
    """A histogram of each parameter, and of its gradient where it has one with a finite value in it."""
    for name, parameter in model.named_parameters():
        tensors = {"parameter": parameter, "gradient": parameter.grad}
        for kind, tensor in tensors.items():
            histogram = count_values(name, kind, tensor) if tensor is not None else None
            if histogram is not None:
                yield histogram
