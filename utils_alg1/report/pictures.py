"""The pictures of a run in eval/: the loss curves, and the attention weights of every head."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import Tokenizer
from utils_alg1.base.files import write_atomically, write_or_warn
from utils_alg1.base.summaries import Image
from utils_alg1.report.charts import clamp
from utils_alg1.run_directory import RunDirectory
from utils_alg1.tracking.metrics_file import Point, read_curves
from utils_alg1.tracking.observer import attention_pictures
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from utils_alg1.training.trainer import Trainer

# The attention picture: a grid of squares, one per layer and head.
ATTENTION_LENGTH = 64  # characters of context; with more, a character would be less than two pixels wide
MAX_PER_AXIS = 12  # layers and heads shown; if there are more, evenly spaced ones are selected
TILE_SIZE, GAP, MARGIN = 160, 16, 40  # pixels: side of a square at most, space between and around them
LETTER_WIDTH = 8  # pixels: upper bound for most letters of the title
BACKGROUND, FOREGROUND = "#111318", "#c9ccd3"  # readable on a light page and on a dark one
PICTURE_DPI = 100


def draw_loss_curve(metrics_path: Path, picture: Path, title: str) -> None:
    """Plot the losses of a metrics file, those of every step and of every evaluation, and save them as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file contains no evaluation.
        Alg1Error: the picture cannot be written (exit code 4).
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
        marker = "o" if len(points) == 1 else ""  # a line of one point is invisible
        axes.plot([x for x, _ in points], [clamp(y) for _, y in points], marker=marker, **style)
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    axes.set(xlabel="step", ylabel="loss (nats per character)")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(picture, to_png(figure))


def try_loss_curve(run: RunDirectory, console: Console) -> None:
    """Write eval/loss.png; if that fails, print a warning."""

    def draw(picture: Path) -> None:
        draw_loss_curve(run.metrics_path, picture, run.run_id)

    write_or_warn(run.eval_dir / "loss.png", draw, "no loss curve was drawn", console.warn)


def draw_attention(pictures: list[Image], title: str) -> bytes:
    """Draw the attention weights as one PNG: a row of squares per layer, a column of squares per head.

    In a square, rows are queries and columns are keys. As in the trackers' pictures, the brightness is the
    square root of the weight.

    Args:
        pictures: one per layer and head, of the same size.
        title: the text above the squares; truncated if it is too wide.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = evenly_spaced(1 + max(int(picture.context["layer"]) for picture in pictures))
    heads = evenly_spaced(1 + max(int(picture.context["head"]) for picture in pictures))
    n_characters = len(pictures[0].weights)
    side = n_characters * max(1, TILE_SIZE // n_characters)
    size = MARGIN + len(heads) * (side + GAP), 2 * MARGIN + len(layers) * (side + GAP)
    inches = size[0] / PICTURE_DPI, size[1] / PICTURE_DPI
    figure = Figure(figsize=inches, dpi=PICTURE_DPI, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        """Write text at (x, y), in pixels from the top left corner."""
        position = x / size[0], 1 - y / size[1]
        figure.text(*position, text, color=FOREGROUND, fontsize=9, va="center", parse_math=False, **style)

    max_letters = (size[0] - 2 * GAP) // LETTER_WIDTH
    write(GAP, MARGIN / 2, title if len(title) <= max_letters else f"{title[: max_letters - 1]}…")
    for picture in pictures:
        layer, head = int(picture.context["layer"]), int(picture.context["head"])
        if layer in layers and head in heads:
            colours = colormaps["magma"](picture.pixels(side), bytes=True)
            left, top = tile_position(layers.index(layer), heads.index(head), side)
            figure.figimage(colours, left, size[1] - top - side, origin="upper")
    for i, head in enumerate(heads):
        write(tile_position(0, i, side)[0] + side / 2, 1.5 * MARGIN, f"head {head}", ha="center")
    for i, layer in enumerate(layers):
        write(MARGIN / 2, tile_position(i, 0, side)[1] + side / 2, f"layer {layer}", ha="center", rotation=90)
    return to_png(figure)


def to_png(figure: Figure) -> bytes:
    """Render a figure that has a canvas as a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font may lack characters of the run tag
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def tile_position(row: int, column: int, side: int) -> tuple[int, int]:
    """Return the left and top edge of a square of the attention picture, in pixels."""
    return MARGIN + column * (side + GAP), 2 * MARGIN + row * (side + GAP)


def evenly_spaced(n: int) -> list[int]:
    """Return range(n) as a list, or MAX_PER_AXIS numbers of it that include the first and the last."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, MAX_PER_AXIS))})


def try_attention_picture(run: RunDirectory, trainer: Trainer, console: Console) -> str | None:
    """Write eval/attention.png of the exported weights; if that fails, print a warning.

    Returns:
        The text whose attention weights are shown, or None without a picture.
    """

    def draw(picture: Path) -> str:
        idx = trainer.validation_batch()[:1, :ATTENTION_LENGTH]
        pictures = attention_pictures(trainer.model, idx)
        write_atomically(picture, draw_attention(pictures, run.run_id))
        assert trainer.model.vocabulary is not None
        return Tokenizer(trainer.model.vocabulary).decode(idx[0].tolist())

    return write_or_warn(run.eval_dir / "attention.png", draw, "no attention picture was drawn", console.warn)
