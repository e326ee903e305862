"""Training steps and evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from data import get_batch, sequences_at
from model import BigramLanguageModel
from parameters import TrainConfig, due
from utils_alg1.base.errors import CANNOT_TRAIN, Alg1Error
from utils_alg1.training.backward import create_backward
from utils_alg1.training.evaluation import (
    SEQUENCES_PER_ITER,
    Measurement,
    mean_loss,
    measure,
    sequence_starts,
)
from utils_alg1.training.optimizers import create_optimizer
from utils_alg1.training.progress import Clock, Evaluation, Progress
from utils_alg1.training.runtime import Runtime, memory_guard
from utils_alg1.training.schedule import learning_rate
from utils_alg1.training.seeds import derive_seed, generator

OBSERVED_SEQUENCES = 4  # at most, that the model is looked at with


class Trainer:
    """Takes training steps and evaluates.

    The random choices of step s are seeded by s (see `derive_seed`), and an evaluation makes none: neither an
    interruption nor the number of evaluations changes what a step does.

    Args:
        model: the model itself, not its compiled or DistributedDataParallel form. Its parameters become views
            of few tensors.
        data: the tokens of the train and val splits, (n,) unsigned integers each.

    Attributes:
        progress: the state besides the tensors.
        backward: computes the gradients of a micro-batch.
        optimizer, scaler: their state belongs to a checkpoint.
        gradients: tensors that hold all of them together.
        gradient_norm: of the newest gradients, before clipping.
        speed: tokens/s before the newest evaluation, or None.
    """

    def __init__(
        self,
        model: BigramLanguageModel,
        data: tuple[np.ndarray, np.ndarray],
        config: TrainConfig,
        runtime: Runtime,
        say: Callable[[str], None],
    ):
        self.model, self.data = model, data
        self.config, self.runtime = config, runtime
        self.progress = Progress()
        self.block_size = model.config.block_size
        self.optimizer = create_optimizer(model, config, runtime.arithmetic)
        self.gradients = [flat.gradient for flat in self.optimizer.flats]
        if not runtime.arithmetic.joined:
            self.gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.backward = create_backward(model, self.optimizer.flats, runtime, say)
        self.scaler = self.backward.scaler
        sequences = config.batch_size * config.grad_accum_steps * runtime.dist.world_size
        self.tokens_per_step = sequences * self.block_size
        self.clock = Clock(runtime.synchronize, self.tokens_per_step)
        self.ends_here = False  # --finish: no further step is taken
        self.gradient_norm = math.nan
        self.speed: float | None = None

    @property
    def step(self) -> int:
        """The number of updates done."""
        return self.progress.step

    @property
    def eval_due(self) -> bool:
        """Whether to evaluate now: every eval_interval, at the end, and where the checkpoint evaluated."""
        at_end = self.ends_here or self.step >= self.config.max_iters
        return at_end or due(self.step, self.config.eval_interval) or self.progress.evaluated

    @property
    def save_due(self) -> bool:
        """Whether to save a checkpoint now: every checkpoint_interval and checkpoint_minutes, at a new best.

        Only the main process saves, so its clock alone decides.
        """
        seconds = 60 * self.config.checkpoint_minutes
        by_clock = seconds > 0 and self.clock.since_saved() >= seconds
        is_best = self.progress.best_step == self.step
        return is_best or due(self.step, self.config.checkpoint_interval) or by_clock

    @property
    def out_of_time(self) -> bool:
        """Whether max_seconds are over."""
        return 0 < self.config.max_seconds <= self.clock.elapsed()

    @property
    def finished(self) -> bool:
        """Whether max_iters is reached, or --patience or --finish ends the run before."""
        at_end = self.ends_here or self.step >= self.config.max_iters
        return at_end or self.progress.out_of_patience(self.config.patience)

    def forward_backward(self) -> float:
        """Run forward and backward on all micro-batches of this step, and clip. Return the mean loss in nats.

        Raises:
            Alg1Error: the loss or the gradient is not finite (exit code 3; in the main process only). The
                weights are unchanged.
        """
        config, dist = self.config, self.runtime.dist
        loss_sum = 0.0
        for i in range(config.grad_accum_steps):
            with dist.no_sync(i < config.grad_accum_steps - 1):
                loss_sum += self._micro_batch_loss(dist.rank + dist.world_size * i, accumulate=i > 0)
        self.backward.average_gradients()
        mean_loss = dist.all_reduce_sum([loss_sum])[0] / dist.world_size
        self.scaler.unscale_(self.optimizer)
        norm = torch.stack(torch._foreach_norm(self.gradients)).norm()
        self.gradient_norm = norm.item()
        # With float16 the scaler handles a gradient that overflows: it skips that update.
        is_norm_fine = math.isfinite(self.gradient_norm) or self.scaler.is_enabled()
        if not math.isfinite(mean_loss) or not is_norm_fine:
            what = "gradient" if math.isfinite(mean_loss) else "loss"
            where = f"at step {self.step}; the weights were not updated"
            self._raise_in_main_process(f"the {what} is not finite {where}")
        if config.grad_clip and self.gradient_norm > config.grad_clip:
            torch._foreach_mul_(self.gradients, config.grad_clip / norm)
        return mean_loss

    def _micro_batch_loss(self, micro_batch: int, accumulate: bool = False) -> float:
        """Run forward and backward on one micro-batch. Return its loss divided by grad_accum_steps."""
        x, y = self._batch(micro_batch)
        dropout_seed = None
        if self.model.config.dropout:
            dropout_seed = derive_seed(self.config.seed, "dropout", self.step, micro_batch)
        with memory_guard("in a training step", self.model.config, self.config):
            return self.backward(x, y, self.config.grad_accum_steps, dropout_seed, accumulate).item()

    def warm_up_ddp(self) -> None:
        """Run one backward pass and discard it, as DistributedDataParallel reorders the gradients after it.

        The order of a sum changes its rounding: the first step of a resumed run would have other bytes.
        """
        if self.runtime.dist.world_size > 1 and self.runtime.arithmetic.gradient == "autograd":
            self._micro_batch_loss(self.runtime.dist.rank)

    def optimizer_step(self) -> None:
        """Update the weights from the gradients, and count the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.progress.step += 1

    def evaluate(self) -> Evaluation:
        """Evaluate both splits and record the result; or return the stored result if these weights have one.

        Raises:
            Alg1Error: a loss is not finite, or out of memory (exit code 3).
        """
        self.speed = self.clock.speed("evaluation", self.step)
        if not self.progress.evaluated:
            with self.clock.exclude_from_speed(), memory_guard("in an evaluation", self.model.config):
                train_loss, val_loss = self._mean_losses()
            if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
                self._raise_in_main_process(f"the evaluation loss is not finite after step {self.step}")
            rate = learning_rate(self.config, self.step)
            sequences = len(self._evaluated(self.data[1]))
            self.progress.add(Evaluation(self.step, train_loss, val_loss, rate, sequences))
        self.clock.measure(self.progress)
        assert self.progress.evaluation is not None
        return self.progress.evaluation

    def _mean_losses(self) -> tuple[float, float]:
        """Return the train and val loss: the means over the same sequences in every evaluation."""
        train_loss, val_loss = (
            mean_loss(self.model, tokens, self._evaluated(tokens), self.runtime) for tokens in self.data
        )
        return train_loss, val_loss

    def _evaluated(self, tokens: np.ndarray) -> np.ndarray:
        """Return where the sequences begin that an evaluation reads of a split."""
        return sequence_starts(len(tokens), self.block_size, SEQUENCES_PER_ITER * self.config.eval_iters)

    @property
    def evaluations_changed(self) -> bool:
        """Whether the next evaluation reads other sequences than the newest one did, before a resume."""
        newest = self.progress.evaluation
        return newest is not None and newest.sequences != len(self._evaluated(self.data[1]))

    def measure(self) -> Measurement:
        """Measure the weights on the val split; see `evaluation.measure`.

        Raises:
            Alg1Error: the loss is not finite, or out of memory (exit code 3).
        """
        with memory_guard("in an evaluation", self.model.config):
            measured = measure(self.model, self.data[1], self.runtime)
        if not math.isfinite(measured.loss):
            self._raise_in_main_process("the loss of the exported weights is not finite")
        return measured

    def _raise_in_main_process(self, message: str) -> None:
        """Raise Alg1Error in the main process; the others go on until torchrun ends them."""
        if self.runtime.dist.is_main:
            raise Alg1Error(message, stability_hint(self.config, self.runtime.dtype), CANNOT_TRAIN)

    def validation_batch(self) -> torch.Tensor:
        """Return the first sequences that an evaluation reads of the val split: (B, T) tokens, B <= 4."""
        starts = self._evaluated(self.data[1])[:OBSERVED_SEQUENCES]
        return sequences_at(starts, self.data[1], self.block_size, self.runtime.device)[0]

    def _batch(self, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch of a micro-batch of this step: (B, T) tokens and targets."""
        B, rng = self.config.batch_size, generator(self.config.seed, "batch", self.step, micro_batch)
        return get_batch("train", *self.data, self.block_size, B, self.runtime.device, rng)


def stability_hint(config: TrainConfig, dtype: torch.dtype) -> str:
    """Return a hint that names settings with which the loss is more likely to stay finite."""
    ways = [f"a --learning-rate below {config.learning_rate:g}"]
    if not 0 < config.grad_clip <= 1:
        ways.append("--grad-clip 1.0")
    if dtype is torch.float16:
        ways.append("--dtype float32")
    return "try " + ", or ".join(ways)
