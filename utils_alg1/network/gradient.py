"""The gradient, written out: what backpropagation does to this model, operator by operator.

Autograd finds the same numbers from model.py alone, for any device and with dropout. At the sizes that a
laptop trains, much of its time is bookkeeping; a plain function of tensors has none, and torch.compile
makes one program of it, forward and backward. The letters of the shapes are those of model.py, N = B T.

Below, `g` is the gradient of the loss with respect to whatever the line before names; the way back through
a block reads its lines from the last to the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parameters import ModelConfig
from utils_alg1.network.rotary import rotate, rotations

aten = torch.ops.aten
EPSILON = 1e-5  # of torch.nn.LayerNorm
OPTIONS = {"positions", "qk_norm", "zero_init"}  # of the model, that are served here
PLAIN_ATTENTION = 64  # characters up to which compiled attention is quicker as plain products


class Norm(NamedTuple):
    """A layer norm of (N, C), and what the way back needs."""

    name: str
    x: Tensor  # (N, C), before
    out: Tensor  # (N, C)
    mean: Tensor  # (N, 1)
    rstd: Tensor  # (N, 1)


class Compared(NamedTuple):
    """Queries and keys as they meet, (2, B, H, T, S), and what the way back needs."""

    out: Tensor
    straight: Tensor  # before they were turned
    scale: Tensor | None  # (2, B, H, T, 1): what gave each its length, with qk_norm


class BlockValues(NamedTuple):
    """What the way back through a block needs of the way there."""

    ln1: Norm
    compared: Compared
    v: Tensor  # (B, H, T, S)
    attended: tuple[Tensor, Tensor]  # see `attention`
    joined: Tensor  # (N, C), the heads' outputs side by side
    ln2: Norm
    hidden: Tensor  # (N, 4 C), after ReLU


def loss_and_gradients(
    weights: Mapping[str, Tensor], config: ModelConfig, idx: Tensor, targets: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The mean cross-entropy of a batch, and its gradient.

    Args:
        weights: by the names of BigramLanguageModel.named_parameters().
        config: the sizes of that model. Its dropout does not happen.
        idx: (B, T) int64 tokens.
        targets: (B, T) int64 tokens that follow.

    Returns:
        the loss in nats (a scalar), and the gradients in the order of `weights`.
    """
    B, T = idx.shape
    N, C, H = B * T, config.n_embd, config.n_head
    S = config.head_size
    turns = rotations(config, 0, T, idx.device)
    gradients: dict[str, Tensor] = {}

    def linear(name: str, x: Tensor) -> Tensor:
        return torch.addmm(weights[f"{name}.bias"], x, weights[f"{name}.weight"].t())

    def linear_back(name: str, x: Tensor, g: Tensor, bias: bool = True) -> Tensor:
        gradients[f"{name}.weight"] = g.t() @ x
        if bias:
            gradients[f"{name}.bias"] = g.sum(0)
        return g @ weights[f"{name}.weight"]

    def norm(name: str, x: Tensor) -> Norm:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return Norm(name, x, *torch.native_layer_norm(x, (C,), weight, bias, EPSILON))

    def norm_back(n: Norm, g: Tensor) -> Tensor:
        weight, bias = weights[f"{n.name}.weight"], weights[f"{n.name}.bias"]
        g, gradients[f"{n.name}.weight"], gradients[f"{n.name}.bias"] = aten.native_layer_norm_backward(
            g, n.x, (C,), n.mean, n.rstd, weight, bias, (True, True, True)
        )
        return g

    # The way there.
    x = F.embedding(idx, weights["token_embedding_table.weight"])  # (B, T, C)
    if turns is None:
        x = x + weights["position_embedding_table.weight"][:T]
    x = x.view(N, C)
    blocks: list[BlockValues] = []
    for layer in range(config.n_layer):
        ln1 = norm(f"blocks.{layer}.ln1", x)
        qkv = ln1.out @ weights[f"blocks.{layer}.sa.qkv.weight"].t()  # (N, 3 C)
        heads = qkv.view(B, T, 3, H, S).permute(2, 0, 3, 1, 4)  # (3, B, H, T, S)
        compared, v = compare(heads[:2], config.qk_norm, turns), heads[2]
        q, k = compared.out
        attended = attention(q, k, v)
        joined = attended[0].transpose(1, 2).reshape(N, C)
        x = linear(f"blocks.{layer}.sa.proj", joined).add_(x)
        ln2 = norm(f"blocks.{layer}.ln2", x)
        hidden = linear(f"blocks.{layer}.ffwd.net.0", ln2.out).relu_()
        x = linear(f"blocks.{layer}.ffwd.net.2", hidden).add_(x)
        blocks.append(BlockValues(ln1, compared, v, attended, joined, ln2, hidden))
    ln_f = norm("ln_f", x)
    logits = linear("lm_head", ln_f.out)  # (N, V)
    log_p = logits.log_softmax(1)
    answers = targets.reshape(N, 1)
    loss = -log_p.gather(1, answers).mean()

    # The way back. Of the cross-entropy: the probabilities, less 1 at the right answer.
    g = log_p.exp_().scatter_add_(1, answers, log_p.new_full((N, 1), -1.0)).div_(N)
    g = norm_back(ln_f, linear_back("lm_head", ln_f.out, g))
    for layer, b in reversed(list(enumerate(blocks))):
        inner = linear_back(f"blocks.{layer}.ffwd.net.2", b.hidden, g)
        inner = aten.threshold_backward(inner, b.hidden, 0)
        g = g.add_(norm_back(b.ln2, linear_back(f"blocks.{layer}.ffwd.net.0", b.ln2.out, inner)))
        inner = linear_back(f"blocks.{layer}.sa.proj", b.joined, g)
        q, k = b.compared.out
        q, k, v = attention_back(q, k, b.v, b.attended, inner.view(B, T, H, S).transpose(1, 2))
        if turns is not None or config.qk_norm:
            q, k = compare_back(b.compared, torch.stack((q, k)), turns)
        inner = torch.stack([part.transpose(1, 2) for part in (q, k, v)], dim=2).view(N, 3 * C)
        inner = linear_back(f"blocks.{layer}.sa.qkv", b.ln1.out, inner, bias=False)
        g = g.add_(norm_back(b.ln1, inner))
    if turns is None:
        places = g.view(B, T, C).sum(0)
        gradients["position_embedding_table.weight"] = F.pad(places, (0, 0, 0, config.block_size - T))
    table = torch.zeros_like(weights["token_embedding_table.weight"])
    gradients["token_embedding_table.weight"] = table.index_add_(0, idx.reshape(N), g)
    return loss, [gradients[name] for name in weights]


