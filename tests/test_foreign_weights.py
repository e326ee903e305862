"""Weights of other programs: prefixes of names, other layouts, pickles and the command that converts them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import QUIET_TRACKERS, TEXT
from safetensors.torch import load_file, save_file
from torch import nn

from model import BigramLanguageModel
from parameters import ModelConfig
from utils_alg1.base.errors import Alg1Error
from utils_alg1.network.weights import OTHER_WEIGHTS, read_weights, split_heads

GPT2_HINT = "sample them with the program that trained them, or train anew: python train.py --data TEXT"
TIED = nn.Linear(4, 3, bias=False).weight


@pytest.fixture
def model() -> BigramLanguageModel:
    torch.manual_seed(1)
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 8}
    return BigramLanguageModel(ModelConfig(**sizes, vocab_size=len(set(TEXT))))


def lecture(model: BigramLanguageModel, prefix: str = "") -> dict[str, torch.Tensor]:
    """The weights as the lecture's own program names them, with the mask of each head."""
    tensors = split_heads(model.state_dict(), model.config)
    masks = {f"blocks.0.sa.heads.{h}.tril": torch.ones(8, 8).tril() for h in range(2)}
    return {prefix + name: tensor.clone() for name, tensor in (tensors | masks).items()}


def assert_same_weights(path: Path, model: BigramLanguageModel) -> None:
    loaded = BigramLanguageModel().load(read_weights(path))
    assert loaded.config == model.config
    assert all(tensor.equal(loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def refused(path: Path) -> tuple[str, str | None]:
    """The message, without the file that it begins with, and the hint."""
    with pytest.raises(Alg1Error) as raised:
        read_weights(path)
    assert raised.value.message.startswith(f"{path}: ")
    return raised.value.message.removeprefix(f"{path}: "), raised.value.hint


# --- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model.net."])
def test_a_prefix_that_all_names_share_is_left_out_with_a_note(workdir, model, prefix):
    path = Path("theirs.safetensors")
    save_file(lecture(model, prefix), path)
    assert_same_weights(path, model)
    assert read_weights(path).note == f"{path}: every name in it begins with {prefix}, which is left out"


def test_training_and_sampling_say_what_they_leave_out(train, sample, text_file, model):
    path = Path("theirs.safetensors")
    save_file(lecture(model, "module."), path)
    note = f"{path}: every name in it begins with module., which is left out"
    flags = ["--data", text_file, "--max-iters", 1, "--eval-iters", 1, "--batch-size", 1, *QUIET_TRACKERS]
    result = train(*flags, "--init-from", path)
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == note
    assert (
        read_weights(next(Path().glob("runs/*/artifacts/checkpoints/step_000000000.safetensors"))).note == ""
    )
    result = sample("--model", path, "--vocabulary", text_file, "--max-new-tokens", 1)
    assert (result.code, result.err.splitlines()) == (0, [f"note: {note}", str(path)])


def test_a_file_of_the_lecture_has_no_note(workdir, model):
    save_file(lecture(model), "theirs.safetensors")
    assert read_weights(Path("theirs.safetensors")).note == ""


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (
            ["model.token_embedding_table.weight", "loss.weight"],
            "the model's names in it begin with model., but loss.weight does not",
        ),
        (
            ["embed.weight"],
            "there is no token_embedding_table.weight in it; its names are embed.weight",
        ),
        (
            ["token_embedding_table.weight", "d", "c", "b", "a"],
            "there is no position_embedding_table.weight in it; its names are a, b, c and 2 more",
        ),
        (
            ["token_embedding_table.weight", "position_embedding_table.weight", "blocks.0.sa.qkv.weight"],
            "there is no blocks.0.sa.heads.0.key.weight in it; its names are blocks.0.sa.qkv.weight,"
            " position_embedding_table.weight, token_embedding_table.weight",
        ),
        ([], "there is no token_embedding_table.weight in it; it is empty"),
    ],
)
def test_the_name_that_is_missing_is_told(workdir, names, complaint):
    path = Path("theirs.safetensors")
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    hint = "save the model's state_dict alone" if "begin with" in complaint else OTHER_WEIGHTS
    assert refused(path) == (complaint, hint)


