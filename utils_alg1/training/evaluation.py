"""The mean loss of a model on a part of the text: what is read for it, and in which passes.

An evaluation of a run and the measurement of its export read sequences of block_size characters that lie side
by side in the text: all of them, or some that are spread evenly. Neither the seed nor the batch size plays a
part, so equal weights have equal losses but for rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from data import sequences_at
from model import BigramLanguageModel
from utils_alg1.network.cache import eval_mode
from utils_alg1.training.runtime import Runtime

SEQUENCES_PER_ITER = 4  # read by an evaluation for each of eval_iters: the reference's batch size
MEASURED_CHARACTERS = 250_000  # at most, for the loss of an export: as long as some 500 steps of the default
PASS_CHARACTERS = 1 << 13  # of a forward pass: few large passes are faster
PASS_LOGITS = 1 << 20  # of a forward pass: with a large vocabulary they take most of the memory (4 MiB here)


@dataclass(frozen=True)
class Measurement:
    """The mean loss (nats per character) over so many characters, of `available` ones."""

    loss: float
    characters: int
    available: int


def sequence_starts(n_tokens: int, block_size: int, max_sequences: int) -> np.ndarray:
    """Return where the sequences begin that are read of a text of `n_tokens`: (n,), 1 <= n <= max_sequences.

    If more lie side by side, those are taken that are an n-th of the text apart. The target of the last
    character of a sequence is the one behind it, so the text must be longer than block_size.
    """
    n_all = (n_tokens - 1) // block_size
    n = min(n_all, max_sequences)
    return np.arange(n) * n_all // n * block_size


def mean_loss(
    model: BigramLanguageModel,
    tokens: np.ndarray,
    starts: np.ndarray,
    runtime: Runtime,
    length: int | None = None,
) -> float:
    """Return the mean loss in nats over the sequences of `tokens` that begin at `starts`.

    They are `length` characters long, block_size if it is None. The processes share them. A pass has several
    sequences, but no more than PASS_CHARACTERS and PASS_LOGITS allow, or a single one, for which a training
    step would need more memory.
    """
    T, V, dist = length or model.config.block_size, model.config.vocab_size, runtime.dist
    assert V is not None
    per_pass = max(1, min(PASS_CHARACTERS, PASS_LOGITS // V) // T)
    own = starts[dist.rank :: dist.world_size]
    total = 0.0
    with eval_mode(model), torch.no_grad():
        for i in range(0, len(own), per_pass):
            x, y = sequences_at(own[i : i + per_pass], tokens, T, runtime.device)
            with runtime.autocast():
                total += len(x) * model(x, y)[1].item()
    return dist.all_reduce_sum([total])[0] / len(starts)


def measure(model: BigramLanguageModel, tokens: np.ndarray, runtime: Runtime) -> Measurement:
    """Return the loss of exported weights: over all of `tokens`, or MEASURED_CHARACTERS of them.

    All are the sequences that lie side by side and a shorter one at the end, so that models of any block_size
    are measured on the same characters. It is computed in float32, as the weights are used later, whatever
    the training steps were computed in.
    """
    T, runtime = model.config.block_size, Runtime(runtime.device, dist=runtime.dist)
    available = len(tokens) - 1  # the first character is not predicted
    starts = sequence_starts(len(tokens), T, max(1, MEASURED_CHARACTERS // T))
    loss, characters = mean_loss(model, tokens, starts, runtime), len(starts) * T
    if 0 < (rest := available - characters) < T:
        rest_loss = mean_loss(model, tokens, np.array([characters]), runtime, rest)
        loss, characters = (loss * characters + rest_loss * rest) / available, available
    return Measurement(loss, characters, available)
