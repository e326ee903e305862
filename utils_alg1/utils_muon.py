"""Muon: an optimizer that gives every step of a matrix the same strength in all directions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

ITERATIONS = 5
# Of the iteration x -> a x + b x^3 + c x^5: five rounds take singular values that are not tiny to between 0.7
# and 1.2, and nearer is not needed (Jordan et al. 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ADAMW_RMS = 0.2  # how large an element of AdamW's steps is, in units of the learning rate


def orthogonalise(matrices: Tensor) -> Tensor:
    """About the nearest matrices whose singular values are all 1: (N, R, C) -> (N, R, C).

    By Newton-Schulz iteration, which takes products only and leaves the singular vectors as they are.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the products below are of the smaller side
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for the hidden matrices, AdamW for everything else; one learning rate serves both.

    A hidden matrix takes its Nesterov momentum, orthogonalised (Jordan et al. 2024, Muon: an optimizer for
    hidden layers in neural networks), and scaled so that its elements are about as large as those of AdamW's
    steps (Liu et al. 2025, Muon is scalable for LLM training). Weight decay is decoupled.

    Args:
        hidden: matrices (R, C); one of 3 C rows is three matrices on top of each other, as the fused query,
            key and value are.
        others: parameter groups for AdamW.
        lr: learning rate.
        betas: AdamW's; the first is also the momentum of the hidden matrices.
        weight_decay: of the hidden matrices.
    """

    def __init__(
        self,
        hidden: Iterable[Tensor],
        others: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ):
        group = {"params": list(hidden), "weight_decay": weight_decay}
        super().__init__([group], {"lr": lr, "momentum": betas[0]})
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, fused=True)
        self._adamw.state = self.state  # one state and one list of groups, as of any other optimizer
        self.param_groups += self._adamw.param_groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step from the gradients."""
        hidden = self.param_groups[0]
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in hidden["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for parameters in by_shape.values():
            self._step_together(parameters, hidden)
        self._adamw.step()

    def _step_together(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Take the step of matrices of one shape; together they make few and large products."""
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffers.append(state["momentum_buffer"])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        steps = torch.stack(gradients).lerp_(torch.stack(buffers), group["momentum"])  # (N, R, C)
        N, R, C = steps.shape
        if R == 3 * C:
            steps = steps.reshape(3 * N, C, C)
        scale = ADAMW_RMS * max(steps.shape[1:]) ** 0.5
        steps = orthogonalise(steps).reshape(N, R, C)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(steps.unbind()), alpha=-group["lr"] * scale)
