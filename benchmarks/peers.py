"""Training steps of other projects, imported from the checkouts named on the command line."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import load, silence


def nanogpt_step(
    checkout: Path, tokens: np.ndarray, size: Mapping[str, Any], dtype: str, folder: Path, compile: bool
) -> Callable[[], float]:
    """Return a training step as nanoGPT's train.py takes it, with its character model's settings.

    That is its GPT without biases, its optimizer, its way of drawing batches (the file is mapped again for
    every batch, the next batch is drawn before the backward pass), and gradient clipping at 1.0. Its train.py
    uses autocast on CUDA only; with bfloat16 on a CPU the same autocast is used here.

    Args:
        size: with vocab_size, dropout and device.
    """
    model_py = load(checkout / "model.py", "nanogpt_model")
    path = folder / "train.bin"
    if not path.exists():
        tokens.astype(np.uint16).tofile(path)
    block_size, batch_size, device = size["block_size"], size["batch_size"], size["device"]

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - block_size, (batch_size,))
        x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts])
        if device == "cuda":
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x, y

    names = ("n_embd", "n_head", "n_layer", "block_size", "vocab_size", "dropout")
    with silence():
        model = model_py.GPT(model_py.GPTConfig(bias=False, **{name: size[name] for name in names})).to(
            device
        )
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    forward = torch.compile(model) if compile else model
    batch = get_batch()

    def step() -> float:
        nonlocal batch
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        with autocast:
            loss = forward(*batch)[1]
        batch = get_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def lecture_step(checkout: Path, tokens: np.ndarray, size: Mapping[str, Any]) -> Callable[[], float]:
    """Return a training step as the lecture's gpt.py takes it, with its classes and its get_batch.

    Importing gpt.py would train, and its classes read module globals: only its imports, classes and get_batch
    are executed, with these sizes as globals: those of the model, vocab_size, dropout and device.
    """
    tree = ast.parse((checkout / "gpt.py").read_text(encoding="utf-8"))
    wanted: list[ast.stmt] = [
        node
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef))
        or (isinstance(node, ast.FunctionDef) and node.name == "get_batch")
    ]
    names: dict[str, Any] = {**size, "train_data": torch.from_numpy(tokens.astype(np.int64))}
    exec(compile(ast.Module(wanted, type_ignores=[]), str(checkout / "gpt.py"), "exec"), names)
    model = names["GPTLanguageModel"]().to(size["device"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def step() -> float:
        loss = model(*names["get_batch"]("train"))[1]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
