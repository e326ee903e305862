"""The forward pass of model.py in numpy, which draws and scores texts on a CPU without PyTorch.

For one character, the number of calls costs more than the arithmetic. So the weights are rewritten once such
that few calls are left. The results are those of the model but for rounding:

- The weight and bias of a layer norm are part of the matrix that follows it. The bias of a matrix is its last
  row, and the last number of its input is 1.
- The mean over C is taken out of all that is added to the residual stream x; a layer norm would do so anyway.
  With one more number in x, the norm of x is the square root that a layer norm divides by.
- The scale of the attention scores is part of the queries and keys, whose numbers are in another order: a
  rotation of pairs is then a product of complex numbers.
- Each value is followed by a 1. So the weighted sum of the values is followed by the sum of the weights.

Shapes use the letters of model.py: B batch, T time, C = n_embd, H = n_head, S = C / H, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from parameters import ModelConfig
from utils_alg1.network.blas import limit_threads

LAYER_NORM_EPS = 1e-5  # the default of torch.nn.LayerNorm


class Decoder:
    """Computes the logits of texts character by character; see `LogitsDecoder`.

    Where a number overflows, the logits are not finite, which `Sampling` refuses.

    Args:
        tensors: by their names in `BigramLanguageModel.state_dict()`. They are copied, so a decoder does not
            follow a model that is trained on.
        dtype: of the arithmetic.
    """

    batch_numbers = 1 << 17  # they stay in the processor's caches

    @np.errstate(all="ignore")
    def __init__(self, config: ModelConfig, tensors: Mapping[str, np.ndarray], dtype: Any = np.float32):
        self.config, self.dtype = config, np.dtype(dtype)
        self.block_size, self.length = config.block_size, 0
        weights = {name: np.asarray(tensor, self.dtype) for name, tensor in tensors.items()}
        norm = math.sqrt(config.n_embd * LAYER_NORM_EPS)
        self.tokens = _centered(weights["token_embedding_table.weight"], norm)  # (V, C + 1)
        self.positions = self.rotations = None
        if config.positions == "learned":
            self.positions = _centered(weights["position_embedding_table.weight"], 0)  # (block_size, C + 1)
        else:
            self.rotations = _rotations(config).astype(np.result_type(self.dtype, np.complex64))
        with limit_threads(2.0 * config.n_parameters):
            self.blocks = [self._block(weights, f"blocks.{layer}.") for layer in range(config.n_layer)]
            head, bias = weights["lm_head.weight"], weights["lm_head.bias"]
            self.head = _after_norm(head, bias, weights["ln_f.weight"], weights["ln_f.bias"])  # (C + 2, V)
        self.zero = np.zeros((), self.dtype)

    def _block(self, weights: Mapping[str, np.ndarray], prefix: str) -> tuple[np.ndarray, ...]:
        """Return the matrices of a block.

        (C + 2, 3 C), (C + 1, C + 1), (C + 2, 4 C + 1) and (4 C + 1, C + 1).
        """
        C, H, S = self.config.n_embd, self.config.n_head, self.config.head_size
        ln1, ln1_bias, ln2, ln2_bias, proj, proj_bias, up, up_bias, down, down_bias = (
            weights[f"{prefix}{name}.{part}"]
            for name in ("ln1", "ln2", "sa.proj", "ffwd.net.0", "ffwd.net.2")
            for part in ("weight", "bias")
        )
        order = np.arange(3 * C)
        if self.rotations is not None:  # each pair of the queries and keys side by side
            order[: 2 * C] = order[: 2 * C].reshape(2 * H, 2, S // 2).swapaxes(1, 2).reshape(-1)
        no_bias = np.zeros(3 * C, self.dtype)
        qkv = _after_norm(weights[f"{prefix}sa.qkv.weight"][order], no_bias, ln1, ln1_bias)
        if not self.config.qk_norm:
            qkv[:, : 2 * C] *= S**-0.25  # so the scores are divided by S ** 0.5
        up = _after_norm(up, np.append(up_bias, self.dtype.type(1)), ln2, ln2_bias)
        return qkv, _onto_stream(proj, proj_bias), up, _onto_stream(down, down_bias)

    def start(self, batch_size: int) -> None:
        """Begin so many new texts."""
        config, B, S = self.config, batch_size, self.config.head_size
        self.length = 0
        cache = np.empty((config.n_layer, 2, B, config.n_head, config.block_size, S + 1), self.dtype)
        cache[:, 1, ..., S] = 1
        self.cache = cache[..., :S]  # keys at index 0 of the second dimension, values at 1
        self.keys = self.cache[:, 0].swapaxes(-1, -2)  # (n_layer, B, H, S, block_size)
        self.values = cache[:, 1]  # (n_layer, B, H, block_size, S + 1)
        self.one_character = _Buffers(config, B, 1, self.dtype)

    @np.errstate(all="ignore")
    def logits(self, tokens: np.ndarray, last: int = 1) -> np.ndarray:
        B, T = tokens.shape
        buffers = self.one_character if T == 1 else _Buffers(self.config, B, T, self.dtype)
        flops = 2.0 * self.config.n_parameters * B * T
        with limit_threads(flops):
            self._run_blocks(tokens, buffers)
            self.length += T
            return buffers.normalize()[-last * B :].dot(self.head)

    def _run_blocks(self, tokens: np.ndarray, buffers: _Buffers) -> None:
        """Compute the residual stream of new characters, and add them to the cache."""
        T = tokens.shape[1]
        start, end = self.length, self.length + T
        x, delta, hidden = buffers.x, buffers.delta, buffers.hidden
        self.tokens.take(tokens.T.reshape(-1), axis=0, out=x)
        if self.positions is not None:
            buffers.x_of_time += self.positions[start:end, None]
        layers = zip(
            self.blocks,
            self.cache[..., start:end, :],
            self.keys[..., :end],
            self.values[..., :end, :],
            strict=True,
        )
        for (qkv, proj, up, down), slots, k, v in layers:
            np.dot(buffers.normalize(), qkv, out=buffers.qkv)
            self._normalize_and_rotate(buffers.qk)
            slots[:] = buffers.kv
            scores = np.matmul(buffers.q, k)  # (B, H, T, end)
            if T > 1:
                scores += buffers.mask
            scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
            np.matmul(np.exp(scores, out=scores), v, out=buffers.weighted)
            np.divide(*buffers.quotient, out=buffers.mixed)
            x += np.dot(buffers.attention, proj, out=delta)
            np.dot(buffers.normalize(), up, out=hidden)
            x += np.dot(np.maximum(hidden, self.zero, out=hidden), down, out=delta)

    def _normalize_and_rotate(self, qk: np.ndarray) -> None:
        """Apply QK-norm and rotary positions, each if the model has it, to (T, B, 2, H, S) in place."""
        S = self.config.head_size
        if self.config.qk_norm:
            eps = np.finfo(self.dtype).eps
            squares = np.add.reduce(qk * qk, axis=-1, keepdims=True)
            qk /= np.sqrt(squares * S**-0.5 + eps * S**0.5)  # the scores are divided by S ** 0.5 too
        if self.rotations is not None:
            pairs = qk.view(self.rotations.dtype)
            pairs *= self.rotations[self.length : self.length + len(qk), None, None, None]


class _Buffers:
    """What is computed of T characters of B texts; rows are in the order (T, B).

    Attributes:
        x: the residual stream (T B, C + 1).
        attention: the outputs of all heads (T B, C + 1); its last column is 1.
        weighted: the weighted sum of the values, followed by the sum of the weights (B, H, T, S + 1).
    """

    def __init__(self, config: ModelConfig, B: int, T: int, dtype: np.dtype):
        C, H, S, rows = config.n_embd, config.n_head, config.head_size, T * B
        self.x, self.delta, self.attention = (np.ones((rows, C + 1), dtype) for _ in range(3))
        self.hidden = np.empty((rows, 4 * C + 1), dtype)
        self.x_of_time = self.x.reshape(T, B, C + 1)
        self.qkv = np.empty((rows, 3 * C), dtype)
        by_part = self.qkv.reshape(T, B, 3, H, S)
        self.qk = by_part[:, :, :2]  # (T, B, 2, H, S)
        by_part = by_part.transpose(2, 1, 3, 0, 4)
        self.q, self.kv = by_part[0], by_part[1:]  # (B, H, T, S), (2, B, H, T, S)
        self.mixed = self.attention[:, :C].reshape(T, B, H, S).transpose(1, 2, 0, 3)
        self.weighted = np.empty((B, H, T, S + 1), dtype)
        self.quotient = self.weighted[..., :-1], self.weighted[..., -1:]
        self.mask = np.triu(np.full((T, T), -np.inf, dtype), 1)
        self._normed = np.ones((rows, C + 2), dtype)
        self._squares = np.empty((rows, 1, 1), dtype)
        self._out, self._norms = self._normed[:, :-1], self._squares[:, 0]
        self._factors = self.x[:, None], self.x[:, :, None]

    def normalize(self) -> np.ndarray:
        """Return what the matrix behind a layer norm takes: (T B, C + 2)."""
        if len(self.x) == 1:
            square = float(self.x[0].dot(self.x[0]))
            np.multiply(self.x[0], math.sqrt(square) / square, out=self._out[0])  # NaN if it is infinite
        else:
            np.matmul(*self._factors, out=self._squares)
            np.multiply(self.x, np.sqrt(self._norms) / self._norms, out=self._out)
        return self._normed


def _rotations(config: ModelConfig) -> np.ndarray:
    """Return the rotation of each pair at each position, as complex numbers (block_size, S / 2)."""
    exponents = np.arange(0, config.head_size, 2, dtype=np.float32) / np.float32(config.head_size)
    angles = (
        np.arange(config.block_size, dtype=np.float32)[:, None] * np.float32(config.block_size) ** -exponents
    )
    return np.exp(1j * angles)


def _centered(table: np.ndarray, last: float) -> np.ndarray:
    """Return an embedding table (N, C) as it is added to the residual stream: (N, C + 1)."""
    return np.pad(table - table.mean(axis=1, keepdims=True), ((0, 0), (0, 1)), constant_values=last)


def _after_norm(matrix: np.ndarray, bias: np.ndarray, norm: np.ndarray, norm_bias: np.ndarray) -> np.ndarray:
    """Return the matrix (N, C) and bias that follow a layer norm as one matrix (C + 2, len(bias)).

    Where the bias is longer than N, the product is the bias alone.
    """
    N, C = matrix.shape
    joined = np.zeros((C + 2, len(bias)), matrix.dtype)
    joined[:C, :N] = matrix.T
    joined[:C] *= norm[:, None] * norm.dtype.type(math.sqrt(C))
    joined[-1] = bias
    joined[-1, :N] += matrix @ norm_bias
    return joined


def _onto_stream(matrix: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return a matrix (C, N) and bias (C), whose product is added to the stream, as one (N + 1, C + 1)."""
    C, N = matrix.shape
    joined = np.zeros((N + 1, C + 1), matrix.dtype)
    joined[:N, :C] = matrix.T
    joined[N, :C] = bias
    joined[:, :C] -= joined[:, :C].mean(axis=1, keepdims=True)
    return joined
