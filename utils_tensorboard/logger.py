"""Logs a run to TensorBoard: each kind of data under the tag that people look for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils_alg1.base.summaries import Kind, Tracker, model_histograms
from utils_tensorboard.writer import TensorBoardWriter, write_embedding

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.tensorboard import SummaryWriter

# Tags in TensorBoard. A name that is not listed is its own tag. TensorBoard sorts its pages by tag: what is
# not the reference's stands after the losses.
TAGS = {
    "loss/train_step": "Loss/train_step",
    "loss/train": "Loss/train",
    "loss/val": "Loss/val",
    "best_val_loss": "Results/best_val",
    "learning_rate": "Learning_Rate",
    "tokens": "Tokens",
    "gradient_norm": "Optimizer/gradient_norm",
    "tokens_per_second": "Tokens_Per_Second",
    "parameter": "Parameters",
    "gradient": "Gradients",
    "activation": "Outputs",
    "attention": "Views/attention",
    "samples": "Samples",
    "token_embeddings": "Token_Embeddings",
}
# Columns of the page HParams, and the tags whose last values they show.
RESULTS = {"best val loss": "Results/best_val", "val loss": "Loss/val", "train loss": "Loss/train"}
# The page Custom Scalars: regular expressions of the tags in each chart.
CHARTS = {"Loss": {"train and val": ["Multiline", ["Loss/train$", "Loss/val$"]]}}


def tag(name: str) -> str:
    """Return the tag of a name in TensorBoard."""
    return TAGS.get(name, name)


class MetricLogger(Tracker):
    """Logs the metrics of training to the event files of a `TensorBoardWriter`."""

    def __init__(self, writer: TensorBoardWriter):
        self.writer = writer

    def describe_run(self, name: str, hparams: Mapping[str, Any], main: Collection[str] = ()) -> None:
        """Write the run's row of the page HParams (see `TensorBoardWriter.add_hparams`), and the charts."""
        self.writer.add_hparams(name, hparams, main, RESULTS)
        self.writer.attempt(_add_charts)

    def log(self, kind: Kind, payload: Any, step: int) -> None:
        self.writer.attempt(_log, kind, payload, step)

    def log_training_loss(self, loss: float, step: int) -> None:
        """Log the loss of one training step."""
        self.log("scalars", {"loss/train_step": loss}, step)

    def log_evaluation_metrics(self, train_loss: float, val_loss: float, lr: float, step: int) -> None:
        """Log the mean losses of an evaluation, and the learning rate."""
        self.log("scalars", {"loss/train": train_loss, "loss/val": val_loss, "learning_rate": lr}, step)

    def log_model_histograms(self, model: nn.Module, step: int) -> None:
        """Log a histogram of each parameter and each gradient."""
        self.log("histograms", model_histograms(model), step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _add_charts(events: SummaryWriter) -> None:
    events.add_custom_scalars(CHARTS)


def _log(events: SummaryWriter, kind: Kind, payload: Any, step: int) -> None:
    match kind:
        case "scalars":
            for name, value in payload.items():
                events.add_scalar(tag(name), value, step)
        case "histograms":
            for h in payload:
                centers = (h.edges[:-1] + h.edges[1:]) / 2
                events.add_histogram_raw(
                    f"{tag(h.kind)}/{h.name}",
                    min=h.edges[0],
                    max=h.edges[-1],
                    num=h.counts.sum(),
                    sum=h.counts @ centers,
                    sum_squares=h.counts @ centers**2,
                    bucket_limits=h.edges[1:],
                    bucket_counts=h.counts,
                    global_step=step,
                )
        case "images":
            for image in payload:
                events.add_image(tag(image.name), image.pixels(), step, dataformats="HW")
        case "texts":
            for name, text in payload.items():
                # TensorBoard renders Markdown, where indented lines are code and stay as they are. Other line
                # ends than LF are those of a text from Windows (CR LF) or an old Mac (CR).
                lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
                events.add_text(tag(name), "\n".join(f"    {line}" for line in lines), step)
        case "embedding":
            write_embedding(Path(events.log_dir), tag(payload.name), payload.vectors, payload.labels, step)
