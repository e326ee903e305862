"""Manual forward and backward of the model, operator by operator.

Autograd computes the same gradient, up to rounding, from model.py alone, on any device. But for small models
most of its time is overhead, which plain functions of tensors do not have, for large ones it knows one way to
multiply matrices only (see products.py), and torch.compile turns these functions into a single graph, forward
and backward.

Each operator returns its output and its backward: the function from the gradient of the loss with respect to
the output to that with respect to the input. Shapes use the letters of model.py, and N = B T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from parameters import ModelConfig
from utils_alg1.network.attention import choose_attention
from utils_alg1.network.decoder import LAYER_NORM_EPS
from utils_alg1.network.dropout import DropoutMasks, LayerMasks
from utils_alg1.network.products import Products, convert
from utils_alg1.network.rotary import apply_rotary, rotary_cos_sin

Backward = Callable[[Tensor], Tensor]

aten = torch.ops.aten
OPTIONS = {"positions", "qk_norm", "zero_init"}  # the MODEL_OPTIONS implemented here; others need autograd


def loss_and_gradients(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    idx: Tensor,
    targets: Tensor,
    products: Products,
    masks: DropoutMasks | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Compute the mean cross-entropy of a batch and its gradient with respect to every weight.

    Args:
        weights: by the names of BigramLanguageModel.named_parameters().
        config: of that model.
        idx: (B, T) int64 tokens.
        targets: (B, T) int64, the token that follows each of idx.
        products: how the products of the blocks are computed. Those of the head, which are small, norms,
            residual stream and loss have the data type of the weights.
        masks: what dropout keeps, of `draw_masks`; None for no dropout.

    Returns:
        the loss in nats (a scalar), and the gradients in the order of `weights`.
    """
    B, T = idx.shape
    N, C = B * T, config.n_embd
    cos_sin = rotary_cos_sin(config, 0, T, idx.device)
    gradients: dict[str, Tensor] = {}
    layer_masks = [LayerMasks()] * config.n_layer if masks is None else masks.layers
    scale = 1.0 if masks is None else masks.scale

    def linear(
        name: str,
        x: Tensor,
        relu: bool = False,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        by: Products = products,
    ) -> tuple[Tensor, Backward]:
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        dtype, x, weight = weight.dtype, by.cast(x), by.cast(weight)
        factor = None if mask is None else mask.to(dtype).mul_(scale)  # of dropout

        def backward(grad: Tensor) -> Tensor:
            grad = by.cast(grad if factor is None else grad * factor)
            x_grad, weight_grad, bias_grad = by.backward(grad, x, weight, bias is not None, dtype)
            gradients[f"{name}.weight"] = weight_grad
            if bias_grad is not None:
                gradients[f"{name}.bias"] = bias_grad
            return x_grad

        if residual is None:
            return by.linear(x, weight, bias, relu), backward
        if factor is None:
            return by.linear_add(x, weight, bias, residual), backward
        return torch.addcmul(residual, convert(by.linear(x, weight, bias), dtype), factor), backward

    def layer_norm(name: str, x: Tensor) -> tuple[Tensor, Backward]:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        out, mean, rstd = torch.native_layer_norm(x, (C,), weight, bias, LAYER_NORM_EPS)

        def backward(grad: Tensor) -> Tensor:
            x_grad, weight_grad, bias_grad = aten.native_layer_norm_backward.default(
                convert(grad, x.dtype), x, (C,), mean, rstd, weight, bias, (True, True, True)
            )
            gradients[f"{name}.weight"], gradients[f"{name}.bias"] = weight_grad, bias_grad
            return x_grad

        return out, backward

    # Forward.
    x = F.embedding(idx, weights["token_embedding_table.weight"])  # (B, T, C)
    if cos_sin is None:
        x = x + weights["position_embedding_table.weight"][:T]
    x = x.view(N, C)
    branches: list[tuple[Backward, ...]] = []
    for layer in range(config.n_layer):
        block = f"blocks.{layer}"
        out, ln1 = layer_norm(f"{block}.ln1", x)
        out, qkv = linear(f"{block}.sa.qkv", out)  # (N, 3 C)
        out = out.view(B, T, 3, config.n_head, -1)
        out, attend = self_attention(out, config.qk_norm, cos_sin, layer_masks[layer].attention, scale)
        x, proj = linear(f"{block}.sa.proj", out, residual=x, mask=layer_masks[layer].proj)
        out, ln2 = layer_norm(f"{block}.ln2", x)
        out, up = linear(f"{block}.ffwd.net.0", out, relu=True)  # (N, 4 C)
        activation = relu_backward(out)
        x, down = linear(f"{block}.ffwd.net.2", out, residual=x, mask=layer_masks[layer].down)
        branches += (proj, attend, qkv, ln1), (down, activation, up, ln2)
    out, ln_f = layer_norm("ln_f", x)
    logits, lm_head = linear("lm_head", out, by=Products(out.dtype))  # (N, V)
    log_probs = logits.log_softmax(1)
    targets = targets.reshape(N, 1)
    loss = -log_probs.gather(1, targets).mean()

    # Backward. The gradient of the cross-entropy is the probabilities, less 1 at the target, divided by N.
    grad = log_probs.exp_().scatter_add_(1, targets, log_probs.new_full((N, 1), -1.0)).div_(N)
    grad = ln_f(lm_head(grad))
    for branch in reversed(branches):
        inner = grad  # `grad` stays that of the residual stream
        for backward in branch:
            inner = backward(inner)
        grad = grad.add_(inner)
    if cos_sin is None:
        position_grad = grad.view(B, T, C).sum(0)
        gradients["position_embedding_table.weight"] = F.pad(position_grad, (0, 0, 0, config.block_size - T))
    token_grad = torch.zeros_like(weights["token_embedding_table.weight"])
    gradients["token_embedding_table.weight"] = token_grad.index_add_(0, idx.reshape(N), grad)
    return loss, [gradients[name] for name in weights]


