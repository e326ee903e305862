"""How well a model predicts a text: the loss of each of its characters.

A window of block_size characters slides over the text by half its length. Of the first window every character
is scored, of the others only those that are new: so each is predicted from between half and a whole context,
but at the beginning of the text from as many as there are. Nothing predicts the first character.

Shapes use the letters of model.py: B batch (windows), T time, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from parameters import ModelConfig
from utils_alg1.network.sampling import LogitsDecoder, finite_maximum


def score_tokens(decoder: LogitsDecoder, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the losses (n,) of a text's characters, in nats and in their order.

    Args:
        pieces: the text as tokens (n,), in pieces of any length. A token t that is to be read but not scored
            is given as ~t.

    Raises:
        NotFiniteError: the logits are not finite.
    """
    T = decoder.block_size
    step = max(1, T // 2)
    unread = np.zeros(0, dtype=np.int64)  # the text from the start of the next window on
    first, B = 1, 1  # the first in it that no window has scored yet; so many windows at a time
    for piece in pieces:
        unread = np.concatenate([unread, piece])
        while len(unread) > T:
            windows = np.lib.stride_tricks.sliding_window_view(unread, T + 1)[::step][:B]
            yield _score(decoder, windows, T + 1 - first)
            unread = unread[len(windows) * step :]
            first, B = T + 1 - step, batch_size(decoder.config, decoder.batch_numbers)
    if len(unread) > first:
        yield _score(decoder, unread[None], len(unread) - first)


def batch_size(config: ModelConfig, numbers: int) -> int:
    """Return how many windows are scored at a time: the largest array has so many numbers at most."""
    assert config.vocab_size is not None
    widest = max(4 * config.n_embd, config.n_head * config.block_size, config.vocab_size)
    return max(1, numbers // (config.block_size * widest))


def _score(decoder: LogitsDecoder, windows: np.ndarray, n: int) -> np.ndarray:
    """Return the losses of the last n characters of each window (B, T + 1), without those given as ~t."""
    tokens = np.where(windows < 0, ~windows, windows)
    decoder.start(len(windows))
    logits = decoder.logits(tokens[:, :-1], n)  # (n B, V)
    losses = cross_entropy(logits, tokens[:, -n:].T.reshape(-1)).reshape(n, -1)
    return losses.T[windows[:, -n:] >= 0]


@np.errstate(all="ignore")
def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return -log softmax(logits)[target] of each row: (N, V), (N,) -> (N,), in nats. Overwrites the logits.

    Raises:
        NotFiniteError: the logits are not finite.
    """
    logits -= finite_maximum(logits)
    chosen = np.take_along_axis(logits, targets[:, None], axis=1)
    sums = np.add.reduce(np.exp(logits, out=logits), axis=1, keepdims=True)
    return (np.log(sums) - chosen)[:, 0]
