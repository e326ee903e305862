"""Inference: a key/value cache, a fast forward pass for one character, and the draw from its logits.

Shapes use the letters of model.py: B batch, T time, C = n_embd, H = n_head, S = C / H, V = vocab_size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parameters import ModelConfig
from utils_alg1.network.rotary import apply_qk_norm_and_rotary, rotary_cos_sin

ONE_THREAD_FLOPS = 3e8  # below this, two threads were never faster than one, and much slower on busy cores


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


class Decoder:
    """Computes a model's logits character by character, with a key/value cache of its own.

    For a single character, calling modules costs more than the arithmetic. So the weights are taken out of
    the modules once, as views: they follow the model when an optimizer updates it in place.

    Args:
        model: a BigramLanguageModel.
        batch_size: the number of texts, B.
    """

    def __init__(self, model: Any, batch_size: int):
        self.model, self.config = model, model.config
        weight = model.lm_head.weight
        B, C, H, S = batch_size, self.config.n_embd, self.config.n_head, self.config.head_size
        self.cache = KeyValueCache(self.config, B, weight)
        self.cos_sin = rotary_cos_sin(self.config, 0, self.config.block_size, weight.device)
        table = model.position_embedding_table
        self.positions = None if table is None else table.weight
        self.tokens = model.token_embedding_table.weight
        self.blocks = [_weights(block) for block in model.blocks]
        self.ln_f, self.head = _weights(model.ln_f), _weights(model.lm_head)
        self.flops = 2.0 * self.config.n_parameters  # per character
        self.qkv = weight.new_empty(B, 3 * C)  # a buffer, so that its views are made once
        qkv = self.qkv.view(B, 3, H, S).transpose(0, 1)  # (3, B, H, S)
        self.q, self.qk, self.kv = qkv[0].unsqueeze(2), qkv[:2], qkv[1:]

    def logits(self, idx: Tensor) -> Tensor:
        """Add idx (B, T) to the cache and return the logits (B, V) of the next character.

        T is 1, or the cache is empty.
        """
        with torch.inference_mode(), _limit_threads(self.flops * idx.numel(), idx.device):
            if self.cache.length == 0 or torch.is_autocast_enabled(idx.device.type):
                return self.model(idx, cache=self.cache)[0][:, -1]
            return self._step(idx.view(-1))

    def _step(self, token: Tensor) -> Tensor:
        """Run the forward pass of model.py for one character: (B,) -> (B, V)."""
        t = self.cache.length
        shape = token.shape[0], self.config.n_embd
        mm, norm, attention = torch.mm, torch.layer_norm, F.scaled_dot_product_attention
        slots = self.cache.store[:, :, :, :, t].unbind(0)  # (2, B, H, S) of each layer
        keys = self.cache.store[:, 0, :, :, : t + 1].unbind(0)  # (B, H, t + 1, S)
        values = self.cache.store[:, 1, :, :, : t + 1].unbind(0)
        cos_sin = None if self.cos_sin is None else self.cos_sin[:, t]  # (2, S / 2)
        x = F.embedding(token, self.tokens)  # (B, C)
        if self.positions is not None:
            x.add_(self.positions[t])
        for block, slot, k, v in zip(self.blocks, slots, keys, values, strict=True):
            # In the order of the modules: attention, feed-forward, layer norms.
            qkv, proj, proj_bias, up, up_bias, down, down_bias, ln1, ln1_bias, ln2, ln2_bias = block
            mm(norm(x, shape[1:], ln1, ln1_bias), qkv, out=self.qkv)
            if self.config.qk_norm or cos_sin is not None:
                self.qk.copy_(apply_qk_norm_and_rotary(self.qk, self.config.qk_norm, cos_sin))
            slot.copy_(self.kv)
            x.addmm_(attention(self.q, k, v).view(shape), proj).add_(proj_bias)
            hidden = mm(norm(x, shape[1:], ln2, ln2_bias), up).add_(up_bias).relu_()  # (B, 4 C)
            x.addmm_(hidden, down).add_(down_bias)
        self.cache.length += 1
        (ln_f, ln_f_bias), (head, head_bias) = self.ln_f, self.head
        return torch.addmm(head_bias, norm(x, shape[1:], ln_f, ln_f_bias), head)


def _weights(module: nn.Module) -> list[Tensor]:
    """Return the parameters of a module, matrices as (in, out)."""
    return [parameter.detach().t() for parameter in module.parameters()]


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation mode, and restore its mode at the end."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


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


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError if a sampling argument is out of range."""
    if not 0 <= temperature < math.inf:
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
