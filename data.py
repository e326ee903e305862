"""Load a text as tokens, and draw batches from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from parameters import DataConfig
from utils import Tokenizer
from utils_alg1.base.errors import Alg1Error
from utils_alg1.data.corpus import find_corpus
from utils_alg1.data.sources import DEFAULT_PATH, Say

if TYPE_CHECKING:
    import torch


def load_data(
    data_path: str = DEFAULT_PATH,
    train_split: float = 0.9,
    val_split: float | None = None,
    say: Say = print,
    val_data: str | None = None,
) -> tuple[np.ndarray, np.ndarray, Tokenizer]:
    """Read and tokenize a text: a file, a folder, a pattern or a named corpus (see `find_training_text`).

    Args:
        train_split: the fraction of the text, from its beginning, that is for training.
        val_split: the fraction, from its end, that is for validation (default: all that remains).
        say: shows the user a line, such as that a corpus is being downloaded.
        val_data: a text for validation, in which case all of the other is for training.

    Returns:
        train_data, val_data and tokenizer; the data are (n,) unsigned integers, memory-mapped.
    """
    corpus = find_corpus(DataConfig(data_path, val_data), say)
    return *corpus.split(train_split, val_split), corpus.tokenizer


def get_batch(
    split: str,
    train_data: np.ndarray,
    val_data: np.ndarray,
    block_size: int,
    batch_size: int,
    device: str | torch.device = "cpu",
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a batch of random sequences: B = batch_size of them, of T = block_size characters each.

    Args:
        split: "train" or "val".
        train_data, val_data: (n,) integers, as arrays or tensors.
        generator: a CPU generator; the same state draws the same batch.

    Returns:
        x and y, (B, T) int64 each; y is x shifted by one character.

    Raises:
        Alg1Error: the split is not longer than block_size.
    """
    import torch

    if split not in ("train", "val"):
        raise ValueError(f"split must be train or val, not {split!r}")
    data = train_data if split == "train" else val_data
    n_starts = len(data) - block_size
    if n_starts < 1:
        raise Alg1Error(
            f"the {split} split has {len(data):,} characters, too few for block_size = {block_size}",
            f"use --block-size {len(data) - 1} at most" if len(data) > 1 else "use a longer text",
        )
    starts = torch.randint(n_starts, (batch_size,), generator=generator).numpy()  # (B,)
    return sequences_at(starts, data, block_size, device)


def sequences_at(
    starts: np.ndarray, data: np.ndarray, block_size: int, device: str | torch.device = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sequences of T = block_size characters that begin at `starts`, (B,) integers.

    Returns:
        x and y, (B, T) int64 each; y is x shifted by one character.
    """
    import torch

    sequences = np.asarray(data)[starts[:, None] + np.arange(block_size + 1)].astype(np.int64)  # (B, T + 1)
    x = torch.from_numpy(np.ascontiguousarray(sequences[:, :-1]))
    y = torch.from_numpy(np.ascontiguousarray(sequences[:, 1:]))
    device = torch.device(device)
    if device.type == "cuda":  # elsewhere it could copy memory that is freed already
        return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
    return x.to(device), y.to(device)
