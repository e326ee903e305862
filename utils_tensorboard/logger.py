"""What training tells TensorBoard, under the tags that people look for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from utils_alg1.base.summaries import Embedding, Histogram, Image, model_histograms
from utils_tensorboard.writer import TensorBoardWriter

if TYPE_CHECKING:
    from torch import nn

# What each thing is called here; a name that is not among them is a KeyError.
TAGS = {
    "loss/train_step": "Loss/train_step",
    "loss/train": "Loss/train",
    "loss/val": "Loss/val",
    "learning_rate": "Learning_Rate",
    "gradient_norm": "Gradient_Norm",
    "tokens_per_second": "Tokens_Per_Second",
    "parameter": "Parameters",
    "gradient": "Gradients",
    "activation": "Activations",
    "attention": "Attention",
    "samples": "Samples",
    "token_embeddings": "Token_Embeddings",
}


class MetricLogger:
    """Logs the metrics of training through a `TensorBoardWriter`."""

    def __init__(self, writer: TensorBoardWriter):
        self.writer = writer

    @property
    def enabled(self) -> bool:
        """Whether points are still being written."""
        return self.writer.enabled

    def log_training_loss(self, loss: float, step: int) -> None:
        """The loss of one training step."""
        self.log_scalars({"loss/train_step": loss}, step)

    def log_evaluation_metrics(self, train_loss: float, val_loss: float, lr: float, step: int) -> None:
        """The mean losses of an evaluation, and the learning rate."""
        self.log_scalars({"loss/train": train_loss, "loss/val": val_loss, "learning_rate": lr}, step)

    def log_model_histograms(self, model: nn.Module, step: int) -> None:
        """A histogram of each parameter and each gradient."""
        self.log_histograms(model_histograms(model), step)

    def log_hyperparameters(self, run_name: str, values: Mapping[str, Any]) -> None:
        """What the run was started with, as the row `run_name` of a table of all runs."""
        self.writer.add_hparams(run_name, values)

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """A point of each curve named."""
        for name, value in values.items():
            self.writer.add_scalar(TAGS[name], value, step)

    def log_histograms(self, histograms: Iterable[Histogram], step: int) -> None:
        """Histograms that are already counted."""
        for h in histograms:
            self.writer.add_histogram(f"{TAGS[h.kind]}/{h.name}", h.counts, h.edges, step)

    def log_images(self, images: Iterable[Image], step: int) -> None:
        """Pictures, each under a tag that says which of its kind it is."""
        for image in images:
            which = [f"{key}_{value}" for key, value in image.context.items()]
            self.writer.add_image("/".join([TAGS[image.name], *which]), image.pixels(), step)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Texts, shown as they are."""
        for name, text in texts.items():
            self.writer.add_text(TAGS[name], text, step)

    def log_embedding(self, embedding: Embedding, step: int) -> None:
        """Vectors, for the projector."""
        self.writer.add_embedding(TAGS[embedding.name], embedding.vectors, embedding.labels, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
