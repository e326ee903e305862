"""The key/value cache of the model's own forward pass, with which it draws and scores texts on any device.

Shapes use the letters of model.py: B batch, T time, H = n_head, S = C / H, V = vocab_size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parameters import ModelConfig


class KeyValueCache:
    """Keys and values of the characters read so far, so that each is computed only once.

    Args:
        batch_size: the number of texts, B.
        like: a tensor of the dtype and on the device that the cache shall have.

    Attributes:
        store: (n_layer, 2, B, H, block_size, S): keys at index 0 of the second dimension, values at 1.
        length: the number of characters it holds, the same in every layer.
    """

    def __init__(self, config: ModelConfig, batch_size: int, like: Tensor):
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, config.head_size)
        self.store = like.new_empty(shape)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, H, T, S) of a layer; return all of it so far (B, H, length + T, S).

        The caller advances `length` after the last layer.
        """
        end = self.length + k.shape[2]
        self.store[layer, 0, :, :, self.length : end] = k
        self.store[layer, 1, :, :, self.length : end] = v
        return self.store[layer, 0, :, :, :end], self.store[layer, 1, :, :, :end]


class CachedForward:
    """Computes a model's logits character by character with its own forward pass; see `LogitsDecoder`."""

    batch_numbers = 1 << 24  # enough for a GPU to be busy

    def __init__(self, model: Any):
        self.model, self.config, self.block_size = model, model.config, model.config.block_size

    @property
    def length(self) -> int:
        return self.cache.length

    @length.setter
    def length(self, length: int) -> None:
        self.cache.length = length

    def start(self, batch_size: int) -> None:
        self.cache = KeyValueCache(self.model.config, batch_size, self.model.lm_head.weight)

    def logits(self, tokens: np.ndarray, last: int = 1) -> np.ndarray:
        with torch.inference_mode():
            idx = torch.from_numpy(tokens).to(self.cache.store.device)
            logits = self.model(idx, cache=self.cache)[0][:, -last:]  # (B, last, V)
            logits = logits.transpose(0, 1).flatten(0, 1)
            # numpy has no bfloat16
            return (logits.float() if logits.dtype.itemsize < 4 else logits).cpu().numpy()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation mode, and restore its mode at the end."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
