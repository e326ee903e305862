"""Drawing text from a model: keys and values that are kept, the network for one character, the draw.

Shapes are written as in model.py: B batch, C = n_embd, H = n_head, S = C / H, V = vocab_size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parameters import ModelConfig

ONE_THREAD_FLOPS = 3e8  # below, two threads were never faster than one, and much slower on busy cores


class KeyValueCache:
    """Keys and values of the characters already read, so that each is computed once.

    Attributes:
        length: how many characters it holds; the same in every layer.
    """

    def __init__(self, config: ModelConfig, batch_size: int, like: Tensor):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch_size, config.n_head, config.block_size, head_size)
        self.store = like.new_empty(shape)  # (n_layer, 2, B, H, block_size, S)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, H, T, S) keys and values; all of the layer's so far: (B, H, length + T, S) each."""
        end = self.length + k.shape[2]
        self.store[layer, 0, :, :, self.length : end] = k
        self.store[layer, 1, :, :, self.length : end] = v
        return self.store[layer, 0, :, :, :end], self.store[layer, 1, :, :, :end]


class _Norm(NamedTuple):
    """A LayerNorm without its module."""

    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    eps: float

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> _Norm:
        return cls(norm.weight, norm.bias, norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, C)."""
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _Weights(NamedTuple):
    """The weights of a block: matrices as (in, out)."""

    ln1: _Norm
    qkv: Tensor  # (C, 3 C)
    proj: Tensor  # (C, C)
    proj_bias: Tensor
    ln2: _Norm
    widen: Tensor  # (C, 4 C)
    widen_bias: Tensor
    narrow: Tensor  # (4 C, C)
    narrow_bias: Tensor

    @classmethod
    def of(cls, block: Any) -> _Weights:
        sa, widen, narrow = block.sa, block.ffwd.net[0], block.ffwd.net[2]
        return cls(
            ln1=_Norm.of(block.ln1),
            qkv=sa.qkv.weight.t(),
            proj=sa.proj.weight.t(),
            proj_bias=sa.proj.bias,
            ln2=_Norm.of(block.ln2),
            widen=widen.weight.t(),
            widen_bias=widen.bias,
            narrow=narrow.weight.t(),
            narrow_bias=narrow.bias,
        )


@contextlib.contextmanager
def _threads(flops: float, device: torch.device) -> Iterator[None]:
    """In here a CPU uses one thread where there is little to compute: several would mostly wait."""
    threads = torch.get_num_threads()
    if device.type == "cpu" and flops < ONE_THREAD_FLOPS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Decoder:
    """Computes what the model computes, character by character, with a cache of its own.

    For one character the calls of modules and the memory for their results cost more than the arithmetic. So
    the weights are taken out of the modules once, and results are written where there is room already. The
    weights are views: they stay those of the model when it trains on.
    """

    def __init__(self, model: Any, batch_size: int):
        self.model, self.head_bias = model, model.lm_head.bias
        self.tokens = model.token_embedding_table.weight  # (V, C)
        table = model.position_embedding_table
        self.positions = None if table is None else table.weight  # (block_size, C)
        self.layers = [_Weights.of(block) for block in model.blocks]
        self.ln_f, self.head = _Norm.of(model.ln_f), model.lm_head.weight.t()
        self.flops = 2.0 * sum(parameter.numel() for parameter in model.parameters())  # for a character

        self.cache = cache = KeyValueCache(model.config, batch_size, model.lm_head.weight)
        n_layer, _, B, H, block_size, S = cache.store.shape
        C = H * S
        keys, values = cache.store.view(n_layer, 2, B * H, block_size, S).unbind(1)
        self.keys, self.values = keys.transpose(2, 3), values  # (n_layer, B H, S, block_size), (..., S)
        new = cache.store.new_empty
        self.qkv = new(B, 3 * C)
        self.q, self.kv = self.qkv.view(B, 3, H, S).permute(1, 0, 2, 3).split((1, 2))  # (1 or 2, B, H, S)
        self.queries_and_keys = self.qkv.view(B, 3, H, S).transpose(0, 1)[:2]  # (2, B, H, S)
        self.turns = model.turns(0, block_size)  # (2, block_size, S / 2)
        first: Any = model.blocks[0]
        plain = self.turns is None and not model.config.qk_norm
        self.compared = None if plain else first.sa.compared
        self.scale = cache.store.new_tensor(S**-0.5)
        self.scaled = new(1, B, H, S)
        self.query = self.scaled.view(B * H, 1, S)
        self.scores = new(B * H * block_size)
        self.attended = new(B * H, 1, S)
        self.joined = self.attended.view(B, C)
        self.hidden = new(B, 4 * C)

    def logits(self, idx: Tensor) -> Tensor:
        """Add idx (B, T) to the cache; the logits of what follows: (B, V). T is 1 or the cache is empty."""
        with torch.inference_mode(), _threads(self.flops * idx.numel(), idx.device):
            if self.cache.length == 0:
                return self.model(idx, cache=self.cache)[0][:, -1]
            return self._step(idx.view(-1))

    def _step(self, token: Tensor) -> Tensor:
        t = self.cache.length
        slots = self.cache.store[:, :, :, :, t].unbind(0)  # (2, B, H, S) of each layer
        keys = self.keys[:, :, :, : t + 1].unbind(0)  # (B H, S, t + 1)
        values = self.values[:, :, : t + 1].unbind(0)  # (B H, t + 1, S)
        n = self.query.shape[0]
        scores = self.scores[: n * (t + 1)].view(n, 1, t + 1)
        turns = None if self.turns is None else self.turns[:, t]  # (2, S / 2)
        x = F.embedding(token, self.tokens)  # (B, C)
        if self.positions is not None:
            x.add_(self.positions[t])
        for layer, slot, k, v in zip(self.layers, slots, keys, values, strict=True):
            torch.mm(layer.ln1(x), layer.qkv, out=self.qkv)
            if self.compared is not None:
                self.queries_and_keys.copy_(self.compared(self.queries_and_keys, turns))
            slot.copy_(self.kv)
            torch.mul(self.q, self.scale, out=self.scaled)
            torch.bmm(self.query, k, out=scores)
            torch.bmm(scores.softmax(-1), v, out=self.attended)
            x.addmm_(self.joined, layer.proj).add_(layer.proj_bias)
            torch.mm(layer.ln2(x), layer.widen, out=self.hidden)
            self.hidden.add_(layer.widen_bias).relu_()
            x.addmm_(self.hidden, layer.narrow).add_(layer.narrow_bias)
        self.cache.length += 1
        return torch.addmm(self.head_bias, self.ln_f(x), self.head)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for a sampling argument that is out of range."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature = {temperature} must be 0 or above")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k} must be above 0")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p} must be above 0 and at most 1")


def next_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token from each row of logits: (B, V) -> (B,). See `generate_stream`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if temperature != 1:
        # Subtracting the maximum first keeps a tiny temperature from overflowing; one that float32 cannot
        # hold would divide by zero.
        temperature = max(temperature, torch.finfo(logits.dtype).tiny)
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = logits.softmax(dim=-1)  # (B, V)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        unneeded = ordered.cumsum(dim=-1) - ordered >= top_p  # the likelier ones suffice
        probabilities = probabilities.masked_fill(unneeded.gather(-1, order.argsort(-1)), 0.0)
    if not math.isfinite(probabilities.sum()):
        raise RuntimeError("the model's logits are not finite: there is nothing to draw from")
    # What torch.multinomial draws from the same state of the generator, without a dozen checks.
    waits = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / waits).argmax(dim=-1)