@pytest.mark.parametrize("name", ["wte.weight", "transformer.wte.weight", "_orig_mod.transformer.wte.weight"])
def test_the_layout_of_gpt2_is_told_from_that_of_the_lecture(workdir, name):
    path = Path("theirs.safetensors")
    save_file({name: torch.zeros(2, 2), "lm_head.weight": torch.zeros(2, 2)}, path)
    complaint = f"another layout, that of GPT-2 and nanoGPT ({name}, ...), and another network"
    assert refused(path) == (complaint, GPT2_HINT)


# --- pickles ------------------------------------------------------------------------------------------


def conversion(path: Path) -> list[str]:
    """The words of the command that the hint for a pickle names."""
    complaint, hint = refused(path)
    assert complaint == "this is a PyTorch pickle file (.pt), which could run code when it is read"
    assert hint is not None and hint.startswith("convert it: ")
    return shlex.split(hint.removeprefix("convert it: "))


def convert(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run that command in this process; returns the file it wrote."""
    python, flag, code, *paths = conversion(path)
    assert (python, flag) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", *paths])
    exec(code, {})
    return Path(paths[1])


PICKLES: Mapping[str, dict] = {
    "nanoGPT": {"optimizer": {"state": {0: {"step": torch.zeros(())}}, "param_groups": [{"lr": 0.1}]},
                "model": ..., "model_args": {"n_layer": 1}, "iter_num": 7, "best_val_loss": torch.ones(())},
    "Lightning": {"epoch": 1, "state_dict": ..., "loops": {}, "callbacks": {}, "optimizer_states": [{}]},
    "step first": {"step": torch.ones(()), "model_state_dict": ...},
}  # fmt: skip


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", [None, *PICKLES])
def test_the_hint_for_a_pickle_converts_it(workdir, model, kind, as_zip, monkeypatch):
    path, state = Path("ckpt.pt"), lecture(model, "model.")
    file = state if kind is None else {key: state if x is ... else x for key, x in PICKLES[kind].items()}
    torch.save(file, path, _use_new_zipfile_serialization=as_zip)
    converted = convert(path, monkeypatch)
    assert converted == Path("ckpt.safetensors")
    assert_same_weights(converted, model)


def test_tensors_that_share_memory_are_converted(workdir, monkeypatch):
    state = {"wte.weight": TIED, "lm_head.weight": TIED, "turned": TIED.T, "n": 3}
    torch.save(state, "tied.pt")
    converted = load_file(convert(Path("tied.pt"), monkeypatch))
    assert converted.keys() == {"wte.weight", "lm_head.weight", "turned"}
    assert all(tensor.equal(state[name]) for name, tensor in converted.items())


def test_a_conversion_overwrites_nothing(workdir, model, monkeypatch):
    torch.save(lecture(model), "model.safetensors")
    assert convert(Path("model.safetensors"), monkeypatch) == Path("model.safetensors.safetensors")
    assert_same_weights(Path("model.safetensors.safetensors"), model)


def test_the_command_can_be_pasted_into_a_shell(workdir, model, sample):
    path = Path("our $best model's.pt")
    torch.save({"model": lecture(model, "_orig_mod.")}, path)
    error, hint = sample("--model", path).err.splitlines()
    assert error.endswith("which could run code when it is read")
    Path("bin").mkdir()
    Path("bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    Path("bin/python").chmod(0o755)
    environment = os.environ | {"PATH": f"{Path('bin').absolute()}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(hint.removeprefix("hint: convert it: "), shell=True, env=environment, check=True)
    assert_same_weights(path.with_suffix(".safetensors"), model)


def test_code_in_a_pickle_is_not_run(workdir, monkeypatch):
    class Harm:
        def __reduce__(self):
            return os.mkdir, ("harm",)

    torch.save({"model": Harm()}, "bad.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        convert(Path("bad.pt"), monkeypatch)
    assert os.listdir() == ["bad.pt"]


def test_a_zip_that_is_no_pickle_is_not_called_one(workdir):
    import numpy

    numpy.savez("arrays.npz", a=numpy.zeros(2))
    assert refused(Path("arrays.npz"))[0].startswith("not a whole safetensors file (")
