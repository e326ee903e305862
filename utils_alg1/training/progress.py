"""How far a run has come, and how fast it is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from utils_alg1.training.runtime import Runtime


@dataclass
class Evaluation:
    """Mean losses (nats) after `step` updates, and the learning rate of the next one."""

    step: int
    train_loss: float
    val_loss: float
    learning_rate: float


@dataclass
class Progress:
    """How far a run has come. All of it is in every checkpoint.

    Attributes:
        step: updates done.
        best_val: lowest validation loss so far, and best_step, where it was.
        evaluations_since_best: for --patience.
        evaluation: the newest one.
        seconds: spent in the loop, before and after each resume.
    """

    step: int = 0
    best_val: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    evaluation: Evaluation | None = None
    seconds: float = 0.0

    def add(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        if self.best_val is None or evaluation.val_loss < self.best_val:
            self.best_val, self.best_step = evaluation.val_loss, evaluation.step
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1

    def out_of_patience(self, patience: int) -> bool:
        """Whether `patience` evaluations have brought nothing better; 0 waits for ever."""
        return 0 < patience <= self.evaluations_since_best

    def evaluated(self) -> bool:
        """Whether the weights as they are now were evaluated."""
        return self.evaluation is not None and self.evaluation.step == self.step

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """The reverse of dataclasses.asdict."""
        evaluation = values.get("evaluation")
        return cls(**{**values, "evaluation": Evaluation(**evaluation) if evaluation else None})


class Clock:
    """Measures the loop, with the device's queue waited for, so that the figures are true."""

    def __init__(self, runtime: Runtime, tokens_per_step: int):
        self._runtime, self._tokens_per_step = runtime, tokens_per_step
        self._time, self._step = 0.0, 0  # of the last lap
        self._speed_time, self._speed_step = 0.0, 0  # of the last `speed`
        self._aside = 0.0  # seconds since then that were no training

    def start(self, progress: Progress) -> None:
        self._time, self._step = self._now(), progress.step
        self.speed(progress.step)

    def lap(self, progress: Progress) -> float | None:
        """Add the time since the last lap to progress.seconds; its tokens/s, None without a step."""
        time_before, step_before = self._time, self._step
        self._time, self._step = self._now(), progress.step
        seconds = self._time - time_before
        progress.seconds += seconds
        tokens = (progress.step - step_before) * self._tokens_per_step
        if not tokens:
            self._aside += seconds  # an evaluation
        return tokens / seconds if tokens else None

    def speed(self, step: int) -> float | None:
        """Tokens/s of the training since the last call or the start; None without a step."""
        now = self._now()
        seconds = now - self._speed_time - self._aside
        tokens = (step - self._speed_step) * self._tokens_per_step
        self._speed_time, self._speed_step, self._aside = now, step, 0.0
        return tokens / seconds if tokens else None

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is done in here is no training: `speed` leaves it out."""
        began = self._now()
        yield
        self._aside += self._now() - began

    def _now(self) -> float:
        self._runtime.synchronize()
        return time.perf_counter()
