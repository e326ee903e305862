"""Drawing texts from the logits of a decoder: the sampling settings, and the loop over the characters.

Shapes use the letters of model.py: B batch (texts), T time, V = vocab_size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from parameters import ModelConfig

Draw = Callable[[np.ndarray], np.ndarray]  # draws a token (B,) from each row of probabilities (B, V)


class NotFiniteError(RuntimeError):
    """The logits of a model are not finite, as those of a run that has diverged."""


class LogitsDecoder(Protocol):
    """Computes logits character by character: `Decoder` in numpy, `CachedForward` with PyTorch."""

    config: ModelConfig
    block_size: int
    batch_numbers: int  # a batch is computed fast if its largest array has so many numbers
    length: int  # the characters that it has read; set to 0, they are forgotten

    def start(self, batch_size: int) -> None:
        """Begin so many new texts."""

    def logits(self, tokens: np.ndarray, last: int = 1) -> np.ndarray:
        """Read tokens (B, T), and return the logits of what follows each of the `last` newest ones.

        They are (last B, V), its rows in the order (last, B). T is 1, or the length is 0.
        """
        ...


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its logits.

    Attributes:
        temperature: the logits are divided by it; 0 always takes the most likely token.
        top_k: draw from the k most likely tokens only.
        top_p: draw from the smallest set of most likely tokens whose probabilities sum to at least p.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature = {self.temperature} must be 0 or above")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be above 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be above 0 and at most 1")

    def next_token(self, logits: np.ndarray, draw: Draw) -> np.ndarray:
        """Choose a token for each row of logits: (B, V) -> (B,).

        Raises:
            NotFiniteError: the logits are not finite.
        """
        if self.temperature == 0:
            finite_maximum(logits)
            return logits.argmax(axis=-1)
        return draw(self.probabilities(logits))

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return the probabilities (B, V) of the next token, each row times a factor of its own.

        Raises:
            NotFiniteError: the logits are not finite.
        """
        largest = finite_maximum(logits)
        logits = logits - largest
        if self.temperature != 1:
            # One below the smallest normal number of the dtype would divide by zero.
            temperature = max(self.temperature, float(np.finfo(logits.dtype).tiny))
            with np.errstate(over="ignore"):
                logits /= temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kth = np.partition(logits, -self.top_k, axis=-1)[:, -self.top_k, None]  # (B, 1)
            logits[logits < kth] = -np.inf
        probs = np.exp(logits, out=logits)
        if self.top_p is not None and self.top_p < 1:
            probs /= probs.sum(axis=-1, keepdims=True)
            order = np.argsort(-probs, axis=-1)
            ordered = np.take_along_axis(probs, order, axis=-1)
            ordered[np.cumsum(ordered, axis=-1) - ordered >= self.top_p] = 0.0  # more likely tokens suffice
            np.put_along_axis(probs, order, ordered, axis=-1)
        return probs


def draw_with(generators: Sequence[random.Random]) -> Draw:
    """Return a function that draws from each row with its own generator, one number each.

    Python promises the same numbers from the same seed in every version, which numpy does not.
    """

    def draw(probs: np.ndarray) -> np.ndarray:
        sums = probs.cumsum(axis=-1, dtype=np.float64)
        rows = zip(sums, generators, strict=True)
        return np.array([row.searchsorted(rng.random() * row[-1], side="right") for row, rng in rows])

    return draw


def finite_maximum(logits: np.ndarray) -> np.ndarray:
    """Return the largest logit of each row (B, 1), or raise NotFiniteError if one is not finite."""
    largest = np.maximum.reduce(logits, axis=-1, keepdims=True)
    if not math.isfinite(largest.sum()):
        raise NotFiniteError("the model's logits are not finite")
    return largest


def generate_tokens(
    decoder: LogitsDecoder,
    prompts: np.ndarray,
    max_new_tokens: int,
    sampling: Sampling,
    draw: Draw,
    stop: Sequence[int] = (),
) -> Iterator[np.ndarray]:
    """Continue prompts (B, T), T >= 1, and yield the tokens (B,) as they are drawn.

    The decoder sees the whole text while it fits into its block_size. Beyond that, every new character would
    shift the positions of all others, and nothing that is computed could be kept. So when the context is
    full, its older half is dropped: from then on the context of a character is between block_size / 2 and
    block_size characters long. It ends early once every text has drawn the sequence `stop`.

    Raises:
        IndexError: a token is not in the vocabulary.
    """
    if prompts.min() < 0:
        raise IndexError("a token is below 0")
    block_size, B = decoder.block_size, len(prompts)
    decoder.start(B)
    unread = prompts[:, -block_size:]  # what the decoder has not seen yet
    context = [unread]  # in pieces (B, T)
    recent = np.full((B, len(stop)), -1)
    stopped = np.zeros(B, dtype=bool)
    for _ in range(max_new_tokens):
        token = sampling.next_token(decoder.logits(unread), draw)
        yield token
        if len(stop):
            recent = np.concatenate([recent[:, 1:], token[:, None]], axis=1)
            stopped |= (recent == stop).all(axis=1)
            if stopped.all():
                return
        unread = token[:, None]
        context.append(unread)
        if decoder.length == block_size:  # drop the older half, and read the rest again
            unread = np.concatenate(context, axis=1)[:, -max(1, block_size // 2) :]
            context, decoder.length = [unread], 0
