"""The optimizers: AdamW, SGD and Muon. Their updates are those of torch.optim, with the same fused operators.

torch.optim is not used: creating one of its optimizers imports PyTorch's compiler, 822 modules, which takes
1.05 to 1.3 s at each start (0.02 s here), and the fused AdamW step of 40 small tensors takes 0.34 ms (0.18 ms
here). benchmarks/shortcuts.py measures both.
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


Tensors = list[Tensor]


class Optimizer:
    """Updates parameters in groups. Its attributes have the names of torch.optim, which GradScaler relies on.

    Args:
        groups: dictionaries with "params", "lr", "weight_decay", "update" (a function below), "state" (the
            names of its state tensors), and what else it reads.

    Attributes:
        param_groups: the groups that have parameters.
        state: the state tensors of each parameter, by name; zeros before the first step.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        self.param_groups = [group for group in groups if group["params"]]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        for group in self.param_groups:
            step = group["params"][0].new_zeros(())  # one tensor for all parameters of a group
            for p in group["params"]:
                self.state[p] = {
                    key: step if key == "step" else torch.zeros_like(p) for key in group["state"]
                }

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                states = {key: [self.state[p][key] for p in params] for key in group["state"]}
                group["update"](group, params, [p.grad for p in params], **states)


def adamw(
    group: dict, params: Tensors, gradients: Tensors, step: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors
) -> None:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
    step[0] += 1
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        params, gradients, exp_avg, exp_avg_sq, [], step,
        lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=ADAMW_EPS,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def sgd(group: dict, params: Tensors, gradients: Tensors, momentum_buffer: Tensors | None = None) -> None:
    """SGD with momentum; weight decay is added to the gradient."""
    if group["weight_decay"]:
        gradients = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
    if momentum_buffer:
        torch._foreach_mul_(momentum_buffer, group["momentum"])
        torch._foreach_add_(momentum_buffer, gradients)
        gradients = momentum_buffer
    torch._foreach_add_(params, gradients, alpha=-group["lr"])


def muon(group: dict, params: Tensors, gradients: Tensors, momentum_buffer: Tensors) -> None:
    """Muon, for matrices: their Nesterov momentum, orthogonalized, is the update.

    Jordan et al. 2024, Muon: an optimizer for hidden layers in neural networks; scaled to the RMS of AdamW's
    updates as in Liu et al. 2025, Muon is scalable for LLM training. Weight decay is decoupled. A matrix of
    shape (3 C, C) is taken as three: the fused query, key and value matrices.
    """
    torch._foreach_lerp_(momentum_buffer, gradients, 1 - group["momentum"])
    torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
    for shape in {p.shape: None for p in params}:  # stacked, for few and large matrix products
        places = [i for i, p in enumerate(params) if p.shape == shape]
        steps = torch.stack([gradients[i] for i in places])  # (N, R, C)
        steps.lerp_(torch.stack([momentum_buffer[i] for i in places]), group["momentum"])
        R, C = shape
        steps = orthogonalize(steps.view(-1, C, C) if R == 3 * C else steps)
        scale = ADAMW_RMS * max(steps.shape[1:]) ** 0.5
        updates = steps.reshape(-1, R, C).unbind()
        torch._foreach_add_([params[i] for i in places], updates, alpha=-group["lr"] * scale)


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
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if p.dim() >= 2}
    vectors = [p for p in named.values() if p.dim() < 2]
    hidden = [name for name in matrices if name.startswith("blocks.") and config.optimizer == "muon"]
    for_muon = [matrices.pop(name) for name in hidden]
    rates = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    momentum = {"momentum": config.beta1}
    rule: dict[str, Any] = {"update": adamw, "state": ("step", "exp_avg", "exp_avg_sq")}
    rule["betas"] = config.beta1, config.beta2
    if config.optimizer == "sgd":
        rule = {"update": sgd, "state": ("momentum_buffer",) if config.beta1 else (), **momentum}
    return Optimizer(
        [
            {"params": for_muon, **rates, "update": muon, "state": ("momentum_buffer",), **momentum},
            {"params": list(matrices.values()), **rates, **rule},
            {"params": vectors, **rates, **rule, "weight_decay": 0.0},
        ]
    )