def compare(x: Tensor, qk_norm: bool, turns: Tensor | None) -> Compared:
    """MultiHeadAttention.compared, of queries and keys (2, B, H, T, S) at once."""
    scale = None
    if qk_norm:
        scale = (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()
        x = x * scale
    return Compared(x if turns is None else rotate(x, turns), x, scale)


def compare_back(c: Compared, g: Tensor, turns: Tensor | None) -> Tensor:
    """The gradient (2, B, H, T, S) of what was compared."""
    if turns is not None:
        g = rotate(g, torch.stack([turns[0], -turns[1]]))  # by the same angle, backwards
    if c.scale is not None:
        g = (g - c.straight * (g * c.straight).mean(-1, keepdim=True)) * c.scale
    return g


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of (B, H, T, S): its output (B, H, T, S), and what the way back needs of it.

    That is the weights (B, H, T, T), or the logarithms of their sums (B, H, T) where they are not kept.
    """
    T, S = q.shape[-2:]
    if not is_plain(T):
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT) * S**-0.5
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)  # (B, H, T, T)
    return weights @ v, weights


def attention_back(
    q: Tensor, k: Tensor, v: Tensor, attended: tuple[Tensor, Tensor], g: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, all (B, H, T, S) as they are, from that of attention's output."""
    out, kept = attended
    if not is_plain(q.shape[-2]):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, out, kept, 0.0, True)
    weights_g = g @ v.mT  # (B, H, T, T)
    scores_g = kept * (weights_g - (weights_g * kept).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    return scores_g @ k, scores_g.mT @ q, kept.mT @ g


def is_plain(T: int) -> bool:
    """Whether attention is plain products: the compiler joins what lies between them, if they are small."""
    return torch.compiler.is_compiling() and T <= PLAIN_ATTENTION
