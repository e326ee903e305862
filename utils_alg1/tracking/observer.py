"""What a run logs, and at which steps: metrics, histograms, attention, embeddings and samples.

To add a metric, add it to the values that `Observer.log_step`, `log_evaluation` or `log_model` logs: every
tracker shows it under its name. A curve in report.html is a line of `CHARTS` (report/templates/report.js).

Logging the model changes no byte of a run: nothing here changes the global random state, the gradients or
the model's training mode, and samples are drawn with seeds of their own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model import BigramLanguageModel, Block, MultiHeadAttention
from parameters import TensorBoardConfig, due
from utils import Tokenizer
from utils_alg1.base.guard import Guard
from utils_alg1.base.summaries import (
    Embedding,
    Histogram,
    Image,
    Kind,
    compute_histograms,
    model_histograms,
)
from utils_alg1.network.cache import eval_mode
from utils_alg1.tracking.trackers import Trackers
from utils_alg1.training.progress import Evaluation
from utils_alg1.training.seeds import generator
from utils_alg1.training.trainer import Trainer

OBSERVED_TOKENS = 1024  # the model is run on so many tokens of a validation batch, or on one sequence
ATTENTION_TOKENS = 256  # of which attention is shown, at most
SAMPLE_LENGTH = 200  # characters
AT_THE_END: tuple[Kind, ...] = ("images", "embedding")  # views whose intervals may be longer than a run

View = Callable[[BigramLanguageModel, Tensor], Any]  # computes what is logged, from tokens (B, T)


def _record_modules(
    model: BigramLanguageModel, idx: Tensor, types: tuple[type[nn.Module], ...]
) -> dict[str, tuple[Any, Tensor, Tensor]]:
    """Run the model on tokens (B, T); return the modules of these types, with input and output, by name."""
    recorded: dict[str, tuple[Any, Tensor, Tensor]] = {}

    def record(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        recorded[name] = (module, inputs[0], output)

    with eval_mode(model), torch.no_grad(), contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, types):
                hooks.enter_context(module.register_forward_hook(partial(record, name)))
        model(idx)
    return recorded


def activation_histograms(model: BigramLanguageModel, idx: Tensor) -> list[Histogram]:
    """Compute histograms of the outputs of each attention, ReLU and block for tokens (B, T)."""
    recorded = _record_modules(model, idx, (MultiHeadAttention, nn.ReLU, Block))
    return [h for name, (_, _, out) in recorded.items() for h in compute_histograms(name, "activation", out)]


def attention_weights(model: BigramLanguageModel, idx: Tensor) -> np.ndarray:
    """Compute the attention weights of the first sequence of tokens (B, T): (n_layer, n_head, T, T).

    Only its first ATTENTION_TOKENS tokens are used; their attention does not depend on later ones.
    """
    recorded = _record_modules(model, idx[:1, :ATTENTION_TOKENS], (MultiHeadAttention,))
    with torch.no_grad():
        layers = [torch.cat([head.weights(x) for head in layer.heads]) for layer, x, _ in recorded.values()]
        return torch.stack(layers).float().cpu().numpy()


def attention_picture(model: BigramLanguageModel, idx: Tensor) -> list[Image]:
    """Return `attention_weights` as one image: a row for each layer, a column for each head."""
    return [Image("attention", attention_weights(model, idx), "layer", "head")]


def token_embedding(model: BigramLanguageModel) -> Embedding:
    """Return a copy of the token embedding table, (V, C), with a label for each character."""
    assert model.vocabulary is not None
    vectors = model.token_embedding_table.weight.detach().float().cpu().numpy().copy()
    return Embedding("token_embeddings", vectors, [character_label(c) for c in model.vocabulary])


def character_label(character: str) -> str:
    """Return a character as a label in a table; invisible ones are escaped as in a Python string."""
    return "\\x20" if character == " " else repr(character)[1:-1]


def draw_texts(model: BigramLanguageModel, seed: int, n: int, length: int) -> list[str]:
    """Generate `n` continuations of the vocabulary's default prompt, of `length` characters each."""
    assert model.vocabulary is not None
    tokenizer = Tokenizer(model.vocabulary)
    device = model.lm_head.weight.device
    start = tokenizer.encode(tokenizer.default_prompt) * n
    idx = torch.tensor(start, device=device).view(n, 1)
    rng = generator(seed, "samples", device=device)
    rows = model.generate(idx, length, generator=rng)[:, 1:].tolist()
    return [tokenizer.decode(row) for row in rows]


def sample(model: BigramLanguageModel, idx: Tensor, seed: int) -> dict[str, str]:
    """Generate a short text, which depends on the weights and the seed only.

    There is none if the logits for the tokens (B, T) are not finite: sampling from such probabilities fails,
    and on CUDA the whole process is lost.
    """
    with eval_mode(model), torch.no_grad():
        finite = model(idx)[0].isfinite().all()
    return {"samples": draw_texts(model, seed, 1, SAMPLE_LENGTH)[0]} if finite else {}


class Observer:
    """Logs the metrics of a run and, at the steps that the configuration asks for, views of its model.

    A view that fails costs one warning and never the run.
    """

    def __init__(
        self, trainer: Trainer, trackers: Trackers, config: TensorBoardConfig, warn: Callable[[str], None]
    ):
        self.trackers, self._trainer, self._config = trackers, trainer, config
        self._guard = Guard("looking at the model", warn)
        self._views: list[tuple[int, Kind, View]] = [
            (config.activation_interval, "histograms", activation_histograms),
            (config.attention_interval, "images", attention_picture),
            (config.embedding_interval, "embedding", lambda model, _: token_embedding(model)),
            (config.sample_interval, "texts", partial(sample, seed=trainer.config.seed)),
        ]

    def log_evaluation(self, evaluation: Evaluation) -> None:
        """Log the mean losses of an evaluation, in nats, the learning rate, and the characters trained on."""
        e = evaluation
        values = {"loss/train": e.train_loss, "loss/val": e.val_loss, "learning_rate": e.learning_rate}
        values["tokens"] = self._trainer.tokens_per_step * e.step
        self.trackers.log("scalars", values, e.step)

    def log_step(self, loss: float, step: int) -> None:
        """Log the loss and the gradients of a step, before the update."""
        values = {"loss/train_step": loss}
        if due(step, self._config.gradient_norm_interval):
            norm = self._trainer.gradient_norm
            if math.isfinite(norm):  # with float16 it may overflow, and the update is skipped
                values["gradient_norm"] = norm
        self.trackers.log("scalars", values, step)
        self._log_view(step, self._config.histogram_interval, "histograms", lambda m, _: model_histograms(m))

    def log_model(self, step: int) -> None:
        """Log the model as it is after `step` updates, and the training speed; some views also at the end."""
        if due(step, self._config.speed_interval):
            speed = self._trainer.clock.speed("metric", step)
            if speed is not None:
                self.trackers.log("scalars", {"tokens_per_second": speed}, step)
        for view in self._views:
            self._log_view(step, *view)

    def _log_view(self, step: int, interval: int, kind: Kind, view: View) -> None:
        is_last = interval > 0 and self._trainer.finished and kind in AT_THE_END
        if (is_last or due(step, interval)) and self.trackers.keeps(kind):
            with self._trainer.clock.exclude_from_speed():
                self._guard.attempt(lambda: self.trackers.log(kind, self._look(view), step))

    def _look(self, view: View) -> Any:
        idx = self._trainer.validation_batch()  # the same at every step
        return view(self._trainer.model, idx[: max(1, OBSERVED_TOKENS // idx.shape[1])])
