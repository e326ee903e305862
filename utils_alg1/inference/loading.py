"""The model that inference.py runs: which weights, with which vocabulary, on which device."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

from utils_alg1.base.errors import Alg1Error
from utils_alg1.console.messages import print_note, print_warning
from utils_alg1.console.script import importing
from utils_alg1.run_directory import find_weights, refuse_run
from utils_alg1.utils_config_loader import ConfigLoader

if TYPE_CHECKING:
    import torch

    from utils_alg1.network.sampling import LogitsDecoder
    from utils_alg1.network.weights import Weights


def find_device(name: str) -> torch.device | None:
    """Return the device of PyTorch that --device names, or None for the CPU, which needs no PyTorch.

    Raises:
        Alg1Error: there is no such device.
    """
    if name == "cpu" or (name == "auto" and not may_have_gpu()):
        return None
    with importing():
        from utils_alg1.training import devices
    device = devices.find_device(name)
    return None if device.type == "cpu" else device


def may_have_gpu() -> bool:
    """Return whether the machine has a GPU that PyTorch may support, without importing PyTorch."""
    for driver_name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError, AttributeError):  # it is not there, or not such a driver
            driver, count = ctypes.CDLL(driver_name), ctypes.c_int()
            return driver.cuInit(0) == driver.cuDeviceGetCount(ctypes.byref(count)) == 0 < count.value
    return os.path.exists("/dev/kfd")  # of AMD's driver


def create_decoder(weights: Weights, device: torch.device | None) -> LogitsDecoder:
    """Return what computes the logits of a text on a device; None is the CPU."""
    if device is None:
        from utils_alg1.network.decoder import Decoder

        return Decoder(weights.config, weights.tensors)
    from model import BigramLanguageModel
    from utils_alg1.network.cache import CachedForward

    return CachedForward(BigramLanguageModel().load(weights).to(device).eval())


def load_weights(arguments: argparse.Namespace) -> tuple[Weights, Path]:
    """Load the weights that the flags name, with their vocabulary; return them and their file."""
    with importing():
        from utils_alg1.network.weights import read_weights

    named = arguments.model and Path(arguments.model)
    path = named or find_weights(arguments.runs_dir or ConfigLoader().runs_dir, arguments.run)
    refuse_run(path)
    weights = read_weights(path)
    if weights.note:
        print_note(weights.note)
    if weights.vocabulary is None:
        weights.vocabulary = read_vocabulary(arguments.vocabulary, weights, path)
    elif arguments.vocabulary is not None:
        print_warning("--vocabulary is not used: the model holds its own; leave the flag out")
    return weights, path


def read_vocabulary(text_path: str | None, weights: Weights, path: Path) -> list[str]:
    """Return the characters of a text, for weights of another program that come without a vocabulary."""
    from utils_alg1.data.corpus import open_corpus
    from utils_alg1.data.sources import find_files

    hint = "name the text that it was trained on: --vocabulary PATH"
    if text_path is None:
        raise Alg1Error(f"{path}: it does not hold its vocabulary", hint)
    vocabulary = open_corpus(find_files(text_path, "--vocabulary")).tokenizer.vocabulary
    if len(vocabulary) != weights.config.vocab_size:
        of_model = f"{path} is for {weights.config.vocab_size}"
        raise Alg1Error(f"{text_path}: the text has {len(vocabulary)} characters, {of_model}", hint)
    return vocabulary
