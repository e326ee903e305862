"""The optimizers: AdamW, SGD and Muon.

The same updates as torch.optim's, by the same fused operators, and the same names for what they keep. Theirs
are not used because creating any of them imports PyTorch's compiler, which takes longer than all that a short
run computes, and because they look at every parameter's state anew in each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parameters import TrainConfig

EPSILON = 1e-8  # AdamW's

# Of Muon's iteration x -> a x + b x^3 + c x^5: five rounds take singular values that are not tiny to between
# 0.7 and 1.2, and nearer is not needed (Jordan et al. 2024).
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ADAMW_RMS = 0.2  # how large an element of AdamW's steps is, in units of the learning rate


class Optimizer:
    """What every optimizer has; the names are torch.optim's, which GradScaler relies on.

    Attributes:
        param_groups: "params", a list of parameters, "lr", "weight_decay", and what else their rule reads.
        state: what is kept for each parameter, from its first step on.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        self.param_groups = [group for group in groups if group["params"]]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of what is kept for each parameter of a group after a step."""
        raise NotImplementedError

    def keys_by_parameter(self) -> dict[Tensor, tuple[str, ...]]:
        """`state_keys` for each parameter."""
        return {p: self.state_keys(group) for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self) -> None:
        """Take one step from the gradients; a parameter without one stays."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, [p.grad for p in params])

    def _update(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> None:
        raise NotImplementedError

    def _kept(self, group: dict[str, Any], params: list[Tensor]) -> list[list[Tensor]]:
        """One list over the parameters for each of `state_keys`, zeros before the first step."""
        keys = self.state_keys(group)
        for p in params:
            if p not in self.state:
                fresh = {key: p.new_zeros(()) if key == "step" else torch.zeros_like(p) for key in keys}
                self.state[p] = fresh
        return [[self.state[p][key] for p in params] for key in keys]


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019). Groups have "betas"."""

    def state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "step", "exp_avg", "exp_avg_sq"

    def _update(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> None:
        steps, means, squares = self._kept(group, params)
        if steps[-1] is not steps[0]:  # they count together, so one count serves all
            for p in params:
                self.state[p]["step"] = steps[0]
        steps[0] += 1
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            params, gradients, means, squares, [], steps[:1] * len(steps),
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=EPSILON,
            amsgrad=False, maximize=False,
        )  # fmt: skip


class SGD(Optimizer):
    """Gradient descent with momentum; weight decay is added to the gradient. Groups have "momentum"."""

    def state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> None:
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
        if group["momentum"]:
            (buffers,) = self._kept(group, params)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            gradients = buffers
        torch._foreach_add_(params, gradients, alpha=-group["lr"])


class Muon(AdamW):
    """Muon for the matrices of groups with "momentum", AdamW for the others; one learning rate serves both.

    A hidden matrix takes its Nesterov momentum, orthogonalised (Jordan et al. 2024, Muon: an optimizer for
    hidden layers in neural networks), and scaled so that its elements are about as large as those of AdamW's
    steps (Liu et al. 2025, Muon is scalable for LLM training). Weight decay is decoupled. A matrix of 3 C
    rows and C columns is three on top of each other, as the fused query, key and value are.
    """

    def state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if "momentum" in group else super().state_keys(group)

    def _update(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> None:
        if "momentum" not in group:
            super()._update(group, params, gradients)
            return
        (buffers,) = self._kept(group, params)
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[torch.Size, list[int]] = {}
        for i, parameter in enumerate(params):
            by_shape.setdefault(parameter.shape, []).append(i)
        for places in by_shape.values():  # together they make few and large products
            steps = torch.stack([gradients[i] for i in places])
            steps.lerp_(torch.stack([buffers[i] for i in places]), group["momentum"])  # (N, R, C)
            N, R, C = steps.shape
            if R == 3 * C:
                steps = steps.view(3 * N, C, C)
            scale = ADAMW_RMS * max(steps.shape[1:]) ** 0.5
            steps = orthogonalise(steps).reshape(N, R, C)
            torch._foreach_add_([params[i] for i in places], steps.unbind(), alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """About the nearest matrices whose singular values are all 1: (N, R, C) -> (N, R, C).

    By Newton-Schulz iteration, which takes products only and leaves the singular vectors as they are.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the products below are of the smaller side
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def create_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer over the model's parameters; matrices decay, biases and norms do not.

    Muon's hidden matrices are those of the blocks: not the embeddings, nor the head.
    """
    hidden: list[Tensor] = []
    tables: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        else:
            (hidden if name.startswith("blocks.") else tables).append(parameter)
    decays = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    stays = decays | {"params": vectors, "weight_decay": 0.0}
    adamw = {"betas": (config.beta1, config.beta2)}
    momentum = {"momentum": config.beta1}
    if config.optimizer == "muon":
        muon = decays | momentum | {"params": hidden}
        return Muon([muon, decays | adamw | {"params": tables}, stays | adamw])
    matrices = decays | {"params": hidden + tables}
    if config.optimizer == "sgd":
        return SGD([matrices | momentum, stays | momentum])
    return AdamW([matrices | adamw, stays | adamw])
