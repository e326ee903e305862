"""The optimizers: AdamW, SGD and Muon. Their updates are those of torch.optim, with the same fused operators.

torch.optim is not used: creating one of its optimizers imports PyTorch's compiler at each start, and a fused
step of fifty small tensors takes longer than that of the few joined ones here. benchmarks/shortcuts.py
measures both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parameters import TrainConfig
from utils_alg1.training.arithmetic import Arithmetic
from utils_alg1.training.flat import FlatParameters

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
        groups: dictionaries with "flat" (FlatParameters), "form" (that in which they are updated), "lr",
            "weight_decay", "update" (a function below), "state" (the names of its state tensors), and what
            else it reads.

    Attributes:
        param_groups: the same, where "params" is the tensor of its parameters.
        state: the state tensors of each of these, by name; zeros before the first step.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        self.param_groups = groups
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._updates: list[Callable[[], None]] = []
        for group in groups:
            flat, form = group["flat"], group["form"]
            group["params"] = [flat.tensor]
            state = {key: torch.zeros_like(flat.tensor) for key in group["state"]}
            if "step" in state:
                state["step"] = flat.tensor.new_zeros(())  # one for all parameters of a group
            self.state[flat.tensor] = state
            lists = {key: [t] if key == "step" else flat.views(t, form) for key, t in state.items()}
            params, gradients = flat.views(flat.tensor, form), flat.views(flat.gradient, form)
            self._updates.append(partial(group["update"], group, params, gradients, **lists))

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter."""
        for update in self._updates:
            update()

    @property
    def flats(self) -> list[FlatParameters]:
        """The parameters of each group."""
        return [group["flat"] for group in self.param_groups]


def adamw(
    group: dict, params: Tensors, gradients: Tensors, step: Tensors, exp_avg: Tensors, exp_avg_sq: Tensors
) -> None:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
    step[0] += 1
    steps = step * len(params)
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        params, gradients, exp_avg, exp_avg_sq, [], steps,
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
    for p, gradient, momentum in zip(params, gradients, momentum_buffer, strict=True):  # (N, R, C) each
        momentum.lerp_(gradient, 1 - group["momentum"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        steps = gradient.lerp(momentum, group["momentum"])
        R, C = p.shape[1:]
        steps = orthogonalize(steps.reshape(-1, C, C) if R == 3 * C else steps, group["dtype"])
        scale = ADAMW_RMS * max(steps.shape[1:]) ** 0.5
        p.add_(steps.reshape(p.shape), alpha=-group["lr"] * scale)


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return approximately the nearest semi-orthogonal matrices: (N, R, C) -> (N, R, C).

    By Newton-Schulz iteration, which needs matrix products only: it brings the singular values close to 1 and
    keeps the singular vectors. The products may be computed in bfloat16, as Jordan et al. do.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # so that the products below have the smaller side
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def create_optimizer(model: nn.Module, config: TrainConfig, arithmetic: Arithmetic) -> Optimizer:
    """Return the optimizer of the model's parameters. Matrices have weight decay, biases and norms have none.

    Muon updates the matrices of the blocks; AdamW updates embeddings, head and vectors.
    """
    rates = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    momentum = {"momentum": config.beta1}
    rule: dict[str, Any] = {"update": adamw, "state": ("step", "exp_avg", "exp_avg_sq")}
    rule |= {"betas": (config.beta1, config.beta2), "form": "joined" if arithmetic.joined else "each"}
    if config.optimizer == "sgd":
        state = ("momentum_buffer",) if config.beta1 else ()
        rule = {"update": sgd, "state": state, "form": "joined", **momentum}
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if p.dim() >= 2}
    vectors = {name: p for name, p in named.items() if p.dim() < 2}
    for_muon: dict[torch.Size, dict[str, nn.Parameter]] = {}  # by shape
    for name in [n for n in matrices if n.startswith("blocks.") and config.optimizer == "muon"]:
        p = matrices.pop(name)
        for_muon.setdefault(p.shape, {})[name] = p
    muon_rule = {"update": muon, "state": ("momentum_buffer",), "form": "stacked", **momentum}
    muon_rule["dtype"] = getattr(torch, arithmetic.muon)
    return Optimizer(
        [
            *({"flat": FlatParameters(same), **rates, **muon_rule} for same in for_muon.values()),
            {"flat": FlatParameters(matrices), **rates, **rule},
            {"flat": FlatParameters(vectors), **rates, **rule, "weight_decay": 0.0},
        ]
    )
