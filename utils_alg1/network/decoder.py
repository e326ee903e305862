"""Sample text from a model: one forward pass per character, with a key/value cache.

Shapes use the letters of model.py: B batch, T time, C = n_embd, H = n_head, S = C / H, V = vocab_size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parameters import ModelConfig
from utils_alg1.network.kv_cache import KeyValueCache
from utils_alg1.network.rotary import apply_qk_norm_and_rotary, rotary_cos_sin

ONE_THREAD_FLOPS = 3e8  # below this, two threads were never faster than one, and much slower on busy cores


class Transformer(Protocol):
    """What is used here of the model; its blocks are those of model.py."""

    config: ModelConfig
    token_embedding_table: nn.Embedding
    position_embedding_table: nn.Embedding | None
    blocks: nn.ModuleList
    ln_f: nn.LayerNorm
    lm_head: nn.Linear
    training: bool
    __call__: Callable[..., Any]

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...


def generate_stream(
    model: Transformer,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Sample from a model; see `BigramLanguageModel.generate_stream`, which takes the same arguments."""
    check_sampling(temperature, top_k, top_p)
    if idx.shape[1] < 1:
        raise ValueError("idx must hold at least one token")
    was_training = model.training
    model.eval()
    try:
        B, block_size = idx.shape[0], model.config.block_size
        decoder = Decoder(model, B)
        unread = idx[:, -block_size:]  # what the decoder has not seen yet
        context = [unread]  # in pieces (B, T)
        stop_sequence = idx.new_tensor(list(stop or ()))
        recent = idx.new_full((B, len(stop_sequence)), -1)
        stopped = torch.zeros(B, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            logits = decoder.logits(unread)  # (B, V)
            token = next_token(logits, temperature, top_k, top_p, generator)  # (B,)
            yield token
            if stop:
                recent = torch.cat([recent[:, 1:], token[:, None]], dim=1)
                stopped |= (recent == stop_sequence).all(dim=1)
                if stopped.all():
                    return
            unread = token[:, None]
            context.append(unread)
            if decoder.cache.length == block_size:  # drop the older half, and read the rest again
                unread = torch.cat(context, dim=1)[:, -max(1, block_size // 2) :]
                context, decoder.cache.length = [unread], 0
    finally:
        model.train(was_training)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError if a sampling argument is out of range."""
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
    """Draw a token from each row of logits: (B, V) -> (B,).

    See `BigramLanguageModel.generate_stream` for the arguments.

    Raises:
        RuntimeError: the logits are not finite.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    if temperature != 1:
        # Subtracting the maximum first keeps a tiny temperature from overflowing; one below the smallest
        # normal number of the dtype would divide by zero.
        temperature = max(temperature, torch.finfo(logits.dtype).tiny)
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(dim=-1)  # (B, V)
    if top_p is not None and top_p < 1:
        sorted_probs, order = probs.sort(dim=-1, descending=True)
        outside = sorted_probs.cumsum(dim=-1) - sorted_probs >= top_p  # more likely tokens suffice
        probs = probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0.0)
    if not math.isfinite(probs.sum()):
        raise RuntimeError("the model's logits are not finite: there is nothing to draw from")
    # The same draw as torch.multinomial from the same generator state, without its dozen argument checks.
    exponential = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / exponential).argmax(dim=-1)


class _LayerNorm(NamedTuple):
    """A LayerNorm without the overhead of its module."""

    weight: Tensor  # (C,)
    bias: Tensor  # (C,)
    eps: float

    @classmethod
    def of(cls, module: nn.LayerNorm) -> _LayerNorm:
        return cls(module.weight, module.bias, module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, C)."""
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class _BlockWeights(NamedTuple):
    """The weights of a block, with matrices as (in, out)."""

    ln1: _LayerNorm
    qkv: Tensor  # (C, 3 C)
    proj: Tensor  # (C, C)
    proj_bias: Tensor
    ln2: _LayerNorm
    up: Tensor  # (C, 4 C)
    up_bias: Tensor
    down: Tensor  # (4 C, C)
    down_bias: Tensor

    @classmethod
    def of(cls, block: Any) -> _BlockWeights:
        sa, up, down = block.sa, block.ffwd.net[0], block.ffwd.net[2]
        return cls(
            ln1=_LayerNorm.of(block.ln1),
            qkv=sa.qkv.weight.t(),
            proj=sa.proj.weight.t(),
            proj_bias=sa.proj.bias,
            ln2=_LayerNorm.of(block.ln2),
            up=up.weight.t(),
            up_bias=up.bias,
            down=down.weight.t(),
            down_bias=down.bias,
        )


@contextlib.contextmanager
def _limit_threads(flops: float, device: torch.device) -> Iterator[None]:
    """On a CPU, use one thread if there is little to compute: several would mostly wait for each other."""
    threads = torch.get_num_threads()
    if device.type == "cpu" and flops < ONE_THREAD_FLOPS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Decoder:
    """Computes the model's logits character by character, with a key/value cache of its own.

    For a single character, calling modules and allocating their results costs more than the arithmetic. So
    the weights are taken out of the modules once, and results are written into preallocated buffers. The
    weights are views: they follow the model when an optimizer updates it in place.
    """

    def __init__(self, model: Transformer, batch_size: int):
        self.model, self.head_bias = model, model.lm_head.bias
        self.tokens = model.token_embedding_table.weight  # (V, C)
        table = model.position_embedding_table
        self.positions = None if table is None else table.weight  # (block_size, C)
        self.layers = [_BlockWeights.of(block) for block in model.blocks]
        self.ln_f, self.head = _LayerNorm.of(model.ln_f), model.lm_head.weight.t()
        self.flops = 2.0 * sum(parameter.numel() for parameter in model.parameters())  # per character

        config, weight = model.config, model.lm_head.weight
        self.cache = cache = KeyValueCache(config, batch_size, weight)
        n_layer, _, B, H, block_size, S = cache.store.shape
        C = H * S
        keys, values = cache.store.view(n_layer, 2, B * H, block_size, S).unbind(1)
        self.keys, self.values = keys.transpose(2, 3), values  # (n_layer, B H, S, block_size), (..., S)
        self.cos_sin = rotary_cos_sin(config, 0, block_size, weight.device)  # (2, block_size, S / 2)
        self.qk_norm = config.qk_norm
        # Buffers, and views of them.
        new = cache.store.new_empty
        self.qkv = new(B, 3 * C)
        self.q, self.kv = self.qkv.view(B, 3, H, S).permute(1, 0, 2, 3).split((1, 2))  # (1 or 2, B, H, S)
        self.qk = self.qkv.view(B, 3, H, S).transpose(0, 1)[:2]  # (2, B, H, S)
        self.scale = cache.store.new_tensor(S**-0.5)
        self.scaled_q = new(1, B, H, S)
        self.bmm_q = self.scaled_q.view(B * H, 1, S)
        self.scores = new(B * H * block_size)
        self.attention_out = new(B * H, 1, S)
        self.joined_heads = self.attention_out.view(B, C)
        self.hidden = new(B, 4 * C)

    def logits(self, idx: Tensor) -> Tensor:
        """Add idx (B, T) to the cache and return the logits (B, V) of the next character.

        T is 1, or the cache is empty.
        """
        with torch.inference_mode(), _limit_threads(self.flops * idx.numel(), idx.device):
            if self.cache.length == 0:
                return self.model(idx, cache=self.cache)[0][:, -1]
            return self._step(idx.view(-1))

    def _step(self, token: Tensor) -> Tensor:
        """(B,) -> (B, V)."""
        t = self.cache.length
        slots = self.cache.store[:, :, :, :, t].unbind(0)  # (2, B, H, S) of each layer
        keys = self.keys[:, :, :, : t + 1].unbind(0)  # (B H, S, t + 1)
        values = self.values[:, :, : t + 1].unbind(0)  # (B H, t + 1, S)
        n = self.bmm_q.shape[0]
        scores = self.scores[: n * (t + 1)].view(n, 1, t + 1)
        cos_sin = None if self.cos_sin is None else self.cos_sin[:, t]  # (2, S / 2)
        x = F.embedding(token, self.tokens)  # (B, C)
        if self.positions is not None:
            x.add_(self.positions[t])
        for layer, slot, k, v in zip(self.layers, slots, keys, values, strict=True):
            torch.mm(layer.ln1(x), layer.qkv, out=self.qkv)
            if self.qk_norm or cos_sin is not None:
                self.qk.copy_(apply_qk_norm_and_rotary(self.qk, self.qk_norm, cos_sin))
            slot.copy_(self.kv)
            torch.mul(self.q, self.scale, out=self.scaled_q)
            torch.bmm(self.bmm_q, k, out=scores)
            torch.bmm(scores.softmax(-1), v, out=self.attention_out)
            x.addmm_(self.joined_heads, layer.proj).add_(layer.proj_bias)
            torch.mm(layer.ln2(x), layer.up, out=self.hidden)
            self.hidden.add_(layer.up_bias).relu_()
            x.addmm_(self.hidden, layer.down).add_(layer.down_bias)
        self.cache.length += 1
        return torch.addmm(self.head_bias, self.ln_f(x), self.head)
