"""The optimizers: AdamW, SGD and Muon.

They compute the updates of torch.optim, with the same fused operators and state names. torch.optim is
not used: creating one of its optimizers imports PyTorch's compiler, which takes longer than a short run, and
its step looks up the state of every parameter anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parameters import TrainConfig

ADAMW_EPS = 1e-8

# Newton-Schulz iteration x -> a x + b x^3 + c x^5 of Muon: five steps bring singular values that are not tiny
# to between 0.7 and 1.2, which is close enough to 1 (Jordan et al. 2024).
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ADAMW_RMS = 0.2  # typical RMS of AdamW's update, in units of the learning rate


class Optimizer:
    """Base class of the optimizers. Its attributes have the names of torch.optim, which GradScaler relies on.

    Attributes:
        param_groups: dictionaries with "params", "lr", "weight_decay" and further values of the update rule.
        state: the state tensors of each parameter, by name, from its first step on.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        self.param_groups = [group for group in groups if group["params"]]
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the state tensors of each parameter of a group."""
        raise NotImplementedError

    def keys_by_parameter(self) -> dict[Tensor, tuple[str, ...]]:
        """Return `state_keys` for each parameter."""
        return {p: self.state_keys(group) for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, [p.grad for p in params])

    def _update(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> None:
        raise NotImplementedError

    def _states(self, group: dict[str, Any], params: list[Tensor]) -> list[list[Tensor]]:
        """Return the state tensors of the parameters, one list per state key; zeros before the first step."""
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
        steps, means, squares = self._states(group, params)
        if steps[-1] is not steps[0]:  # after loading a checkpoint: all parameters share one step tensor
            for p in params:
                self.state[p]["step"] = steps[0]
        steps[0] += 1
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            params, gradients, means, squares, [], steps[:1] * len(steps),
            lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=ADAMW_EPS,
            amsgrad=False, maximize=False,
        )  # fmt: skip


class SGD(Optimizer):
    """SGD with momentum; weight decay is added to the gradient. Groups have "momentum"."""

    def state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _update(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> None:
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
        if group["momentum"]:
            (buffers,) = self._states(group, params)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            gradients = buffers
        torch._foreach_add_(params, gradients, alpha=-group["lr"])


class Muon(AdamW):
    """Muon for groups with "momentum", AdamW for the others, with one learning rate.

    The update of a hidden matrix is its Nesterov momentum, orthogonalized (Jordan et al. 2024, Muon: an
    optimizer for hidden layers in neural networks) and scaled to the RMS of AdamW's updates (Liu et al. 2025,
    Muon is scalable for LLM training). Weight decay is decoupled. A matrix of shape (3 C, C) is taken as
    three: the fused query, key and value matrices.
    """

    def state_keys(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if "momentum" in group else super().state_keys(group)

    def _update(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> None:
        if "momentum" not in group:
            super()._update(group, params, gradients)
            return
        (buffers,) = self._states(group, params)
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[torch.Size, list[int]] = {}
        for i, parameter in enumerate(params):
            by_shape.setdefault(parameter.shape, []).append(i)
        for places in by_shape.values():  # stacked, for few and large matrix products
            steps = torch.stack([gradients[i] for i in places])
            steps.lerp_(torch.stack([buffers[i] for i in places]), group["momentum"])  # (N, R, C)
            N, R, C = steps.shape
            if R == 3 * C:
                steps = steps.view(3 * N, C, C)
            scale = ADAMW_RMS * max(steps.shape[1:]) ** 0.5
            steps = orthogonalize(steps).reshape(N, R, C)
            torch._foreach_add_([params[i] for i in places], steps.unbind(), alpha=-group["lr"] * scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return approximately the nearest semi-orthogonal matrices: (N, R, C) -> (N, R, C).

    By Newton-Schulz iteration, which needs matrix products only: it brings the singular values close to 1 and
    keeps the singular vectors.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # so that the products below have the smaller side
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def create_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Return the optimizer of the model's parameters. Matrices have weight decay, biases and norms have none.

    Muon updates the matrices of the blocks; AdamW updates embeddings, head and vectors.
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
