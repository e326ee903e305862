"""The random choices of dropout for the manual gradient, drawn before it.

numpy draws 16 random bits an element, which is faster than PyTorch's Bernoulli on a CPU.
"""

from __future__ import annotations

import contextlib
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from parameters import ModelConfig
from utils_alg1.network.attention import query_blocks

LEVELS = 1 << 16  # of a random number of 16 bits
THREADS_PAY = 1 << 18  # layers with so many elements are drawn by several threads


class LayerMasks(NamedTuple):
    """What dropout keeps in a block of the network: uint8 tensors, 1 where a value is kept; None for all."""

    attention: list[Tensor] | None = None  # for each of `query_blocks`: (B H, queries, keys)
    proj: Tensor | None = None  # (N, C), after the projection of the attention
    down: Tensor | None = None  # (N, C), after the feed-forward layer


class DropoutMasks(NamedTuple):
    """What dropout keeps in all blocks, and by what the kept values are multiplied: 1 / their share."""

    layers: list[LayerMasks]
    scale: float


def draw_masks(config: ModelConfig, B: int, T: int, seed: int) -> DropoutMasks:
    """Draw what dropout keeps for a batch of (B, T) tokens. The probability is exact to 1 / 2**17, but at
    least 1 / 2**16 is kept.

    Args:
        seed: the same seed draws the same masks, by any number of threads.
    """
    threshold = max(1, round((1 - config.dropout) * LEVELS))  # so many of LEVELS are kept
    shapes: list[tuple[int, ...]] = [(B * config.n_head, end - start, end) for start, end in query_blocks(T)]
    shapes += [(B * T, config.n_embd)] * 2
    sizes = [math.prod(shape) for shape in shapes]

    def draw(layer: int) -> LayerMasks:
        random = np.random.Generator(np.random.SFC64([seed, layer]))
        words = random.integers(2**64 - 1, size=-(-sum(sizes) // 4), dtype=np.uint64, endpoint=True)
        kept = words.view(np.uint16)[: sum(sizes)] < threshold
        parts = torch.from_numpy(kept.view(np.uint8)).split(sizes)
        *attention, proj, down = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        return LayerMasks(attention, proj, down)

    layers = range(config.n_layer)
    if sum(sizes) >= THREADS_PAY and torch.get_num_threads() > 1:
        # numpy draws without the GIL. Where threads cannot be started, it draws as for a small model.
        with contextlib.suppress(RuntimeError), ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return DropoutMasks(list(pool.map(draw, layers)), LEVELS / threshold)
    return DropoutMasks([draw(layer) for layer in layers], LEVELS / threshold)
