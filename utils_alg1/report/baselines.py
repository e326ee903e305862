"""The losses of guesses that only count characters, with which that of a model is compared.

    uniform   each of the V characters of the vocabulary is as likely as any other: ln V
    unigram   a character is as likely as it is frequent
    bigram    a character is as likely as it is frequent behind the one before it

The counts are of the train part, and the characters that are predicted are those of the val part that the
exported weights are measured on. What was never counted would have an infinite loss, so that each guess is
mixed with the simpler one: Witten-Bell smoothing (Witten and Bell 1991, doi:10.1109/18.87000).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from utils_alg1.tracking.metrics_file import EACH_STEP, Point
from utils_alg1.training.evaluation import MEASURED_CHARACTERS, sequence_starts

COUNTED_CHARACTERS = 2_000_000  # of the train part, at most: they take a fraction of a second
STRETCH = 1000  # characters that lie side by side in the train part, of those that are spread
NAMES = ("uniform", "unigram", "bigram")
LOSSES = (EACH_STEP, "loss/train", "loss/val")  # the curves of the chart of losses


@dataclass(frozen=True)
class Baselines:
    """Losses in nats per character, and the number of characters that were counted."""

    uniform: float
    unigram: float
    bigram: float
    counted: int


def count_baselines(train: np.ndarray, val: np.ndarray, vocab_size: int, block_size: int) -> Baselines:
    """Return the losses on the val part, by the counts of the train part: (n,) tokens each.

    Memory and time have a limit for texts and vocabularies of any size: pairs are counted by sorting those
    that occur.
    """
    V = vocab_size
    before, after = neighbours(train, STRETCH, COUNTED_CHARACTERS)  # (n,)
    counts = np.bincount(after, minlength=V)  # (V,)
    unigram = smooth(counts, len(after), np.count_nonzero(counts), 1 / V)  # (V,)

    pairs, pair_counts = np.unique(before * V + after, return_counts=True)
    totals, kinds = (np.bincount(first, minlength=V) for first in (before, pairs // V))  # (V,)
    x, y = neighbours(val, block_size, MEASURED_CHARACTERS)  # (m,)
    places = np.searchsorted(pairs, x * V + y).clip(max=len(pairs) - 1)
    found = np.where(pairs[places] == x * V + y, pair_counts[places], 0)
    bigram = smooth(found, totals[x], kinds[x], unigram[y])  # (m,)
    unigram_loss, bigram_loss = (float(0 - np.log(p).mean()) for p in (unigram[y], bigram))
    return Baselines(float(np.log(V)), unigram_loss, bigram_loss, len(after))


def neighbours(tokens: np.ndarray, length: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return characters of a text and those behind them, (n,) each: all, or about `limit` of them.

    These are sequences of `length` that are spread evenly; see `sequence_starts`.
    """
    if len(tokens) - 1 <= limit:
        sequences = np.asarray(tokens)[None]
    else:
        starts = sequence_starts(len(tokens), length, max(1, limit // length))
        sequences = np.asarray(tokens)[starts[:, None] + np.arange(length + 1)]
    sequences = sequences.astype(np.int64)
    return sequences[:, :-1].ravel(), sequences[:, 1:].ravel()


def smooth(count: Any, total: Any, kinds: Any, simpler: Any) -> Any:
    """Return the probability of what was counted `count` times out of `total`, in which `kinds` differ.

    The simpler guess has the weight of as many counts as there were kinds, which is how often something new
    came; one where nothing was counted.
    """
    weight = np.maximum(kinds, 1)
    return (count + weight * simpler) / (total + weight)


def in_view(losses: Mapping[str, float], curves: Mapping[str, list[Point]]) -> dict[str, float]:
    """Return the losses that a chart of the losses has room for: its curves keep half of its height."""
    values = [value for name in LOSSES for _, value in curves.get(name, [])]
    low, high = min(values), max(values)
    room = (high - low) / 2
    return {name: loss for name, loss in losses.items() if low - room <= loss <= high + room}
