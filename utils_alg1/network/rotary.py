"""Rotary position embeddings (Su et al. 2021, RoFormer)."""

from __future__ import annotations

import torch
from torch import Tensor

from parameters import ModelConfig


def rotations(config: ModelConfig, start: int, end: int, device: torch.device) -> Tensor | None:
    """By how much `rotate` turns the characters from start to end: cosines and sines (2, T, S / 2).

    Pair i turns by block_size ** (-2 i / S) radians a character: the first by one radian, the last by about
    one in the whole context. None with learned positions. (Su et al. 2021, RoFormer.)
    """
    if config.positions != "rotary":
        return None
    share = torch.arange(0, config.head_size, 2, device=device) / config.head_size  # (S / 2)
    angles = torch.arange(start, end, device=device)[:, None] * config.block_size**-share  # (T, S / 2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + S / 2]) of (..., T, S), so that products depend on distance alone."""
    cos, sin = turns
    a, b = x.chunk(2, dim=-1)  # (..., T, S / 2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
