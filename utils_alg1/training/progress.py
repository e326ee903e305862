"""The state of a training run besides its tensors, and its clock."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from utils_alg1.base.running_time import running_time


@dataclass
class Evaluation:
    """Mean losses (nats per character) after `step` updates, and the learning rate of the next one.

    Attributes:
        sequences: how many of the val split were read; None in checkpoints from before that was kept, whose
            evaluations read others.
    """

    step: int
    train_loss: float
    val_loss: float
    learning_rate: float
    sequences: int | None = None


@dataclass
class Progress:
    """How far a run is. Every checkpoint holds all of it.

    Attributes:
        step: the number of updates done.
        best_val: the lowest validation loss so far, and best_step, its step.
        evaluations_since_best: compared with --patience.
        evaluation: the newest one.
        seconds: spent in the training loop, including the parts before each resume.
    """

    step: int = 0
    best_val: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    evaluation: Evaluation | None = None
    seconds: float = 0.0

    def add(self, evaluation: Evaluation) -> None:
        """Make `evaluation` the newest, and the best if its validation loss is the lowest."""
        self.evaluation = evaluation
        if self.best_val is None or evaluation.val_loss < self.best_val:
            self.best_val, self.best_step = evaluation.val_loss, evaluation.step
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1

    def out_of_patience(self, patience: int) -> bool:
        """Return whether `patience` evaluations in a row were no better; never with 0."""
        return 0 < patience <= self.evaluations_since_best

    @property
    def evaluated(self) -> bool:
        """Whether the present weights have been evaluated."""
        return self.evaluation is not None and self.evaluation.step == self.step

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """The inverse of dataclasses.asdict."""
        evaluation = values.get("evaluation")
        return cls(**{**values, "evaluation": Evaluation(**evaluation) if evaluation else None})


class Clock:
    """Measures the training loop: its seconds, and the speed of its steps in tokens per second.

    Time in which the process is suspended, by Ctrl-Z say, does not count (see `RunningTime`).

    Args:
        synchronize: waits for the device, so that the time read next is true.
    """

    def __init__(self, synchronize: Callable[[], None], tokens_per_step: int):
        self._synchronize, self._tokens_per_step = synchronize, tokens_per_step
        self._began = self._left_out = 0.0
        self._saved_at = running_time()
        self._start = (0.0, 0)  # time and step
        self._readings: dict[str, tuple[float, int]] = {}

    def start(self, progress: Progress) -> None:
        """Start at the beginning of the loop; `progress.seconds` were spent before a resume."""
        now = self._now()
        self._began = now - progress.seconds
        self._start = now, progress.step
        self._saved_at = now

    def measure(self, progress: Progress) -> None:
        """Set progress.seconds to the time spent in the loop so far."""
        progress.seconds = self._now() - self._began

    def elapsed(self) -> float:
        """Return the seconds since `start`, without waiting for the device: each step asks for them."""
        return running_time() - self._start[0]

    def saved(self) -> None:
        """Note that a checkpoint is saved now."""
        self._saved_at = running_time()

    def since_saved(self) -> float:
        """Return the seconds since `saved` or `start`."""
        return running_time() - self._saved_at

    def speed(self, reader: str, step: int) -> float | None:
        """Return the tokens/s of training since this reader asked last, or None if no step was taken."""
        now = self._now() - self._left_out
        before, step_before = self._readings.get(reader, self._start)
        self._readings[reader] = now, step
        return (step - step_before) * self._tokens_per_step / (now - before) if step > step_before else None

    @contextlib.contextmanager
    def exclude_from_speed(self) -> Iterator[None]:
        """Leave the time of this block out of the speed."""
        began = self._now()
        yield
        self._left_out += self._now() - began

    def _now(self) -> float:
        self._synchronize()
        return running_time()
