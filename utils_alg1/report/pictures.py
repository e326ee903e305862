"""The pictures that a run leaves in eval/: its losses, and what its heads attend to."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import Tokenizer
from utils_alg1.base.files import try_to_write, write_atomically
from utils_alg1.base.summaries import Image
from utils_alg1.report.charts import drawable
from utils_alg1.run_directory import RunDirectory
from utils_alg1.tracking.metrics_file import Point, read_curves
from utils_alg1.tracking.observer import attention_pictures
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from utils_alg1.training.trainer import Trainer

ATTENTION_LENGTH = 64  # characters that the attention picture is about; of more each would be a pixel
MOST_SHOWN = 12  # layers in it, and heads; of more, so many evenly spaced ones
TILE, GAP, MARGIN = 160, 16, 40  # pixels: a side of a head's square at most, and what is around it
LETTER = 8  # pixels that a letter of its title takes, nearly always
GROUND, INK = "#111318", "#c9ccd3"  # of the attention picture: readable on a light page and on a dark one
PICTURE_DPI = 100


def draw_loss_curve(metrics_path: Path, picture: Path, title: str) -> None:
    """Draw the losses of a metrics file as a PNG: every step, and the evaluations.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no evaluation in the file.
        Alg1Error: the file system refused (exit code 4).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = read_curves(metrics_path)
    if not curves.val:
        raise ValueError(f"{metrics_path}: no evaluation in it")
    lines: list[tuple[list[Point], dict[str, Any]]] = [
        (curves.each_step, {"label": "train, each step", "color": "0.8", "linewidth": 0.8}),
        (curves.train, {"label": "train", "color": "tab:blue"}),
        (curves.val, {"label": "val", "color": "tab:orange"}),
    ]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for points, style in lines:
        alone = len(points) == 1  # a line of one point would not be seen
        steps, losses = [x for x, _ in points], [drawable(y) for _, y in points]
        axes.plot(steps, losses, marker="o" if alone else "", **style)
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)  # the end of a wide tag may be cut off
    axes.set(xlabel="step", ylabel="loss (nats per character)")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(picture, as_png(figure))


def try_loss_curve(run: RunDirectory, console: Console) -> None:
    """Draw eval/loss.png; a picture that cannot be drawn costs one line."""

    def draw(picture: Path) -> None:
        draw_loss_curve(run.metrics_path, picture, run.run_id)

    try_to_write(run.eval_dir / "loss.png", draw, "no loss curve was drawn", console.warn)


def draw_attention(pictures: list[Image], title: str) -> bytes:
    """The attention weights of all layers and heads as one PNG: a row for each layer, a column for each head.

    In each square a row is a character that attends, and a column one that it attends to. As in the
    trackers' pictures the brightness is the root of the weight.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = evenly_spaced(1 + max(int(picture.context["layer"]) for picture in pictures))
    heads = evenly_spaced(1 + max(int(picture.context["head"]) for picture in pictures))
    n_characters = len(pictures[0].weights)
    side = n_characters * max(1, TILE // n_characters)
    size = MARGIN + len(heads) * (side + GAP), 2 * MARGIN + len(layers) * (side + GAP)
    figure = Figure(figsize=(size[0] / PICTURE_DPI, size[1] / PICTURE_DPI), dpi=PICTURE_DPI, facecolor=GROUND)
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        """`x` and `y` in pixels from the top left corner."""
        place = x / size[0], 1 - y / size[1]
        figure.text(*place, text, color=INK, fontsize=9, va="center", parse_math=False, **style)

    room = (size[0] - 2 * GAP) // LETTER
    write(GAP, MARGIN / 2, title if len(title) <= room else f"{title[: room - 1]}…")
    for picture in pictures:
        layer, head = int(picture.context["layer"]), int(picture.context["head"])
        if layer in layers and head in heads:
            colours = colormaps["magma"](picture.pixels(side), bytes=True)
            left, top = place_of(layers.index(layer), heads.index(head), side)
            figure.figimage(colours, left, size[1] - top - side, origin="upper")
    for i, head in enumerate(heads):
        write(place_of(0, i, side)[0] + side / 2, 1.5 * MARGIN, f"head {head}", ha="center")
    for i, layer in enumerate(layers):
        write(MARGIN / 2, place_of(i, 0, side)[1] + side / 2, f"layer {layer}", ha="center", rotation=90)
    return as_png(figure)


def as_png(figure: Figure) -> bytes:
    """A figure that has its canvas, as a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tag may have letters that the font lacks
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def place_of(row: int, column: int, side: int) -> tuple[int, int]:
    """The left and the top of a square in the attention picture, in pixels."""
    return MARGIN + column * (side + GAP), 2 * MARGIN + row * (side + GAP)


def evenly_spaced(n: int) -> list[int]:
    """The numbers below `n`; of more than MOST_SHOWN, so many with the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, MOST_SHOWN))})


def try_attention_picture(run: RunDirectory, trainer: Trainer, console: Console) -> str | None:
    """Draw eval/attention.png of the exported weights; returns the text that the model has read for it.

    A picture that cannot be drawn costs one line and gives None.
    """

    def draw(picture: Path) -> str:
        idx = trainer.validation_batch()[:1, :ATTENTION_LENGTH]
        pictures = attention_pictures(trainer.model, idx)
        write_atomically(picture, draw_attention(pictures, run.run_id))
        assert trainer.model.vocabulary is not None
        return Tokenizer(trainer.model.vocabulary).decode(idx[0].tolist())

    return try_to_write(run.eval_dir / "attention.png", draw, "no attention picture was drawn", console.warn)
