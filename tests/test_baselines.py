"""The losses of guesses that only count characters, beside plain computations of the same."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from utils_alg1.report import baselines as baselines_module
from utils_alg1.report.baselines import count_baselines, in_view, neighbours
from utils_alg1.training.evaluation import sequence_starts


def plain_losses(train: list[int], val: list[int], vocab_size: int) -> tuple[float, float]:
    """The unigram and the bigram loss, from dictionaries of counts, one character at a time."""
    counts, pairs = Counter(train[1:]), Counter(itertools.pairwise(train))
    totals, kinds = Counter(train[:-1]), Counter(first for first, _ in pairs)
    n, n_kinds = len(train) - 1, len(counts)

    def unigram(b: int) -> float:
        return (counts[b] + n_kinds / vocab_size) / (n + n_kinds)

    def bigram(a: int, b: int) -> float:
        weight = max(1, kinds[a])
        return (pairs[a, b] + weight * unigram(b)) / (totals[a] + weight)

    predicted = list(itertools.pairwise(val))
    return (
        -sum(math.log(unigram(b)) for _, b in predicted) / len(predicted),
        -sum(math.log(bigram(a, b)) for a, b in predicted) / len(predicted),
    )


@pytest.mark.parametrize(
    "n_train, n_val, vocab_size, dtype",
    [(2, 2, 2, np.uint8), (50, 20, 65, np.uint8), (3000, 900, 7, np.uint8), (4000, 500, 20_000, np.uint16)],
)
def test_the_losses_are_those_of_a_plain_computation(n_train, n_val, vocab_size, dtype):
    draw = np.random.default_rng(vocab_size)
    tokens = (draw.zipf(1.3, n_train + n_val) % vocab_size).astype(dtype)
    train, val = tokens[:n_train], tokens[n_train:]
    found = count_baselines(train, val, vocab_size, 4)
    unigram, bigram = plain_losses(train.tolist(), val.tolist(), vocab_size)
    assert found.uniform == pytest.approx(math.log(vocab_size), rel=1e-12)
    assert found.unigram == pytest.approx(unigram, rel=1e-12)
    assert found.bigram == pytest.approx(bigram, rel=1e-12)
    assert found.counted == n_train - 1


def test_a_text_that_repeats_is_known_to_the_bigram_and_not_to_the_unigram():
    tokens = np.tile(np.arange(4, dtype=np.uint8), 5000)
    found = count_baselines(tokens[:18_000], tokens[18_000:], 4, 8)
    assert found.unigram == pytest.approx(math.log(4), abs=1e-3) and 0 < found.bigram < 1e-3


def test_every_guess_is_a_distribution_over_the_vocabulary():
    train = np.array([0, 1, 0, 2, 0, 1, 3], dtype=np.uint8)  # 3 is before nothing, 4 does not occur
    for first in range(5):
        losses = [count_baselines(train, np.array([first, b], np.uint8), 5, 4) for b in range(5)]
        for name in ("uniform", "unigram", "bigram"):
            assert sum(math.exp(-getattr(loss, name)) for loss in losses) == pytest.approx(1, rel=1e-12)


def test_of_a_long_text_so_much_is_counted_evenly_and_of_the_val_part_what_is_measured(monkeypatch):
    monkeypatch.setattr(baselines_module, "COUNTED_CHARACTERS", 6000)
    monkeypatch.setattr(baselines_module, "STRETCH", 100)
    monkeypatch.setattr(baselines_module, "MEASURED_CHARACTERS", 640)
    tokens = np.random.default_rng(0).integers(0, 9, 50_000).astype(np.uint8)
    train, val = tokens[:40_000], tokens[40_000:]
    found = count_baselines(train, val, 9, 32)
    assert found.counted == 6000
    starts = sequence_starts(len(train), 100, 60)
    before, after = neighbours(train, 100, 6000)
    assert [starts[0], starts[-1]] == [0, 39_200]
    assert before.tolist() == [int(train[s + i]) for s in starts for i in range(100)]
    assert after.tolist() == [int(train[s + i + 1]) for s in starts for i in range(100)]
    x, y = neighbours(val, 32, 640)
    counts = np.bincount(after, minlength=9)
    kinds = np.count_nonzero(counts)
    expected = -np.log((counts[y] + kinds / 9) / (6000 + kinds)).mean()
    assert len(x) == 640 and found.unigram == pytest.approx(expected, rel=1e-12)


def test_a_chart_has_room_for_losses_near_its_curves_only():
    curves = {"loss/train_step": [(0, 3.0)], "loss/val": [(0, 4.0), (9, 2.0)], "learning_rate": [(0, 99.0)]}
    losses = {"far": 5.1, "above": 5.0, "within": 3.5, "below": 1.0, "low": 0.9}
    assert in_view(losses, curves) == {"above": 5.0, "within": 3.5, "below": 1.0}