def relu_backward(out: Tensor) -> Backward:
    """Return the backward of a ReLU from its output. It works in place."""
    return lambda grad: aten.threshold_backward.grad_input(grad, out, 0, grad_input=grad)


def self_attention(
    qkv: Tensor,
    qk_norm: bool,
    cos_sin: Tensor | None,
    kept: list[Tensor] | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Backward]:
    """Causal attention of queries, keys and values (B, T, 3, H, S), with the heads joined: (N, C).

    kept, scale: the dropout of attention weights; see `blocked_attention`.
    """
    B, T, _, H, S = qkv.shape
    attention, dtype = choose_attention(qkv.dtype, T, kept, scale)
    qk, v = qkv.permute(2, 0, 3, 1, 4).split((2, 1))  # (2, B, H, T, S), (1, B, H, T, S)
    qk, qk_backward = qk_norm_and_rotary(qk, qk_norm, cos_sin)
    qk = convert(qk, dtype)
    out, attention_backward = attention(qk[0], qk[1], convert(v[0], dtype))

    def backward(grad: Tensor) -> Tensor:
        grads = attention_backward(convert(grad, dtype).view(B, T, H, S).transpose(1, 2))
        if cos_sin is not None or qk_norm:
            grads = (*qk_backward(torch.stack(grads[:2])), grads[2])
        by_head = [g.transpose(1, 2) for g in grads]
        if dtype is qkv.dtype and grads[0].dtype is dtype:
            return torch.stack(by_head, dim=2).view(B * T, -1)
        joined = torch.empty_like(qkv)
        torch._foreach_copy_(joined.unbind(2), by_head)  # converts too
        return joined.view(B * T, -1)

    return out.transpose(1, 2).reshape(B * T, -1), backward


def qk_norm_and_rotary(x: Tensor, qk_norm: bool, cos_sin: Tensor | None) -> tuple[Tensor, Backward]:
    """`apply_qk_norm_and_rotary`, for queries and keys (2, B, H, T, S) at once; in float32 if they have less.

    bfloat16 takes fewer passes through memory; float32 is rounded as in earlier versions, whose runs go on to
    the same bytes.
    """
    if not qk_norm and cos_sin is None:
        return x, lambda grad: grad
    fused, S = x.dtype is torch.bfloat16, x.shape[-1]
    x = x.float() if fused else x
    normed, rrms = x, None
    if qk_norm:
        if fused:
            mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / S
        else:
            mean_square = x.square().mean(-1, keepdim=True)
        rrms = (mean_square + torch.finfo(x.dtype).eps).rsqrt()
        normed = x * rrms

    def backward(grad: Tensor) -> Tensor:
        grad = convert(grad, x.dtype)
        if cos_sin is not None:
            grad = rotate(grad, torch.stack([cos_sin[0], -cos_sin[1]]), fused)  # the inverse rotation
        if rrms is None:
            return grad
        mean = (grad * normed).mean(-1, keepdim=True)
        if fused:
            return torch.addcmul(grad, normed, mean, value=-1).mul_(rrms)
        return (grad - normed * mean) * rrms

    return normed if cos_sin is None else rotate(normed, cos_sin, fused), backward


def rotate(x: Tensor, cos_sin: Tensor, fused: bool) -> Tensor:
    """`apply_rotary` with fewer passes through memory.

    fused: whether to round once where apply_rotary rounds twice.
    """
    if torch.compiler.is_compiling():  # it fuses all of it
        return apply_rotary(x, cos_sin)
    cos, sin = cos_sin
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (a, b), (rotated_a, rotated_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=rotated_a)
    torch.mul(a, sin, out=rotated_b)
    if fused:
        rotated_a.addcmul_(b, sin, value=-1)
        rotated_b.addcmul_(b, cos)
    else:
        rotated_a.sub_(b * sin)
        rotated_b.add_(b * cos)
    return out
