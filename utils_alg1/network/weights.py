"""Weight files: what they say about the model, and their layout.

On disk each attention head has its own query, key and value matrix, as in the lecture that the architecture
comes from; in memory those of a block are one fused matrix.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import MODEL_OPTIONS, ModelConfig
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.scripts import command
from utils_alg1.network.tensor_file import read_arrays

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

FORMAT = "alg1-model"
CHECKPOINT_FORMAT = "alg1-checkpoint"
FORMAT_VERSION = 1  # of both
OTHER_WEIGHTS = "use an export of ALG1, or weights with the names that README-ARCH.md lists"
TOKEN_TABLE = "token_embedding_table.weight"
FUSED = ".sa.qkv.weight"  # ends the name of the fused matrix of a block, in memory
OTHER_CHECKPOINT = "use another checkpoint, written by train.py"
PROJECTIONS = ("query", "key", "value")  # the order of their rows in the fused matrix


def weights_metadata(
    config: ModelConfig, vocabulary: list[str] | None, provenance: dict[str, Any]
) -> dict[str, Any]:
    """Return the metadata of an exported model, as JSON values."""
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, "model": config.stored()}
    return about | {"vocabulary": vocabulary, "provenance": provenance}


@dataclass
class Weights:
    """The weights of a model, and what its file says of it.

    Attributes:
        tensors: by their names in `BigramLanguageModel.state_dict()`, of any floating-point types.
        vocabulary: the characters by token, or None if unknown.
        provenance: where the weights come from (JSON values).
        note: what the user should know of how the file was read, or "".
    """

    config: ModelConfig
    tensors: dict[str, np.ndarray]
    vocabulary: list[str] | None
    provenance: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def read_weights(path: Path) -> Weights:
    """Read an export, a checkpoint, or any safetensors file in the layout of the lecture.

    Raises:
        Alg1Error: the file is none of these, or damaged.
    """
    tensors, metadata = read_arrays(path)
    if metadata is not None and metadata.get("format") == CHECKPOINT_FORMAT:
        return weights_of_checkpoint(tensors, metadata, path)
    return weights_of_export(tensors, metadata, path)


def weights_of_checkpoint(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, Any], path: str | Path
) -> Weights:
    """Return the weights that a checkpoint of training/checkpoint.py holds, from what `read_arrays` returns.

    Raises:
        Alg1Error: its format is not known, or its parts do not agree.
    """
    _check_version(metadata, path)
    prefix = "model."
    model = {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}
    try:
        config = ModelConfig(**metadata["model"])
        config.validate()
        size = sum(tensor.size for tensor in model.values())
        fits = size == config.n_parameters and _find_mismatch(model, model_shapes(config)) is None
        if fits and fits_vocabulary(metadata["vocabulary"], config):
            return Weights(config, model, metadata["vocabulary"])
    except (KeyError, TypeError, ValueError, Alg1Error):
        pass
    raise Alg1Error(f"{path}: this checkpoint makes no sense (weights)", OTHER_CHECKPOINT)


def weights_of_export(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any] | None,
    path: str | Path,
    vocabulary: Sequence[str] | None = None,
) -> Weights:
    """Return the weights of an exported model or of a file of another program.

    Args:
        tensors, metadata: as `read_arrays` returns them.
        path: for error messages.
        vocabulary: the characters by token, for a file that does not hold them.

    Raises:
        Alg1Error: not an exported model, of an unknown version, or its parts do not agree.
    """
    note = ""
    if metadata is None:
        metadata = {}
        if prefix := common_prefix(tensors, path):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            note = f"{path}: every name in it begins with {prefix}, which is left out"
    elif (kind := metadata.get("format")) != FORMAT:
        raise Alg1Error(f"{path}: this is {kind!r}, not an exported model", OTHER_WEIGHTS)
    else:
        _check_version(metadata, path)
    model = metadata.get("model")
    stored = model if isinstance(model, dict) else {}
    config = config_from_shapes(tensors, path, stored)
    if model is not None and dataclasses.asdict(config) != MODEL_OPTIONS | stored:
        raise Alg1Error(f"{path}: its sizes and its tensors do not agree", OTHER_WEIGHTS)
    characters = metadata.get("vocabulary") if vocabulary is None else list(vocabulary)
    if characters is not None and not fits_vocabulary(characters, config):
        raise Alg1Error(
            f"{path}: its vocabulary must be {config.vocab_size} characters, sorted and each once",
            "give the vocabulary of the text that it was trained on",
        )
    joined, provenance = join_heads(tensors, config, path), metadata.get("provenance") or {}
    return Weights(config, joined, characters, provenance, note)


def common_prefix(names: Collection[str], path: str | Path) -> str:
    """Return what all names begin with before those of the model, such as "module."; or "".

    Raises:
        Alg1Error: there are others beside those of a model with a prefix.
    """
    found = [name.removesuffix(TOKEN_TABLE) for name in names if name.endswith(f".{TOKEN_TABLE}")]
    if not found or TOKEN_TABLE in names:
        return ""
    if others := [name for name in names if not name.startswith(found[0])]:
        raise Alg1Error(
            f"{path}: the model's names in it begin with {found[0]}, but {others[0]} does not",
            "save the model's state_dict alone",
        )
    return found[0]


def _not_a_model(missing: str, names: Collection[str], path: str | Path) -> Alg1Error:
    """Return the error for a file without a tensor that every model has."""
    if of_gpt2 := next((name for name in names if name.endswith("wte.weight")), None):
        return Alg1Error(
            f"{path}: another layout, that of GPT-2 and nanoGPT ({of_gpt2}, ...), and another network",
            "sample them with the program that trained them,"
            f" or train anew: {command('train.py')} --data TEXT",
        )
    first, n_others = ", ".join(sorted(names)[:3]), max(0, len(names) - 3)
    listed = (
        f"its names are {first}" + (f" and {n_others} more" if n_others else "") if names else "it is empty"
    )
    return Alg1Error(f"{path}: there is no {missing} in it; {listed}", OTHER_WEIGHTS)


def _check_version(metadata: Mapping[str, Any], path: str | Path) -> None:
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        hint = "use the release of ALG1 that wrote it"
        raise Alg1Error(f"{path}: format version {version!r} is not known", hint)


def fits_vocabulary(characters: Any, config: ModelConfig) -> bool:
    """Return whether these are the characters of a model: sorted, each once, as many as it has tokens."""
    are_strings = isinstance(characters, list) and all(isinstance(c, str) for c in characters)
    return (
        are_strings
        and characters == sorted(set("".join(characters)))
        and len(characters) == config.vocab_size
    )


def config_from_shapes(
    tensors: Mapping[str, np.ndarray], path: str | Path, stored: Mapping[str, Any]
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

    def matrix(name: str) -> Sequence[int]:
        if name not in tensors:
            raise _not_a_model(name, tensors, path)
        if len(shape := tensors[name].shape) != 2:
            raise Alg1Error(f"{path}: {name} has the shape {shape}, and is no matrix", OTHER_WEIGHTS)
        return shape

    vocab_size, n_embd = matrix(TOKEN_TABLE)
    rotary = stored.get("positions") == "rotary"
    block_size = stored.get("block_size") if rotary else matrix("position_embedding_table.weight")[0]
    n_head = count(r"blocks\.0\.sa\.heads\.(\d+)\.key\.weight")
    if not n_head:
        raise _not_a_model("blocks.0.sa.heads.0.key.weight", tensors, path)
    config = ModelConfig(
        n_embd=n_embd,
        n_head=n_head,
        n_layer=count(r"blocks\.(\d+)\.ln1\.weight"),
        block_size=block_size,  # type: ignore[arg-type]
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


def join_heads(
    tensors: Mapping[str, np.ndarray], config: ModelConfig, path: str | Path
) -> dict[str, np.ndarray]:
    """Convert tensors in the layout on disk to the model's, leaving out the `...tril` buffers of old files.

    Raises:
        Alg1Error: a tensor is missing, unknown, of the wrong shape, or not of a floating-point type.
    """
    import numpy as np

    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".tril")}
    if problem := _find_mismatch(tensors, shapes_on_disk(config)):
        raise Alg1Error(f"{path}: not the weights of this model: {problem}", OTHER_WEIGHTS)
    joined = {name: tensor for name, tensor in tensors.items() if ".sa.heads." not in name}
    for layer in range(config.n_layer):
        prefix = f"blocks.{layer}.sa."
        matrices = [tensors[name] for name in _head_names(prefix, config)]
        joined[f"{prefix}qkv.weight"] = np.concatenate(matrices)
    return joined


def _find_mismatch(tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return how tensors differ from the names and shapes that are expected of them, or None."""
    for name in (*sorted(expected.keys() ^ tensors.keys()), *expected):
        if name not in tensors:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} is unknown"
        if tensors[name].shape != expected[name]:
            return f"{name} has the shape {tensors[name].shape}, not {expected[name]}"
        if tensors[name].dtype.kind != "f":
            return f"{name} holds torch.{tensors[name].dtype}, not floating numbers"
    return None
