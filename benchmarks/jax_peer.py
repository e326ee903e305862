"""ALG1's model and training step in JAX: one jitted function of forward, backward, clipping and AdamW.

XLA takes its number of threads from the environment when it starts, so `JaxSteps` runs this file as a process
of its own, which takes as many steps as each line of its standard input says, and waits for the next line.
Shapes use the letters of model.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

LAYER_NORM_EPS = 1e-5
BETA1, BETA2, ADAMW_EPS, WEIGHT_DECAY = 0.9, 0.999, 1e-8, 0.01


def loss(
    weights: Mapping[str, Any], idx: Any, targets: Any, n_head: int, n_layer: int, dtype: str = "float32"
) -> Any:
    """Return the mean cross-entropy in nats.

    Args:
        weights: by the names of BigramLanguageModel.named_parameters().
        idx, targets: (B, T) integers.
        dtype: of the products of matrices; all else is computed in float32.
    """
    import jax
    import jax.numpy as jnp

    B, T = idx.shape
    causal = jnp.tril(jnp.ones((T, T), bool))

    def product(pattern: str, a: Any, b: Any) -> Any:
        return jnp.einsum(pattern, a.astype(dtype), b.astype(dtype)).astype(jnp.float32)

    def linear(name: str, x: Any) -> Any:
        return product("nc,dc->nd", x, weights[f"{name}.weight"]) + weights.get(f"{name}.bias", 0.0)

    def layer_norm(name: str, x: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + LAYER_NORM_EPS)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["token_embedding_table.weight"][idx] + weights["position_embedding_table.weight"][:T]
    x = x.reshape(B * T, -1)
    for block in (f"blocks.{layer}" for layer in range(n_layer)):
        qkv = linear(f"{block}.sa.qkv", layer_norm(f"{block}.ln1", x)).reshape(B, T, 3, n_head, -1)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # (B, H, T, S) each
        scores = product("bhts,bhus->bhtu", q, k) * q.shape[-1] ** -0.5
        attention = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        out = product("bhtu,bhus->bhts", attention, v).transpose(0, 2, 1, 3).reshape(B * T, -1)
        x = x + linear(f"{block}.sa.proj", out)
        hidden = jax.nn.relu(linear(f"{block}.ffwd.net.0", layer_norm(f"{block}.ln2", x)))
        x = x + linear(f"{block}.ffwd.net.2", hidden)
    log_probs = jax.nn.log_softmax(linear("lm_head", layer_norm("ln_f", x)))
    return -jnp.take_along_axis(log_probs, targets.reshape(-1, 1), axis=1).mean()


def training_step(
    n_head: int, n_layer: int, dtype: str, rate: float = 1e-3, grad_clip: float = 1.0
) -> Callable:
    """Return a jitted step: (weights, averages, step, idx, targets) -> (weights, averages, (loss, norm))."""
    import jax
    import jax.numpy as jnp

    def update(weights: Any, averages: Any, step: Any, idx: Any, targets: Any) -> Any:
        mean_loss, gradients = jax.value_and_grad(loss)(weights, idx, targets, n_head, n_layer, dtype)
        norm = jnp.sqrt(sum(jnp.square(gradient).sum() for gradient in gradients.values()))
        new_weights, new_averages = {}, {}
        for name, w in weights.items():
            gradient = gradients[name] * jnp.minimum(1.0, grad_clip / norm)
            first = BETA1 * averages[name][0] + (1 - BETA1) * gradient
            second = BETA2 * averages[name][1] + (1 - BETA2) * jnp.square(gradient)
            root = jnp.sqrt(second / (1 - BETA2**step)) + ADAMW_EPS
            decayed = w * (1 - rate * WEIGHT_DECAY) if w.ndim > 1 else w
            new_weights[name] = decayed - rate * first / (1 - BETA1**step) / root
            new_averages[name] = first, second
        return new_weights, new_averages, jnp.stack([mean_loss, norm])

    return jax.jit(update, donate_argnums=(0, 1))


class JaxSteps:
    """Takes training steps in a process with a number of threads of its own.

    Args:
        weights: the first ones, by the names of BigramLanguageModel.named_parameters().
        tokens: (n,) integers, of which batches are drawn.
        folder: for the files that the process reads.
    """

    def __init__(
        self, weights: Mapping[str, Any], tokens: np.ndarray, size: Mapping[str, int], dtype: str,
        threads: int, folder: Path,
    ):  # fmt: skip
        np.savez(folder / "weights.npz", **weights)
        np.save(folder / "tokens.npy", tokens)
        settings = json.dumps({**size, "dtype": dtype})
        # PJRT_NPROC sizes the threads of XLA.
        environment = os.environ | {"PJRT_NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, settings],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, count: int) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(count, file=self._process.stdin, flush=True)
        if not self._process.stdout.readline():
            raise SystemExit("the JAX process has failed")


def main() -> None:
    import jax.numpy as jnp

    size = json.loads(sys.argv[1])
    batch_size, block_size = size["batch_size"], size["block_size"]
    weights: Any = {name: jnp.asarray(array) for name, array in np.load("weights.npz").items()}
    averages: Any = {name: (jnp.zeros_like(w), jnp.zeros_like(w)) for name, w in weights.items()}
    tokens = np.load("tokens.npy")
    step = training_step(size["n_head"], size["n_layer"], size["dtype"])
    rng, taken = np.random.default_rng(0), 0
    for line in sys.stdin:
        for _ in range(int(line)):
            taken += 1
            starts = rng.integers(len(tokens) - block_size, size=(batch_size, 1))
            batch = tokens[starts + np.arange(block_size + 1)].astype(np.int32)
            weights, averages, read = step(weights, averages, float(taken), batch[:, :-1], batch[:, 1:])
            mean_loss, _ = np.asarray(read)  # the loss and the norm of the gradient are read at every step
        print(mean_loss, flush=True)


if __name__ == "__main__":
    main()
