"""Manual forward and backward of the model, operator by operator.

Autograd computes the same gradient, up to rounding, from model.py alone, on any device and with dropout. But
for small models most of its time is overhead, which a plain function of tensors does not have, and
torch.compile turns this one into a single graph, forward and backward. Shapes use the letters of model.py,
and N = B T.

`grad` is the gradient of the loss with respect to the output of the operator whose backward comes next. The
backward of a block runs through the lines of its forward from the last to the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parameters import ModelConfig
from utils_alg1.network.rotary import apply_rotary, rotary_cos_sin

aten = torch.ops.aten
LAYER_NORM_EPS = 1e-5  # the default of torch.nn.LayerNorm
OPTIONS = {"positions", "qk_norm", "zero_init"}  # the MODEL_OPTIONS that are implemented here
MATH_ATTENTION_MAX_T = 64  # up to here, compiled attention is faster as plain matrix products


class SavedLayerNorm(NamedTuple):
    """The output of a layer norm, and what is saved for backward."""

    name: str
    x: Tensor  # (N, C), the input
    out: Tensor  # (N, C)
    mean: Tensor  # (N, 1)
    rstd: Tensor  # (N, 1)


class SavedQK(NamedTuple):
    """Queries and keys (2, B, H, T, S) with QK-norm and RoPE applied, and what is saved for backward."""

    out: Tensor
    before_rotary: Tensor
    rrms: Tensor | None  # (2, B, H, T, 1): the factors of QK-norm, None without it


class SavedBlock(NamedTuple):
    """What the forward of a block saves for backward."""

    ln1: SavedLayerNorm
    qk: SavedQK
    v: Tensor  # (B, H, T, S)
    attention: tuple[Tensor, Tensor]  # see `attention`
    joined_heads: Tensor  # (N, C)
    ln2: SavedLayerNorm
    hidden: Tensor  # (N, 4 C), after ReLU


def loss_and_gradients(
    weights: Mapping[str, Tensor], config: ModelConfig, idx: Tensor, targets: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Compute the mean cross-entropy of a batch and its gradient with respect to every weight.

    Args:
        weights: by the names of BigramLanguageModel.named_parameters().
        config: of that model. Its dropout is not applied.
        idx: (B, T) int64 tokens.
        targets: (B, T) int64, the token that follows each of idx.

    Returns:
        the loss in nats (a scalar), and the gradients in the order of `weights`.
    """
    B, T = idx.shape
    N, C, H = B * T, config.n_embd, config.n_head
    S = config.head_size
    cos_sin = rotary_cos_sin(config, 0, T, idx.device)
    gradients: dict[str, Tensor] = {}

    def linear(name: str, x: Tensor) -> Tensor:
        return torch.addmm(weights[f"{name}.bias"], x, weights[f"{name}.weight"].t())

    def linear_backward(name: str, x: Tensor, grad: Tensor, bias: bool = True) -> Tensor:
        gradients[f"{name}.weight"] = grad.t() @ x
        if bias:
            gradients[f"{name}.bias"] = grad.sum(0)
        return grad @ weights[f"{name}.weight"]

    def layer_norm(name: str, x: Tensor) -> SavedLayerNorm:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return SavedLayerNorm(name, x, *torch.native_layer_norm(x, (C,), weight, bias, LAYER_NORM_EPS))

    def layer_norm_backward(ln: SavedLayerNorm, grad: Tensor) -> Tensor:
        weight, bias = weights[f"{ln.name}.weight"], weights[f"{ln.name}.bias"]
        grad, gradients[f"{ln.name}.weight"], gradients[f"{ln.name}.bias"] = aten.native_layer_norm_backward(
            grad, ln.x, (C,), ln.mean, ln.rstd, weight, bias, (True, True, True)
        )
        return grad

    # Forward.
    x = F.embedding(idx, weights["token_embedding_table.weight"])  # (B, T, C)
    if cos_sin is None:
        x = x + weights["position_embedding_table.weight"][:T]
    x = x.view(N, C)
    saved_blocks: list[SavedBlock] = []
    for layer in range(config.n_layer):
        ln1 = layer_norm(f"blocks.{layer}.ln1", x)
        qkv = ln1.out @ weights[f"blocks.{layer}.sa.qkv.weight"].t()  # (N, 3 C)
        heads = qkv.view(B, T, 3, H, S).permute(2, 0, 3, 1, 4)  # (3, B, H, T, S)
        qk, v = qk_norm_and_rotary(heads[:2], config.qk_norm, cos_sin), heads[2]
        q, k = qk.out
        attention_out = attention(q, k, v)
        joined_heads = attention_out[0].transpose(1, 2).reshape(N, C)
        x = linear(f"blocks.{layer}.sa.proj", joined_heads).add_(x)
        ln2 = layer_norm(f"blocks.{layer}.ln2", x)
        hidden = linear(f"blocks.{layer}.ffwd.net.0", ln2.out).relu_()
        x = linear(f"blocks.{layer}.ffwd.net.2", hidden).add_(x)
        saved_blocks.append(SavedBlock(ln1, qk, v, attention_out, joined_heads, ln2, hidden))
    ln_f = layer_norm("ln_f", x)
    logits = linear("lm_head", ln_f.out)  # (N, V)
    log_probs = logits.log_softmax(1)
    targets = targets.reshape(N, 1)
    loss = -log_probs.gather(1, targets).mean()

    # Backward. The gradient of the cross-entropy is the probabilities, less 1 at the target, divided by N.
    grad = log_probs.exp_().scatter_add_(1, targets, log_probs.new_full((N, 1), -1.0)).div_(N)
    grad = layer_norm_backward(ln_f, linear_backward("lm_head", ln_f.out, grad))
    for layer, saved in reversed(list(enumerate(saved_blocks))):
        # Feed-forward; `grad` stays that of the residual stream, `inner` is that of the branch.
        inner = linear_backward(f"blocks.{layer}.ffwd.net.2", saved.hidden, grad)
        inner = aten.threshold_backward(inner, saved.hidden, 0)
        inner = linear_backward(f"blocks.{layer}.ffwd.net.0", saved.ln2.out, inner)
        grad = grad.add_(layer_norm_backward(saved.ln2, inner))
        # Attention.
        inner = linear_backward(f"blocks.{layer}.sa.proj", saved.joined_heads, grad)
        inner = inner.view(B, T, H, S).transpose(1, 2)  # (B, H, T, S)
        q, k = saved.qk.out
        q_grad, k_grad, v_grad = attention_backward(q, k, saved.v, saved.attention, inner)
        if cos_sin is not None or config.qk_norm:
            q_grad, k_grad = qk_norm_and_rotary_backward(saved.qk, torch.stack((q_grad, k_grad)), cos_sin)
        inner = torch.stack([g.transpose(1, 2) for g in (q_grad, k_grad, v_grad)], dim=2).view(N, 3 * C)
        inner = linear_backward(f"blocks.{layer}.sa.qkv", saved.ln1.out, inner, bias=False)
        grad = grad.add_(layer_norm_backward(saved.ln1, inner))
    if cos_sin is None:
        position_grad = grad.view(B, T, C).sum(0)
        gradients["position_embedding_table.weight"] = F.pad(position_grad, (0, 0, 0, config.block_size - T))
    token_grad = torch.zeros_like(weights["token_embedding_table.weight"])
    gradients["token_embedding_table.weight"] = token_grad.index_add_(0, idx.reshape(N), grad)
    return loss, [gradients[name] for name in weights]


