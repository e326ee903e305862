"""The pictures that a run leaves in eval/: its losses, and what its heads attend to."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from errors import first_line
from files import write_atomically
from observations import Image
from utils import Tokenizer
from utils_alg1.utils_charts import Point, drawable
from utils_alg1.utils_metrics import read_metrics
from utils_alg1.utils_observations import attention_pictures
from utils_alg1.utils_output import Console
from utils_alg1.utils_run_manager import Run

if TYPE_CHECKING:
    from utils_alg1.utils_training import Trainer

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

    curves: dict[str, dict[str, Any]] = {
        "loss/train_step": {"label": "train, each step", "color": "0.8", "linewidth": 0.8},
        "loss/train": {"label": "train", "color": "tab:blue"},
        "loss/val": {"label": "val", "color": "tab:orange"},
    }
    points: dict[str, list[Point]] = {key: [] for key in curves}
    for row in read_metrics(metrics_path):
        for key in points.keys() & row.keys():
            points[key].append((row["step"], drawable(row[key])))
    if not points["loss/val"]:
        raise ValueError(f"{metrics_path}: no evaluation in it")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, style in curves.items():
        alone = len(points[key]) == 1  # a line of one point would not be seen
        steps, losses = [x for x, _ in points[key]], [y for _, y in points[key]]
        axes.plot(steps, losses, marker="o" if alone else "", **style)
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)  # the end of a wide tag may be cut off
    axes.set(xlabel="step", ylabel="loss (nats per character)")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tag may have letters that the font lacks
        figure.savefig(buffer, format="png")
    write_atomically(picture, buffer.getvalue())


def try_loss_curve(run: Run, console: Console) -> None:
    """Draw eval/loss.png; a picture that cannot be drawn costs one line."""
    picture = run.eval_dir / "loss.png"
    try:
        picture.unlink(missing_ok=True)  # one from before a resume shows other losses
        draw_loss_curve(run.metrics_path, picture, run.run_id)
    except Exception as error:  # matplotlib fails in many ways, and the run is done
        console.warn(f"no loss curve was drawn: {first_line(error)}")


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
            colours = colormaps["magma"](square(picture, side), bytes=True)
            left, top = place_of(layers.index(layer), heads.index(head), side)
            figure.figimage(colours, left, size[1] - top - side, origin="upper")
    for i, head in enumerate(heads):
        write(place_of(0, i, side)[0] + side / 2, 1.5 * MARGIN, f"head {head}", ha="center")
    for i, layer in enumerate(layers):
        write(MARGIN / 2, place_of(i, 0, side)[1] + side / 2, f"layer {layer}", ha="center", rotation=90)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tag may have letters that the font lacks
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def square(picture: Image, side: int) -> np.ndarray:
    """The picture's pixels, (side, side) uint8; `side` is a whole number of times that of the weights."""
    grey, n_weights = picture.pixels(), len(picture.weights)
    factor = len(grey) // n_weights
    one_each = grey[::factor, ::factor]
    return one_each.repeat(side // n_weights, axis=0).repeat(side // n_weights, axis=1)


def place_of(row: int, column: int, side: int) -> tuple[int, int]:
    """The left and the top of a square in the attention picture, in pixels."""
    return MARGIN + column * (side + GAP), 2 * MARGIN + row * (side + GAP)


def evenly_spaced(n: int) -> list[int]:
    """The numbers below `n`; of more than MOST_SHOWN, so many with the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, MOST_SHOWN))})


def try_attention_picture(run: Run, trainer: Trainer, console: Console) -> str | None:
    """Draw eval/attention.png of the exported weights; returns the text that the model has read for it.

    A picture that cannot be drawn costs one line and gives None.
    """
    picture = run.eval_dir / "attention.png"
    try:
        picture.unlink(missing_ok=True)  # as above
        idx = trainer.validation_batch()[:1, :ATTENTION_LENGTH]
        pictures = attention_pictures(trainer.model, idx)
        write_atomically(picture, draw_attention(pictures, run.run_id))
        assert trainer.model.vocabulary is not None
        return Tokenizer(trainer.model.vocabulary).decode(idx[0].tolist())
    except Exception as error:  # matplotlib again
        console.warn(f"no attention picture was drawn: {first_line(error)}")
        return None
