"""Seeds: every random choice of a run is a function of its seed, purpose, step and micro-batch."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def derive_seed(seed: int, purpose: str, step: int = 0, micro_batch: int = 0) -> int:
    """The seed of one random choice: a function of these four alone, 0 <= seed < 2**63.

    Since nothing else enters, there is no random state to save: step 1,000 draws the same batch in a run
    that was resumed at step 999 as in one that was never interrupted.
    """
    text = f"{seed}/{purpose}/{step}/{micro_batch}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_initial_weights(seed: int) -> None:
    """Seed PyTorch's own generators, which initial weights are drawn from."""
    torch.manual_seed(derive_seed(seed, "init"))


def generator(*key: Any, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator seeded by `derive_seed(*key)`."""
    return torch.Generator(device).manual_seed(derive_seed(*key))
