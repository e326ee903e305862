"""What is done to queries and keys before they meet: QK-norm and rotary position embeddings.

Shapes use the letters of model.py: T time, S = C / H (size of a head).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from parameters import ModelConfig


def rotary_cos_sin(config: ModelConfig, start: int, end: int, device: torch.device) -> Tensor | None:
    """Compute the cosines and sines (2, T, S / 2) of the rotation angles of positions start to end.

    Per position, pair i rotates by block_size ** (-2 i / S) radians: the first pair by one radian, the last
    by about one radian over the whole context. Return None if the model has learned positions.
    (Su et al. 2021, RoFormer, with block_size in place of 10,000.)
    """
    if config.positions != "rotary":
        return None
    exponents = torch.arange(0, config.head_size, 2, device=device) / config.head_size  # (S / 2)
    angles = torch.arange(start, end, device=device)[:, None] * config.block_size**-exponents  # (T, S / 2)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Apply rotary position embeddings to queries or keys (..., T, S): rotate the pairs (x[i], x[i + S / 2]).

    The product of a rotated query and a rotated key depends on their distance, not on their positions.
    """
    cos, sin = cos_sin
    a, b = x.chunk(2, dim=-1)  # (..., T, S / 2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def apply_qk_norm_and_rotary(x: Tensor, qk_norm: bool, cos_sin: Tensor | None) -> Tensor:
    """Apply QK-norm and rotary position embeddings, each if the model has it, to queries or keys (..., T, S).

    QK-norm is an RMSNorm without weights (Henry et al. 2020, Query-Key Normalization).
    """
    if qk_norm:
        x = F.rms_norm(x, x.shape[-1:])
    return x if cos_sin is None else apply_rotary(x, cos_sin)
