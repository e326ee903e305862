"""Backward passes: they add the gradients of a micro-batch to those of the parameters."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from model import BigramLanguageModel
from utils_alg1.network.dropout import draw_masks
from utils_alg1.network.gradient import loss_and_gradients
from utils_alg1.training.arithmetic import Arithmetic
from utils_alg1.training.runtime import Compiled, Runtime

LOGGER = logging.getLogger("alg1")


class Backward:
    """Computes the gradients of a micro-batch by autograd: on any device, with any dtype and dropout.

    Args:
        forward: the model, or its compiled or DistributedDataParallel form.

    Attributes:
        scaler: the loss scaler; its state belongs to a checkpoint.
    """

    def __init__(self, forward: Callable, runtime: Runtime):
        self._forward, self._runtime = forward, runtime
        self.scaler = runtime.loss_scaler()

    @property
    def arithmetic(self) -> Arithmetic:
        """That of the runtime; not compiled if that failed."""
        compiled = isinstance(self._forward, Compiled) and not self._forward.failed
        return dataclasses.replace(self._runtime.arithmetic, compiled=compiled)

    def __call__(self, x: Tensor, y: Tensor, n_micro_batches: int, dropout_seed: int | None = None) -> Tensor:
        """Add the gradients of the mean loss divided by `n_micro_batches`, and return that quotient.

        Args:
            x, y: (B, T) int64 tokens and targets.
            n_micro_batches: how many of them make one step of this process.
            dropout_seed: decides what dropout drops; None for a model without dropout.
        """
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        with self._runtime.autocast():
            loss = self._forward(x, y)[1] / n_micro_batches
        self.scaler.scale(loss).backward()
        return loss.detach()


class ManualBackward(Backward):
    """Computes the same gradients, except for rounding, by the formulas of network/gradient.py.

    It is faster than autograd; `supports_manual_gradient` tells where it can be used.
    """

    def __init__(self, model: BigramLanguageModel, runtime: Runtime, say: Callable[[str], None]):
        function: Callable = loss_and_gradients
        if runtime.arithmetic.compiled:
            function = Compiled(function, say, {"cpp_wrapper": True})  # no Python between kernels
        super().__init__(function, runtime)
        self._config, self._products = model.config, runtime.arithmetic.products_of_gradient()
        self._weights = dict(model.named_parameters())

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor, n_micro_batches: int, dropout_seed: int | None = None) -> Tensor:
        B, T = x.shape
        masks = None if dropout_seed is None else draw_masks(self._config, B, T, dropout_seed)
        loss, gradients = self._forward(self._weights, self._config, x, y, self._products, masks)
        if n_micro_batches > 1:
            torch._foreach_div_(gradients, n_micro_batches)
        for parameter, gradient in zip(self._weights.values(), gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss / n_micro_batches


def create_backward(model: BigramLanguageModel, runtime: Runtime, say: Callable[[str], None]) -> Backward:
    """Return the backward pass of the runtime's arithmetic, compiled if that says so.

    Args:
        say: prints a line about compiling.
    """
    LOGGER.debug("arithmetic: %s", runtime.arithmetic)
    if runtime.arithmetic.gradient == "manual":
        return ManualBackward(model, runtime, say)
    forward: Callable = runtime.dist.wrap(model, runtime.device)
    return Backward(Compiled(forward, say) if runtime.arithmetic.compiled else forward, runtime)
