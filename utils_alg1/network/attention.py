"""Causal attention and its gradient: three ways to compute it.

Each takes queries, keys and values, (B, H, T, S) each in the letters of model.py, and returns the output and
its backward: the function from the gradient with respect to the output to those with respect to q, k and v.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

AttentionBackward = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
Attention = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, AttentionBackward]]

aten = torch.ops.aten
MATH_ATTENTION_MAX_T = 64  # up to here, compiled attention is faster as plain matrix products
QUERY_BLOCK = 64  # queries of a block: the scores of all heads with all keys then fit into the cache
BFLOAT16_ATTENTION_MIN_T = 128  # below, attention is faster in float32 also between products in bfloat16


def choose_attention(
    dtype: torch.dtype, T: int, kept: list[Tensor] | None = None, scale: float = 1.0
) -> tuple[Attention, torch.dtype]:
    """Return the way that is fastest for T characters, and the data type to compute it in.

    In bfloat16 that is never PyTorch's kernel: its backward is slower than in float32.

    Args:
        dtype: of queries, keys and values.
        kept, scale: the dropout of attention weights; see `blocked_attention`.
    """
    if dtype is torch.bfloat16 and T < BFLOAT16_ATTENTION_MIN_T:
        dtype = torch.float32
    if kept is not None or dtype is torch.bfloat16:
        return functools.partial(blocked_attention, kept=kept, scale=scale), dtype
    compiled = torch.compiler.is_compiling() and T <= MATH_ATTENTION_MAX_T
    return math_attention if compiled else flash_attention, dtype


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, AttentionBackward]:
    """Causal attention by PyTorch's kernel for a CPU, which keeps no attention weights."""
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, True)

    def backward(grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            grad, q, k, v, out, logsumexp, 0.0, True
        )

    return out, backward


def math_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, AttentionBackward]:
    """Causal attention by matrix products: faster if T is small and the compiler fuses what is between."""
    T, scale = q.shape[-2], q.shape[-1] ** -0.5
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    weights = ((q @ k.mT) * scale).masked_fill(future, float("-inf")).softmax(-1)  # (B, H, T, T)

    def backward(grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights_grad = grad @ v.mT
        scores_grad = weights * (weights_grad - (weights_grad * weights).sum(-1, keepdim=True)) * scale
        return scores_grad @ k, scores_grad.mT @ q, weights.mT @ grad

    return weights @ v, backward


def query_blocks(T: int) -> list[tuple[int, int]]:
    """Return start and end of each block of queries; its keys are those from 0 to the end."""
    return [(start, min(start + QUERY_BLOCK, T)) for start in range(0, T, QUERY_BLOCK)]


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor] | None = None, scale: float = 1.0
) -> tuple[Tensor, AttentionBackward]:
    """Causal attention by matrix products, block by block of queries, with dropout of attention weights.

    Args:
        kept: for each block, (B H, queries, keys), 1 where a weight is kept, else 0. None keeps all.
        scale: by what kept weights are multiplied.
    """
    shape, root = q.shape, q.shape[-1] ** -0.5
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B H, T, S)
    v = v if kept is None else v * scale  # instead of the weights, which are more
    future = q.new_full((QUERY_BLOCK, QUERY_BLOCK), float("-inf")).triu(1)
    blocks, outs = [], []
    for i, (start, end) in enumerate(query_blocks(shape[-2])):
        queries, keys, values = (packed(x) for x in (q[:, start:end], k[:, :end], v[:, :end]))
        scores = torch.baddbmm(future[0, 0], queries, keys.mT, beta=0, alpha=root)
        scores[:, :, start:] += future[: end - start, : end - start]
        weights = scores.softmax(-1)
        mask = None if kept is None else kept[i]
        dropped = weights if mask is None else mask.to(q.dtype).mul_(weights)
        outs.append(dropped @ values)
        blocks.append((start, end, queries, keys, values, weights, mask))

    def backward(grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad = grad.flatten(0, 1)
        q_grads, k_grad, v_grad = [], torch.zeros_like(k), torch.zeros_like(v)
        for start, end, queries, keys, values, weights, mask in blocks:
            out_grad, dropped = packed(grad[:, start:end]), weights
            weights_grad = out_grad @ values.mT
            if mask is not None:
                kept_here = mask.to(q.dtype)
                weights_grad.mul_(kept_here)
                dropped = kept_here.mul_(weights)
            v_grad[:, :end].baddbmm_(dropped.mT, out_grad)
            scores_grad = aten._softmax_backward_data.default(weights_grad, weights, -1, q.dtype)
            q_grads.append(torch.baddbmm(future[0, 0], scores_grad, keys, beta=0, alpha=root))
            k_grad[:, :end].baddbmm_(scores_grad.mT, queries, alpha=root)
        if kept is not None:
            v_grad *= scale
        return torch.cat(q_grads, 1).view(shape), k_grad.view(shape), v_grad.view(shape)

    return torch.cat(outs, 1).view(shape), backward


def packed(x: Tensor) -> Tensor:
    """Return x as products need it: in bfloat16 each of them would copy what is not contiguous."""
    return x.contiguous() if x.dtype is torch.bfloat16 else x
