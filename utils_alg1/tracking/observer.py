"""What can be seen of a model at a step, and when it is shown to the trackers.

How often one looks changes no byte of a run: nothing here touches the global random state, the gradients or
the model's mode, and everything is drawn from seeds of its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model import BigramLanguageModel, Block, MultiHeadAttention
from parameters import TensorBoardConfig, due
from utils import Tokenizer
from utils_alg1.base.errors import Guard
from utils_alg1.base.summaries import PICTURE_SIZE, Embedding, Histogram, Image, count_values
from utils_alg1.tracking.trackers import Trackers
from utils_alg1.training.seeds import generator
from utils_alg1.training.trainer import Trainer

OBSERVED_TOKENS = 1024  # of the batch, at least one sequence; more would only take longer
SAMPLE_LENGTH = 200  # characters


@contextlib.contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """In here the model does not train: no dropout, no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _watch(
    model: BigramLanguageModel, idx: Tensor, kinds: tuple[type[nn.Module], ...]
) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Run the model: each module of those kinds with its input and its output, by name."""
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            seen[name] = (module, inputs[0], output)

        return hook

    with _at_rest(model), contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                hooks.enter_context(module.register_forward_hook(note(name)))
        model(idx)
    return seen


def activation_histograms(model: BigramLanguageModel, idx: Tensor) -> list[Histogram]:
    """What each attention, each ReLU and each block puts out for tokens (B, T), by the module's name."""
    seen = _watch(model, idx, (MultiHeadAttention, nn.ReLU, Block))
    counted = [count_values(name, "activation", output) for name, (_, _, output) in seen.items()]
    return [histogram for histogram in counted if histogram is not None]


def attention_weights(model: BigramLanguageModel, idx: Tensor) -> np.ndarray:
    """How much each character of the first sequence attends to each: (n_layer, n_head, T, T).

    A sequence longer than a picture is cut; what its first characters see does not depend on the rest.
    """
    seen = _watch(model, idx[:1, :PICTURE_SIZE], (MultiHeadAttention,))
    with torch.no_grad():
        layers = [
            torch.cat([head.weights(x) for head in attention.heads])  # (H, T, T)
            for attention, x, _ in seen.values()
            if isinstance(attention, MultiHeadAttention)
        ]
        return torch.stack(layers).float().cpu().numpy()


def attention_pictures(model: BigramLanguageModel, idx: Tensor) -> list[Image]:
    """`attention_weights` as a picture for each layer and head: a row for each character that attends."""
    return [
        Image("attention", {"layer": str(layer), "head": str(head)}, weights)
        for layer, heads in enumerate(attention_weights(model, idx))
        for head, weights in enumerate(heads)
    ]


def token_embedding(model: BigramLanguageModel) -> Embedding:
    """The vector of each character: (V, C)."""
    assert model.vocabulary is not None
    vectors = model.token_embedding_table.weight.detach().float().cpu().numpy().copy()
    return Embedding("token_embeddings", vectors, [character_label(c) for c in model.vocabulary])


def character_label(character: str) -> str:
    """A character as it can stand in a table; what cannot be seen is written as in a Python string."""
    if character == " ":
        return "\\x20"
    if character.isprintable() and character != "\\":
        return character
    return character.encode("unicode_escape").decode("ascii")


def draw_texts(model: BigramLanguageModel, seed: int, n: int, length: int) -> list[str]:
    """`n` continuations of the vocabulary's default prompt, `length` characters each."""
    assert model.vocabulary is not None
    tokenizer = Tokenizer(model.vocabulary)
    device = model.lm_head.weight.device
    start = tokenizer.encode(tokenizer.default_prompt) * n
    idx = torch.tensor(start, device=device).view(n, 1)
    draw = generator(seed, "samples", device=device)
    rows = model.generate(idx, length, generator=draw)[:, 1:].tolist()
    return [tokenizer.decode(row) for row in rows]


def sample_text(model: BigramLanguageModel, seed: int) -> str:
    """A short text; the same weights and the same seed draw the same one."""
    return draw_texts(model, seed, 1, SAMPLE_LENGTH)[0]


class Observer:
    """Shows the trackers what is due at a step; does nothing in the others.

    A look that fails costs one warning and never the run.

    Attributes:
        trackers: those that are shown it.
    """

    def __init__(
        self, trainer: Trainer, trackers: Trackers, config: TensorBoardConfig, warn: Callable[[str], None]
    ):
        self.trackers, self._trainer, self._config = trackers, trainer, config
        self._guard = Guard("looking at the model", warn)
        self._looks = [
            (config.activation_interval, self._show_activations),
            (config.attention_interval, self._show_attention),
            (config.embedding_interval, self._show_embedding),
            (config.sample_interval, self._show_sample),
        ]

    def observe(self, step: int) -> None:
        """Show the model as it is after `step` updates."""
        if due(step, self._config.speed_interval):
            self._log_speed(step)
        for interval, look in self._looks:
            if due(step, interval):
                self._attempt(look, step)

    def log_training_step(self, loss: float, step: int) -> None:
        """Show a step's loss and gradients, before the update."""
        values = {"loss/train_step": loss}
        if due(step, self._config.gradient_norm_interval):
            norm = float(self._trainer.gradient_norm)
            if math.isfinite(norm):  # with float16 it may overflow, and the update is skipped
                values["gradient_norm"] = norm
        self.trackers.log_scalars(values, step)
        if due(step, self._config.histogram_interval):
            self._attempt(self._show_parameters, step)

    def _log_speed(self, step: int) -> None:
        speed = self._trainer.clock.training_speed(step)
        if speed is not None:
            self.trackers.log_scalars({"tokens_per_second": speed}, step)

    def _attempt(self, look: Callable[[int], None], step: int) -> None:
        if self.trackers.working:
            with self._trainer.clock.pause():
                self._guard.attempt(look, step)

    def _tokens(self) -> Tensor:
        """What the model is looked at with, the same at every step: (B, T)."""
        idx = self._trainer.validation_batch()
        return idx[: max(1, OBSERVED_TOKENS // idx.shape[1])]

    def _show_parameters(self, step: int) -> None:
        self.trackers.log_model_histograms(self._trainer.model, step)

    def _show_activations(self, step: int) -> None:
        self.trackers.log_histograms(activation_histograms(self._trainer.model, self._tokens()), step)

    def _show_attention(self, step: int) -> None:
        self.trackers.log_images(attention_pictures(self._trainer.model, self._tokens()), step)

    def _show_embedding(self, step: int) -> None:
        self.trackers.log_embedding(token_embedding(self._trainer.model), step)

    def _show_sample(self, step: int) -> None:
        model = self._trainer.model
        # Drawing from a distribution that is not finite fails, on CUDA for the whole process.
        with _at_rest(model):
            drawable = model(self._tokens())[0].isfinite().all()
        if drawable:
            text = sample_text(model, self._trainer.config.seed)
            self.trackers.log_texts({"samples": text}, step)
