"""Weights on disk: the lecture's layout, one key, query and value matrix for each head, and what it holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parameters import MODEL_OPTIONS, ModelConfig
from utils_alg1.base.errors import Alg1Error

FORMAT = "alg1-model"
FORMAT_VERSION = 1
OTHER_WEIGHTS = "use an export of ALG1, or weights with the names that README-ARCH.md lists"
PROJECTIONS = ("query", "key", "value")  # the order of their rows in the fused matrix


def split_heads(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The model's tensors -> the layout on disk, with three (S, C) matrices for each head."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.endswith(".sa.qkv.weight"):
            tensors[name] = tensor
            continue
        prefix = name.removesuffix("qkv.weight")
        heads = tensor.view(len(PROJECTIONS), config.n_head, -1, config.n_embd)  # (3, H, S, C)
        for h in range(config.n_head):
            for p, part in enumerate(PROJECTIONS):
                tensors[f"{prefix}heads.{h}.{part}.weight"] = heads[p, h]
    return tensors


def config_from_shapes(
    tensors: Mapping[str, Tensor], path: str | Path, stored: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The sizes that the tensors of a file in the lecture's layout have.

    What shapes do not show is taken from `stored`, the file's own word: dropout, the options, and with
    rotary positions block_size.

    Raises:
        Alg1Error: these are not the weights of such a model.
    """

    def count(pattern: str) -> int:
        found = (re.fullmatch(pattern, name) for name in tensors)
        return len({match[1] for match in found if match})

    def table(kind: str) -> Tensor:
        found = tensors.get(f"{kind}_embedding_table.weight")
        if found is None or found.dim() != 2 or not found.numel():
            raise Alg1Error(
                f"{path}: there is no model of this kind in it (no embedding tables)",
                OTHER_WEIGHTS,
            )
        return found

    stored = stored or {}
    token_table = table("token")
    if stored.get("positions") == "rotary":
        block_size: Any = stored.get("block_size")
    else:
        block_size = table("position").shape[0]
    config = ModelConfig(
        n_embd=token_table.shape[1],
        n_head=count(r"blocks\.0\.sa\.heads\.(\d+)\.key\.weight"),
        n_layer=count(r"blocks\.(\d+)\.ln1\.weight"),
        block_size=block_size,
        vocab_size=token_table.shape[0],
        **{name: stored[name] for name in ("dropout", *MODEL_OPTIONS) if name in stored},
    )
    problems = config.problems(need_vocab_size=True)
    if problems:
        raise Alg1Error(f"{path}: its tensors make no model: {problems[0].text}", OTHER_WEIGHTS)
    return config


def join_heads(
    tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], config: ModelConfig, path: str | Path
) -> dict[str, Tensor]:
    """The layout on disk -> the model's tensors. Buffers of old files (`...tril`) are left out.

    Args:
        state: the model's own tensors, of which only names and shapes are read.

    Raises:
        Alg1Error: a tensor is missing, left over, of the wrong shape or not of a floating type.
    """
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".tril")}
    expected = {name: tuple(tensor.shape) for name, tensor in split_heads(state, config).items()}
    missing = [name for name in expected if name not in tensors]
    unknown = [name for name in tensors if name not in expected]
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown"
        raise Alg1Error(f"{path}: not the weights of this model: {what}", OTHER_WEIGHTS)
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            actual = tuple(tensors[name].shape)
            raise Alg1Error(f"{path}: {name} has the shape {actual}, not {shape}", OTHER_WEIGHTS)
        if not tensors[name].is_floating_point():
            what = f"{name} holds {tensors[name].dtype}, not floating numbers"
            raise Alg1Error(f"{path}: {what}", OTHER_WEIGHTS)
    joined = {name: tensor for name, tensor in tensors.items() if ".sa.heads." not in name}
    for layer in range(config.n_layer):
        prefix = f"blocks.{layer}.sa."
        rows = [
            tensors[f"{prefix}heads.{h}.{part}.weight"] for part in PROJECTIONS for h in range(config.n_head)
        ]
        joined[f"{prefix}qkv.weight"] = torch.cat(rows)
    return joined
