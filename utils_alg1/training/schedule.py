"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from parameters import TrainConfig

STEP_DECAY_EVERY = 1 / 3  # fraction of the steps after warm-up; lr_schedule = step
STEP_DECAY_FACTOR = 0.1
WSD_DECAY_FRACTION = 0.2  # fraction of all steps, at the end; lr_schedule = wsd


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step. It depends on the step alone, so a resumed run needs no state.

    It rises linearly over warmup_iters, then follows lr_schedule from learning_rate down to min_lr:
    constant; cosine; linear; step (a tenth after each third); wsd (constant, then linear over the last
    fifth of the run, or over all steps after a long warm-up; Hu et al. 2024, MiniCPM).
    """
    peak, floor = config.learning_rate, config.min_lr
    if step < config.warmup_iters:
        return peak * (step + 1) / config.warmup_iters
    if config.lr_schedule == "constant":
        return peak
    steps = max(1, config.max_iters - config.warmup_iters)
    progress = min(1.0, (step - config.warmup_iters) / steps)  # 0 after warm-up, 1 at max_iters
    if config.lr_schedule == "cosine":
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.lr_schedule == "linear":
        return floor + (peak - floor) * (1 - progress)
    if config.lr_schedule == "step":
        return max(floor, peak * STEP_DECAY_FACTOR ** math.floor(progress / STEP_DECAY_EVERY))
    decay_steps = max(1, min(steps, round(WSD_DECAY_FRACTION * config.max_iters)))
    left = min(1.0, (config.max_iters - step) / decay_steps)
    return floor + (peak - floor) * left


def same_learning_rates(one: TrainConfig, other: TrainConfig, n_steps: int) -> bool:
    """Return whether the first `n_steps` steps have the same learning rates with both."""
    return all(learning_rate(one, step) == learning_rate(other, step) for step in range(n_steps))
