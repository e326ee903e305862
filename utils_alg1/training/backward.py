"""Backward passes: they add the gradients of a micro-batch to those of the parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from model import BigramLanguageModel
from parameters import MODEL_OPTIONS
from utils_alg1.network.gradient import OPTIONS, loss_and_gradients
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
    def compiled(self) -> bool:
        """Whether the forward pass is compiled: it was asked for, and did not fail."""
        return isinstance(self._forward, Compiled) and not self._forward.failed

    def __call__(self, x: Tensor, y: Tensor, n_micro_batches: int) -> Tensor:
        """Add the gradients of the mean loss divided by `n_micro_batches`, and return that quotient.

        Args:
            x, y: (B, T) int64 tokens and targets.
            n_micro_batches: how many of them make one step of this process.
        """
        with self._runtime.autocast():
            loss = self._forward(x, y)[1] / n_micro_batches
        self.scaler.scale(loss).backward()
        return loss.detach()


class ManualBackward(Backward):
    """Computes the same gradients, except for rounding, by the formulas of network/gradient.py.

    It is faster than autograd, and supports a CPU, float32, no dropout and a single process.
    """

    def __init__(self, model: BigramLanguageModel, runtime: Runtime, say: Callable[[str], None]):
        function: Callable = loss_and_gradients
        if runtime.compile:
            function = Compiled(function, say, {"cpp_wrapper": True})  # no Python between kernels
        super().__init__(function, runtime)
        self._config = model.config
        self._weights = dict(model.named_parameters())

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor, n_micro_batches: int) -> Tensor:
        loss, gradients = self._forward(self._weights, self._config, x, y)
        if n_micro_batches > 1:
            torch._foreach_div_(gradients, n_micro_batches)
        for parameter, gradient in zip(self._weights.values(), gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss / n_micro_batches


def create_backward(model: BigramLanguageModel, runtime: Runtime, say: Callable[[str], None]) -> Backward:
    """Return the fastest backward pass that supports the model; compiled if the runtime says so.

    Args:
        say: prints a line about compiling.
    """
    config = model.config
    known = all(getattr(config, name) == MODEL_OPTIONS[name] for name in MODEL_OPTIONS.keys() - OPTIONS)
    plain_cpu = runtime.device.type == "cpu" and runtime.dtype is torch.float32
    if known and plain_cpu and runtime.dist.world_size == 1 and not config.dropout:
        LOGGER.debug("gradients: by formulas (network/gradient.py)")
        return ManualBackward(model, runtime, say)
    LOGGER.debug("gradients: by autograd")
    forward: Callable = runtime.dist.wrap(model, runtime.device)
    return Backward(Compiled(forward, say) if runtime.compile else forward, runtime)
