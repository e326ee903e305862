"""Backward passes: they compute the gradients of a micro-batch into those of the parameters."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model import BigramLanguageModel
from utils_alg1.network.dropout import draw_masks
from utils_alg1.network.gradient import loss_and_gradients
from utils_alg1.training.arithmetic import Arithmetic
from utils_alg1.training.flat import FlatParameters
from utils_alg1.training.runtime import Compiled, Runtime

LOGGER = logging.getLogger("alg1")

Flats = Sequence[FlatParameters]  # those of the optimizer: all parameters of the model


class Backward:
    """Computes the gradients of a micro-batch by autograd: on any device, with any dtype and dropout.

    Args:
        forward: the model, or its compiled or DistributedDataParallel form.
        flats: its parameters, whose gradients are computed.

    Attributes:
        scaler: the loss scaler; its state belongs to a checkpoint.
    """

    def __init__(self, forward: Callable, flats: Flats, runtime: Runtime):
        self._forward, self._runtime = forward, runtime
        self._gradients = [flat.gradient for flat in flats]
        self.scaler = runtime.loss_scaler()

    @property
    def arithmetic(self) -> Arithmetic:
        """That of the runtime; not compiled if that failed."""
        compiled = isinstance(self._forward, Compiled) and not self._forward.failed
        return dataclasses.replace(self._runtime.arithmetic, compiled=compiled)

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        n_micro_batches: int,
        dropout_seed: int | None = None,
        accumulate: bool = False,
    ) -> Tensor:
        """Compute the gradients of the mean loss divided by `n_micro_batches`, and return that quotient.

        Args:
            x, y: (B, T) int64 tokens and targets.
            n_micro_batches: how many of them make one step of this process.
            dropout_seed: decides what dropout drops; None for a model without dropout.
            accumulate: add to the gradients of the micro-batches before it, which are replaced otherwise.
        """
        if not accumulate:
            torch._foreach_zero_(self._gradients)
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        with self._runtime.autocast():
            loss = self._forward(x, y)[1] / n_micro_batches
        self.scaler.scale(loss).backward()
        return loss.detach()

    def average_gradients(self) -> None:
        """Average the gradients of a step over all processes; here DistributedDataParallel has done it."""


class ManualBackward(Backward):
    """Computes the same gradients, except for rounding, by the formulas of network/gradient.py.

    It is faster than autograd; `supported` of arithmetic.py tells where it can be used.
    """

    def __init__(
        self, model: BigramLanguageModel, flats: Flats, runtime: Runtime, say: Callable[[str], None]
    ):
        function: Callable = loss_and_gradients
        if runtime.arithmetic.compiled:
            function = partial(_loss_and_joined_gradients, flats)
            function = Compiled(function, say, {"cpp_wrapper": True})  # no Python between kernels
        super().__init__(function, flats, runtime)
        self._config, self._products = model.config, runtime.arithmetic.products_of_gradient()
        self._weights, self._joined_gradients = dict(model.named_parameters()), self._gradients
        # The same random numbers may differ in the last digit from one kind of processor to another.
        runtime.dist.copy_from_main(flat.tensor for flat in flats)
        if not runtime.arithmetic.compiled:
            self._gradients = [p.grad for p in self._weights.values() if p.grad is not None]

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        n_micro_batches: int,
        dropout_seed: int | None = None,
        accumulate: bool = False,
    ) -> Tensor:
        B, T = x.shape
        masks = None if dropout_seed is None else draw_masks(self._config, B, T, dropout_seed)
        loss, gradients = self._forward(self._weights, self._config, x, y, self._products, masks)
        if n_micro_batches > 1:
            torch._foreach_div_(gradients, n_micro_batches)
        (torch._foreach_add_ if accumulate else torch._foreach_copy_)(self._gradients, gradients)
        return loss / n_micro_batches

    def average_gradients(self) -> None:
        self._runtime.dist.average(self._joined_gradients)


def _loss_and_joined_gradients(
    flats: Flats, weights: Mapping[str, Tensor], *args: Any
) -> tuple[Tensor, list[Tensor]]:
    """`loss_and_gradients`, with gradients joined as the parameters are."""
    loss, gradients = loss_and_gradients(weights, *args)
    named = dict(zip(weights, gradients, strict=True))
    return loss, [flat.join(named) for flat in flats]


def create_backward(
    model: BigramLanguageModel, flats: Flats, runtime: Runtime, say: Callable[[str], None]
) -> Backward:
    """Return the backward pass of the runtime's arithmetic, compiled if that says so.

    Args:
        flats: the parameters of the model.
        say: prints a line about compiling.
    """
    LOGGER.debug("arithmetic: %s", runtime.arithmetic)
    if runtime.arithmetic.gradient == "manual":
        return ManualBackward(model, flats, runtime, say)
    forward: Callable = runtime.dist.wrap(model, runtime.device)
    return Backward(Compiled(forward, say) if runtime.arithmetic.compiled else forward, flats, runtime)
