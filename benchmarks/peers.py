"""Training steps of other projects, imported from the checkouts named on the command line."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import load, silence


def nanogpt_step(
    checkout: Path, tokens: np.ndarray, vocab_size: int, size: dict[str, int], folder: Path, compile: bool
) -> Callable[[], float]:
    """Return a training step as nanoGPT's train.py takes it on a CPU, with its character model's settings.

    That is its GPT without biases and dropout, its optimizer, its way of drawing batches (the file is mapped
    again for every batch, the next batch is drawn before the backward pass), and gradient clipping at 1.0.
    """
    model_py = load(checkout / "model.py", "nanogpt_model")
    path = folder / "train.bin"
    if not path.exists():
        tokens.astype(np.uint16).tofile(path)
    block_size, batch_size = size["block_size"], size["batch_size"]

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - block_size, (batch_size,))
        x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts])
        return x, y

    sizes = {name: size[name] for name in ("n_embd", "n_head", "n_layer", "block_size")}
    with silence():
        model = model_py.GPT(model_py.GPTConfig(vocab_size=vocab_size, bias=False, dropout=0.0, **sizes))
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    forward = torch.compile(model) if compile else model
    batch = get_batch()

    def step() -> float:
        nonlocal batch
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        loss = forward(*batch)[1]
        batch = get_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def lecture_step(
    checkout: Path, tokens: np.ndarray, vocab_size: int, size: dict[str, int]
) -> Callable[[], float]:
    """Return a training step as the lecture's gpt.py takes it, with its classes and its get_batch.

    Importing gpt.py would train, and its classes read module globals: only its imports, classes and get_batch
    are executed, with these sizes as globals.
    """
    tree = ast.parse((checkout / "gpt.py").read_text(encoding="utf-8"))
    wanted: list[ast.stmt] = [
        node
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef))
        or (isinstance(node, ast.FunctionDef) and node.name == "get_batch")
    ]
    names: dict[str, Any] = {
        **size,
        "dropout": 0.0,
        "vocab_size": vocab_size,
        "device": "cpu",
        "train_data": torch.from_numpy(tokens.astype(np.int64)),
    }
    exec(compile(ast.Module(wanted, type_ignores=[]), str(checkout / "gpt.py"), "exec"), names)
    model = names["GPTLanguageModel"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)

    def step() -> float:
        loss = model(*names["get_batch"]("train"))[1]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
