"""Parameters side by side in one tensor: what happens to each of them is one operator instead of fifty.

In a small model the calls take longer than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# One tensor as it is; one for each parameter; or the matrices of one shape as (N, R, C).
Form = Literal["joined", "each", "stacked"]
ALIGNMENT = 16  # elements: 64 bytes, as PyTorch aligns its tensors; the last digit of a product depends on it


class FlatParameters:
    """Makes parameters views of one tensor, and their gradients views of its gradient.

    Attributes:
        tensor: (n,), with zeros between the parameters.
        gradient: that of `tensor`, which it also has as `grad`.
        names: of the parameters, in their order.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.names = list(parameters)
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters.values()]
        with torch.no_grad():
            self.tensor = self.join(parameters)
        self.tensor.grad = self.gradient = torch.zeros_like(self.tensor)
        values, gradients = self.split(self.tensor), self.split(self.gradient)
        for name, p in parameters.items():
            p.data, p.grad = values[name], gradients[name]

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return tensors of the names and shapes of these parameters as a tensor like `tensor`."""
        parts = [tensors[name].reshape(-1) for name in self._shapes]
        return torch.cat([F.pad(t, (0, n - len(t))) for t, n in zip(parts, self._sizes, strict=True)])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the views of a tensor like `tensor` that belong to the parameters, by name.

        A scalar, such as the number of updates, belongs to each of them.
        """
        if not flat.dim():
            return dict.fromkeys(self.names, flat)
        parts = zip(self._shapes.items(), flat.split(self._sizes), strict=True)
        return {name: part[: shape.numel()].view(shape) for (name, shape), part in parts}

    def views(self, flat: Tensor, form: Form) -> list[Tensor]:
        """Return a tensor like `tensor` in a form that covers all parameters."""
        if form == "joined":
            return [flat]
        if form == "each":
            return list(self.split(flat).values())
        ((R, C),) = set(self._shapes.values())
        return [flat.view(len(self.names), -1)[:, : R * C].unflatten(1, (R, C))]
