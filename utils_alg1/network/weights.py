"""Weight files: what they say about the model, and their layout.

On disk each attention head has its own query, key and value matrix, as in the lecture that the architecture
comes from; in memory those of a block are one fused matrix.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parameters import MODEL_OPTIONS, ModelConfig
from utils_alg1.base.errors import Alg1Error

FORMAT = "alg1-model"
FORMAT_VERSION = 1
OTHER_WEIGHTS = "use an export of ALG1, or weights with the names that README-ARCH.md lists"
FUSED = ".sa.qkv.weight"  # ends the name of the fused matrix of a block, in memory
PROJECTIONS = ("query", "key", "value")  # the order of their rows in the fused matrix


def weights_metadata(
    config: ModelConfig, vocabulary: list[str] | None, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Return the metadata of an exported model, as JSON values."""
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, "model": config.stored()}
    return about | {"vocabulary": vocabulary, "provenance": provenance}


def describe_weights(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None,
    path: str | Path,
    vocabulary: Sequence[str] | None = None,
) -> tuple[ModelConfig, list[str] | None, dict[str, Any]]:
    """Read config, vocabulary and provenance of a weights file, and check that they agree with its tensors.

    Args:
        tensors, metadata: as `read_tensors` returns them.
        path: for error messages.
        vocabulary: the characters by token, for a file that does not hold them.

    Raises:
        Alg1Error: not an exported model, of an unknown version, or its parts do not agree.
    """
    if metadata is None:
        metadata = {}
    elif (kind := metadata.get("format")) != FORMAT:
        raise Alg1Error(f"{path}: this is {kind!r}, not an exported model", OTHER_WEIGHTS)
    elif (version := metadata.get("format_version")) != FORMAT_VERSION:
        hint = "use the release of ALG1 that wrote it"
        raise Alg1Error(f"{path}: format version {version!r} is not known", hint)
    model = metadata.get("model")
    stored = model if isinstance(model, dict) else {}
    config = config_from_shapes(tensors, path, stored)
    if model is not None and dataclasses.asdict(config) != MODEL_OPTIONS | stored:
        raise Alg1Error(f"{path}: its sizes and its tensors do not agree", OTHER_WEIGHTS)
    characters = metadata.get("vocabulary") if vocabulary is None else list(vocabulary)
    if characters is not None and (
        characters != sorted(set(characters)) or len(characters) != config.vocab_size
    ):
        raise Alg1Error(
            f"{path}: its vocabulary must be {config.vocab_size} characters, sorted and each once",
            "give the vocabulary of the text that it was trained on",
        )
    return config, characters, metadata.get("provenance") or {}


def config_from_shapes(
    tensors: Mapping[str, Tensor], path: str | Path, stored: Mapping[str, Any]
) -> ModelConfig:
    """Read the sizes of a model from the names and shapes of its tensors on disk.

    What these do not show is taken from `stored`, the config in the file's metadata: dropout, the options,
    and block_size if the positions are rotary.

    Raises:
        Alg1Error: these are not the weights of such a model.
    """

    def count(pattern: str) -> int:
        found = (re.fullmatch(pattern, name) for name in tensors)
        return len({match[1] for match in found if match})

    def table(kind: str) -> Sequence[int]:
        found = tensors.get(f"{kind}_embedding_table.weight")
        if found is None or found.dim() != 2:
            message = "there is no model of this kind in it (no embedding tables)"
            raise Alg1Error(f"{path}: {message}", OTHER_WEIGHTS)
        return found.shape

    vocab_size, n_embd = table("token")
    rotary = stored.get("positions") == "rotary"
    config = ModelConfig(
        n_embd=n_embd,
        n_head=count(r"blocks\.0\.sa\.heads\.(\d+)\.key\.weight"),
        n_layer=count(r"blocks\.(\d+)\.ln1\.weight"),
        block_size=stored.get("block_size") if rotary else table("position")[0],  # type: ignore[arg-type]
        vocab_size=vocab_size,
        **{name: stored[name] for name in ("dropout", *MODEL_OPTIONS) if name in stored},
    )
    if problems := config.problems():
        raise Alg1Error(f"{path}: its tensors make no model: {problems[0].text}", OTHER_WEIGHTS)
    return config


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the model, by its name in `BigramLanguageModel.state_dict()`."""
    C, V = config.n_embd, config.vocab_size
    assert V is not None
    shapes: dict[str, tuple[int, ...]] = {"token_embedding_table.weight": (V, C)}
    if config.positions == "learned":
        shapes["position_embedding_table.weight"] = (config.block_size, C)
    for layer in range(config.n_layer):
        block = {
            "sa.qkv.weight": (3 * C, C),
            "sa.proj.weight": (C, C),
            "sa.proj.bias": (C,),
            "ffwd.net.0.weight": (4 * C, C),
            "ffwd.net.0.bias": (4 * C,),
            "ffwd.net.2.weight": (C, 4 * C),
            "ffwd.net.2.bias": (C,),
            **{f"{norm}.{part}": (C,) for norm in ("ln1", "ln2") for part in ("weight", "bias")},
        }
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,), "lm_head.weight": (V, C), "lm_head.bias": (V,)}
    return shapes


def _head_names(layer_prefix: str, config: ModelConfig) -> list[str]:
    """Return the names of a block's head matrices on disk, in the order of their rows in the fused matrix.

    Args:
        layer_prefix: "blocks.{i}.sa."
    """
    return [f"{layer_prefix}heads.{h}.{part}.weight" for part in PROJECTIONS for h in range(config.n_head)]


def shapes_on_disk(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a weights file, by its name there."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in model_shapes(config).items():
        if name.endswith(FUSED):
            names = _head_names(name.removesuffix("qkv.weight"), config)
            shapes |= dict.fromkeys(names, (config.head_size, config.n_embd))
        else:
            shapes[name] = shape
    return shapes


def split_heads(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert the model's tensors to the layout on disk, with three (S, C) matrices per head."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(FUSED):
            names = _head_names(name.removesuffix("qkv.weight"), config)
            tensors |= zip(names, tensor.view(len(names), -1, config.n_embd), strict=True)
        else:
            tensors[name] = tensor
    return tensors


def join_heads(tensors: Mapping[str, Tensor], config: ModelConfig, path: str | Path) -> dict[str, Tensor]:
    """Convert tensors in the layout on disk to the model's, leaving out the `...tril` buffers of old files.

    Raises:
        Alg1Error: a tensor is missing, unknown, of the wrong shape, or not of a floating-point type.
    """
    tensors = {name: t for name, t in tensors.items() if not name.endswith(".tril")}
    expected = shapes_on_disk(config)
    for name in (*sorted(expected.keys() ^ tensors.keys()), *expected):
        if name not in tensors:
            problem = f"{name} is missing"
        elif name not in expected:
            problem = f"{name} is unknown"
        elif tuple(tensors[name].shape) != expected[name]:
            problem = f"{name} has the shape {tuple(tensors[name].shape)}, not {expected[name]}"
        elif not tensors[name].is_floating_point():
            problem = f"{name} holds {tensors[name].dtype}, not floating numbers"
        else:
            continue
        raise Alg1Error(f"{path}: not the weights of this model: {problem}", OTHER_WEIGHTS)
    joined = {name: tensor for name, tensor in tensors.items() if ".sa.heads." not in name}
    for layer in range(config.n_layer):
        prefix = f"blocks.{layer}.sa."
        joined[f"{prefix}qkv.weight"] = torch.cat([tensors[name] for name in _head_names(prefix, config)])
    return joined