def qk_norm_and_rotary(x: Tensor, qk_norm: bool, cos_sin: Tensor | None) -> SavedQK:
    """Forward of `apply_qk_norm_and_rotary`, for queries and keys (2, B, H, T, S) at once."""
    rrms = None
    if qk_norm:
        rrms = (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()
        x = x * rrms
    return SavedQK(x if cos_sin is None else apply_rotary(x, cos_sin), x, rrms)


def qk_norm_and_rotary_backward(saved: SavedQK, grad: Tensor, cos_sin: Tensor | None) -> Tensor:
    """The gradient (2, B, H, T, S) of the input of `qk_norm_and_rotary` from that of its output."""
    if cos_sin is not None:
        grad = apply_rotary(grad, torch.stack([cos_sin[0], -cos_sin[1]]))  # the inverse rotation
    if saved.rrms is not None:
        normed = saved.before_rotary
        grad = (grad - normed * (grad * normed).mean(-1, keepdim=True)) * saved.rrms
    return grad


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of q, k and v, (B, H, T, S) each.

    Returns:
        its output (B, H, T, S), and what is saved for backward: the attention weights (B, H, T, T), or, from
        the flash kernel, which does not keep them, the logsumexp of the scores (B, H, T).
    """
    T, S = q.shape[-2:]
    if not use_math_attention(T):
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT) * S**-0.5
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)  # (B, H, T, T)
    return weights @ v, weights


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, saved: tuple[Tensor, Tensor], grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of the output of `attention`, all (B, H, T, S).

    Args:
        saved: the result of `attention`.
    """
    out, weights = saved  # with the flash kernel: out and logsumexp
    if not use_math_attention(q.shape[-2]):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, weights, 0.0, True
        )
    weights_grad = grad @ v.mT  # (B, H, T, T)
    softmax_grad = weights * (weights_grad - (weights_grad * weights).sum(-1, keepdim=True))
    scores_grad = softmax_grad * q.shape[-1] ** -0.5
    return scores_grad @ k, scores_grad.mT @ q, weights.mT @ grad


def use_math_attention(T: int) -> bool:
    """Whether to compute attention by plain matrix products.

    They are faster in short, compiled attention, where the compiler fuses the operations in between.
    """
    return torch.compiler.is_compiling() and T <= MATH_ATTENTION_MAX_T
