"""The products of activations and weights in the manual gradient: in which data type, and by which library.

PyTorch multiplies float32 matrices by MKL, which is slow on AMD processors; oneDNN, which is part of PyTorch
too, is not. Its fastest operators are reached by two ways: forward by an operator that is private to PyTorch,
and backward by a convolution with a kernel of size 1, which is the same product.

Shapes: x is (N, in), a weight (out, in), a bias (out), an output and its gradient (N, out).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CONVOLUTION_BATCH = 16  # from here on, PyTorch gives a convolution to oneDNN with one thread too


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in this data type, without a call of `Tensor.to` if it has it: small steps have many."""
    return x if x.dtype is dtype else x.to(dtype)


@dataclass(frozen=True)
class Products:
    """Computes products. The gradients of weights and biases are returned in the data type of the weights.

    Attributes:
        dtype: of the operands, to which activations, weights and gradients are converted; sums are float32.
            Residual stream, norms and loss stay in the data type of the weights.
        onednn: whether to call oneDNN's operators instead of PyTorch's choice, if `onednn_works`. They cannot
            be compiled.
    """

    dtype: torch.dtype = torch.float32
    onednn: bool = False

    def cast(self, x: Tensor) -> Tensor:
        """Return x in the data type of the operands."""
        return convert(x, self.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
        """Compute x @ weight.T + bias, and its ReLU if asked for. x and weight have been cast."""
        if self.onednn:
            operator = torch.ops.mkldnn._linear_pointwise.default
            return operator(x, weight, bias, "relu" if relu else "none", [], "")
        out = F.linear(x, weight, None if bias is None else self.cast(bias))
        return out.relu_() if relu else out

    def linear_add(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        """Compute residual + x @ weight.T + bias, in the data type of the residual."""
        if self.onednn and self.dtype is residual.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
        return convert(self.linear(x, weight, bias), residual.dtype).add_(residual)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients with respect to x, weight and bias, from that with respect to the output.

        Args:
            grad, x, weight: have been cast.
            with_bias: whether there is a bias.
            dtype: of the gradients of weight and bias.
        """
        if self.onednn and self.dtype is torch.float32:
            return _convolution_backward(grad, x, weight, with_bias)
        weight_grad, bias_grad = convert(torch.mm(grad.t(), x), dtype), None
        if with_bias and self.dtype is torch.bfloat16:  # for wide rows, a product is much faster than a sum
            bias_grad = convert(torch.mm(grad.new_ones(1, len(grad)), grad)[0], dtype)
        elif with_bias:
            bias_grad = grad.sum(0)
        return torch.mm(grad, weight), weight_grad, bias_grad


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`Products.backward` as that of a convolution over images of N pixels; their channels are contiguous."""
    N, (n_out, n_in) = len(x), weight.shape
    batch = CONVOLUTION_BATCH if N % CONVOLUTION_BATCH == 0 else 1
    images = [t.reshape(batch, N // batch, 1, -1).permute(0, 3, 1, 2) for t in (grad, x)]
    kernel, wanted = weight.view(n_out, n_in, 1, 1), (True, True, with_bias)
    x_grad, weight_grad, bias_grad = torch.ops.aten.convolution_backward.default(
        *images, kernel, [n_out], (1, 1), (0, 0), (1, 1), False, (0, 0), 1, wanted
    )
    x_grad = x_grad.permute(0, 2, 3, 1).reshape(N, n_in)
    return x_grad, weight_grad.reshape(n_out, n_in), bias_grad if with_bias else None


@functools.cache
def onednn_works(dtype: torch.dtype = torch.float32) -> bool:
    """Return whether oneDNN's private operators are here, and compute what they should in this data type.

    bfloat16 needs AVX512 or the like; float32 does not.
    """
    x, weight = torch.ones(16, 2, dtype=dtype), torch.ones(3, 2, dtype=dtype)
    bias, residual = torch.ones(3), torch.ones(16, 3)  # float32 also between products in bfloat16
    products = Products(dtype, onednn=True)
    try:
        cut = products.linear(x, -weight, bias, relu=True)
        added = products.linear_add(x, weight, bias, residual)
        gradients = products.backward(torch.ones_like(residual, dtype=dtype), x, weight, True, torch.float32)
    except (AttributeError, RuntimeError, TypeError):  # another version of PyTorch, or a build without oneDNN
        return False
    sums = [float(t.sum()) for t in (cut, added, *gradients) if t is not None]
    return sums == [0, 16 * 3 * 4, 16 * 2 * 3, 3 * 2 * 16, 3 * 16]
