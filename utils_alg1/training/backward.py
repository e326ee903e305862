"""The way back: what adds the gradient of a micro-batch to that which the parameters have."""

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
    """By autograd: any device, arithmetic, dropout and number of processes.

    Attributes:
        scaler: of the loss; its state belongs to a checkpoint.
    """

    def __init__(self, forward: Callable, runtime: Runtime):
        """`forward` is the model, or a faster or shared form of it."""
        self._forward, self._runtime = forward, runtime
        self.scaler = runtime.loss_scaler()

    @property
    def compiled(self) -> bool:
        """Whether its steps are compiled: asked for, and possible here."""
        return isinstance(self._forward, Compiled) and not self._forward.failed

    def __call__(self, x: Tensor, y: Tensor, parts: int) -> Tensor:
        """Add the gradient of the mean loss of tokens (B, T), divided by `parts`; that loss, a scalar."""
        with self._runtime.autocast():
            loss = self._forward(x, y)[1] / parts
        self.scaler.scale(loss).backward()
        return loss.detach()


class WrittenOut(Backward):
    """By gradient.py: on a CPU, in float32, without dropout, by one process. The same, but for rounding."""

    def __init__(self, model: BigramLanguageModel, runtime: Runtime, say: Callable[[str], None]):
        function: Callable = loss_and_gradients
        if runtime.compile:
            function = Compiled(function, say, {"cpp_wrapper": True})  # no Python between its kernels
        super().__init__(function, runtime)
        self._config = model.config
        self._weights = dict(model.named_parameters())

    @staticmethod
    def serves(model: BigramLanguageModel, runtime: Runtime) -> bool:
        config = model.config
        plain = all(getattr(config, name) == MODEL_OPTIONS[name] for name in MODEL_OPTIONS.keys() - OPTIONS)
        on_cpu = runtime.device.type == "cpu" and runtime.dtype is torch.float32
        return plain and on_cpu and runtime.processes.world_size == 1 and not config.dropout

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor, parts: int) -> Tensor:
        loss, gradients = self._forward(self._weights, self._config, x, y)
        if parts > 1:
            torch._foreach_div_(gradients, parts)
        for parameter, gradient in zip(self._weights.values(), gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss / parts


def find_backward(model: BigramLanguageModel, runtime: Runtime, say: Callable[[str], None]) -> Backward:
    """The quickest way back that serves; compiled where the runtime says so."""
    if WrittenOut.serves(model, runtime):
        LOGGER.debug("gradients: written out (gradient.py)")
        return WrittenOut(model, runtime, say)
    LOGGER.debug("gradients: by autograd, which serves every device, dtype and dropout")
    forward: Callable = runtime.processes.wrap(model, runtime.device)
    return Backward(Compiled(forward, say) if runtime.compile else forward, runtime)
