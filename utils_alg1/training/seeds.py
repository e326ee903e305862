"""Seeds of all random choices: functions of the run's seed, the purpose, the step and the micro-batch."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def derive_seed(seed: int, purpose: str, step: int = 0, micro_batch: int = 0) -> int:
    """Return the seed of one random choice, 0 <= seed < 2**63: a hash of these four values.

    So there is no random state to save: step 1,000 draws the same batch in a run that was resumed at step 999
    as in one that was never interrupted.
    """
    text = f"{seed}/{purpose}/{step}/{micro_batch}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_initial_weights(seed: int) -> None:
    """Seed PyTorch's global generators for the initial weights."""
    torch.manual_seed(derive_seed(seed, "init"))


def generator(*key: Any, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a generator seeded by `derive_seed(*key)`."""
    return torch.Generator(device).manual_seed(derive_seed(*key))
