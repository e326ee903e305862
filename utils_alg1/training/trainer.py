"""The parts of a training step: learning rate, optimizer, update, evaluation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from data import get_batch
from model import BigramLanguageModel
from parameters import TrainConfig
from utils_alg1.base.errors import CANNOT_TRAIN, Alg1Error
from utils_alg1.training.backward import Backward
from utils_alg1.training.optimizers import create_optimizer
from utils_alg1.training.progress import Clock, Evaluation
from utils_alg1.training.runtime import Runtime
from utils_alg1.training.schedule import learning_rate
from utils_alg1.training.seeds import derive_seed, generator

EVALUATION_TOKENS = 1 << 13  # in one forward pass of an evaluation: few large ones are faster


class Trainer:
    """Takes training steps and evaluates.

    Every random choice of step s is seeded by s (see `derive_seed`), and evaluation by itself, so that
    neither an interruption nor the number of evaluations changes what a step does.

    Attributes:
        model: the plain model, for evaluation, export and figures.
        backward: finds the gradients of a micro-batch.
        optimizer, scaler: their state belongs to a checkpoint.
        clock: the loop's.
        gradient_norm: of the newest gradients, before clipping.
    """

    def __init__(
        self,
        model: BigramLanguageModel,
        backward: Backward,
        data: tuple[np.ndarray, np.ndarray],
        config: TrainConfig,
        runtime: Runtime,
    ):
        """`data` are the train and val tokens."""
        self.model = model
        self.backward = backward
        self.data = data
        self.config = config
        self.runtime = runtime
        self.block_size = model.config.block_size
        self.optimizer = create_optimizer(model, config)
        self.scaler = backward.scaler
        self.parameters = list(model.parameters())
        sequences = config.batch_size * config.grad_accum_steps * runtime.processes.world_size
        self.tokens_per_step = sequences * self.block_size
        self.clock = Clock(runtime, self.tokens_per_step)
        self.gradient_norm = torch.tensor(math.nan)

    def compute_gradients(self, step: int) -> float:
        """Forward and backward of all micro-batches of a step; the mean loss.

        Raises:
            Alg1Error: loss or gradient is not finite (exit code 3); the weights are as before.
        """
        config, processes = self.config, self.runtime.processes
        self._forget_gradients()
        loss_sum = 0.0
        for i in range(config.grad_accum_steps):
            with processes.exchange(now=i == config.grad_accum_steps - 1):
                loss_sum += self._backward(step, processes.rank + processes.world_size * i)
        mean_loss = processes.sum([loss_sum])[0] / processes.world_size
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        # With float16, a gradient that overflows is the scaler's business: it skips that update.
        if not math.isfinite(mean_loss) or not (norm.isfinite() or self.scaler.is_enabled()):
            what = "gradient" if math.isfinite(mean_loss) else "loss"
            self._stop(f"the {what} is not finite at step {step}; the weights were not updated")
        self.gradient_norm = norm
        if config.grad_clip and norm > config.grad_clip:
            torch._foreach_mul_(gradients, config.grad_clip / norm)
        return mean_loss

    def _backward(self, step: int, micro_batch: int) -> float:
        """Forward and backward of one micro-batch: its part of this process's mean loss."""
        x, y = self._batch("train", self.config.batch_size, "batch", step, micro_batch)
        if self.model.config.dropout:
            torch.manual_seed(derive_seed(self.config.seed, "dropout", step, micro_batch))
        return self.backward(x, y, self.config.grad_accum_steps).item()

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def settle(self) -> None:
        """Let DistributedDataParallel order the gradients as it will in every step.

        It does that after the first backward pass, and the order of a sum decides its last digit: without
        this, the first step of a resumed run would not be to the byte what it was.
        """
        if self.runtime.processes.world_size > 1:
            self._backward(0, self.runtime.processes.rank)
            self._forget_gradients()

    def update(self, step: int) -> None:
        """Let the optimizer take the step that the gradients show."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.no_grad()
    def evaluate(self, step: int) -> Evaluation:
        """Mean loss over eval_iters batches of each split, the same ones every time, shared out evenly.

        Raises:
            Alg1Error: a loss is not finite (exit code 3).
        """
        config, processes = self.config, self.runtime.processes
        per_pass = max(1, EVALUATION_TOKENS // (config.batch_size * self.block_size))
        numbers = range(processes.rank, config.eval_iters, processes.world_size)
        self.model.eval()
        sums = []
        for split in ("train", "val"):
            total = 0.0
            for start in range(0, len(numbers), per_pass):
                part = numbers[start : start + per_pass]
                batches = [self._batch(split, config.batch_size, f"eval-{split}", i) for i in part]
                x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
                with self.runtime.autocast():
                    total += len(batches) * self.model(x, y)[1].item()
            sums.append(total)
        self.model.train()
        train_loss, val_loss = (total / config.eval_iters for total in processes.sum(sums))
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            self._stop(f"the evaluation loss is not finite after step {step}")
        return Evaluation(step, train_loss, val_loss, learning_rate(config, step))

    def _stop(self, message: str) -> None:
        """Raise for a loss that is lost; the other processes see it too, and end when the first is gone."""
        if self.runtime.processes.first:
            raise Alg1Error(message, steadier_settings(self.config, self.runtime.dtype), CANNOT_TRAIN)

    def validation_batch(self) -> torch.Tensor:
        """The first batch of validation text that every evaluation reads: (B, T)."""
        return self._batch("val", self.config.batch_size, "eval-val", 0)[0]

    def _batch(self, split: str, size: int, *key: Any) -> tuple[torch.Tensor, torch.Tensor]:
        draw = generator(self.config.seed, *key)
        return get_batch(split, *self.data, self.block_size, size, self.runtime.device, draw)


def steadier_settings(config: TrainConfig, dtype: torch.dtype) -> str:
    """A hint: settings with which the loss rather stays finite."""
    ways = [f"a --learning-rate below {config.learning_rate:g}"]
    if not 0 < config.grad_clip <= 1:
        ways.append("--grad-clip 1.0")
    if dtype is torch.float16:
        ways.append("--dtype float32")
    return "try " + ", or ".join(ways)
