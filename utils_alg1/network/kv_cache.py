"""The key/value cache of attention."""

from __future__ import annotations

from torch import Tensor

from parameters import ModelConfig


class KeyValueCache:
    """Keys and values of the characters read so far, so that each is computed only once.

    Args:
        config: the sizes of the model.
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
