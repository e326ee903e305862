"""The pictures of a run in eval/: the loss curves, and the attention weights of every head."""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils_alg1.base.files import write_atomically
from utils_alg1.base.plotting import import_matplotlib
from utils_alg1.base.text import character_symbol
from utils_alg1.report.baselines import in_view
from utils_alg1.tracking.metrics_file import EACH_STEP, read_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PER_AXIS = 12  # layers and heads shown; if there are more, evenly spaced ones are selected
TILE_SIZE = 1.6  # inches: side of a square of attention weights with the space around it, at least
CELL_SIZE = 0.075  # inches: side of one weight, at least, so that a character fits beside it
ATTENTION_DPI, MAX_PIXELS = 120, 3000  # along a side, about: many squares have fewer pixels per inch
# For the characters; one that none of those installed has is drawn as an empty box.
FONTS = ("DejaVu Sans Mono", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC", "Arial Unicode MS")
BACKGROUND, FOREGROUND = "#111318", "#c9ccd3"  # readable on a light page and on a dark one


def draw_loss_curve(
    metrics_path: Path,
    picture: Path,
    title: str,
    references: Mapping[str, float] | None = None,
    resumed: Sequence[int] = (),
) -> None:
    """Plot the losses of a metrics file, those of every step and of every evaluation, and save them as a PNG.

    Args:
        references: losses to compare with, by name; those far from the curves are left out.
        resumed: the steps that the run was resumed at.

    Raises ValueError if the file contains no evaluation.
    """
    import_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    curves = read_curves(metrics_path)
    if "loss/val" not in curves:
        raise ValueError(f"{metrics_path}: no evaluation in it")
    styles: dict[str, dict[str, Any]] = {
        EACH_STEP: {"label": "train, each step", "color": "0.8", "linewidth": 0.8},
        "loss/train": {"label": "train", "color": "tab:blue"},
        "loss/val": {"label": "val", "color": "tab:orange"},
    }
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for metric, style in styles.items():
        points = curves.get(metric, [])
        marker = "o" if len(points) == 1 else ""  # a line of one point is invisible
        axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, **style)
    for name, loss in in_view(references or {}, curves).items():
        axes.axhline(loss, color="0.35", linewidth=1, linestyle="--")
        across = axes.get_yaxis_transform()  # x from 0 to 1
        label = f"{name} {loss:.2f}"
        text = axes.text(0.995, loss, label, ha="right", va="bottom", fontsize=8, transform=across)
        text.set(color="0.35", path_effects=[withStroke(linewidth=2, foreground="white")])  # legible on lines
    for i, step in enumerate(resumed):
        axes.axvline(step, color="0.5", linewidth=1, linestyle=":", label=None if i else "resumed")
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    axes.set(xlabel="step", ylabel="loss (nats per character)")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(picture, to_png(figure))


def draw_attention(weights: np.ndarray, title: str, text: str) -> bytes:
    """Draw attention weights (n_layer, n_head, T, T) as a PNG: a row of squares per layer, a column per head.

    In a square, rows are queries and columns are keys: the T characters of `text`, which stand beside the
    outer squares. As in the trackers' pictures, the brightness is the square root of the weight.
    """
    import_matplotlib()
    from matplotlib.figure import Figure

    layers, heads = evenly_spaced(weights.shape[0]), evenly_spaced(weights.shape[1])
    side = weights.shape[-1]
    gap = math.ceil(side / 10)  # what is not a number is drawn as background
    margins = [(0, 0), (0, 0), (0, gap), (0, gap)]
    squares = np.pad(np.sqrt(weights[np.ix_(layers, heads)]), margins, constant_values=np.nan)
    tile = side + gap
    image = squares.swapaxes(1, 2).reshape(len(layers) * tile, len(heads) * tile)[:-gap, :-gap]

    cell = max(TILE_SIZE / tile, CELL_SIZE)
    size = 0.7 + cell * tile * len(heads), 0.8 + cell * tile * len(layers)
    dpi = min(ATTENTION_DPI, MAX_PIXELS / max(size))
    figure = Figure(figsize=size, dpi=dpi, facecolor=BACKGROUND, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", color=FOREGROUND, fontsize=9, parse_math=False)
    axes = figure.add_subplot(frame_on=False)
    axes.imshow(image, "magma", vmin=0, vmax=1, interpolation="nearest")
    middles = (side - 1) / 2 + tile * np.arange(MAX_PER_AXIS)
    axes.set_xticks(middles[: len(heads)], [f"head {head}" for head in heads])
    axes.set_yticks(middles[: len(layers)], [f"layer {i}" for i in layers], rotation=90, va="center")
    size = min(8.0, 80 * cell)  # points, of which an inch has 72; letters are lower than their font
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelcolor=FOREGROUND, labelsize=9)
    axes.tick_params(pad=1.6 * size)  # behind the characters
    for i, character in enumerate(text):
        for tile_start in range(0, tile * len(heads), tile):
            add_character(axes, character, size, tile_start + i, -1)
        for tile_start in range(0, tile * len(layers), tile):
            add_character(axes, character, size, -1, tile_start + i)
    return to_png(figure)


def add_character(axes: Axes, character: str, size: float, x: float, y: float) -> None:
    """Draw a character with its middle at a place of the data. (A tick would take ten times as long.)"""
    symbol = character_symbol(character)
    axes.text(
        x,
        y,
        symbol if len(symbol) == 1 else "\ufffd",
        family=installed_fonts(),
        fontsize=size,
        color=FOREGROUND,
        ha="center",
        va="center_baseline",
        parse_math=False,
        in_layout=False,
    )


@functools.cache
def installed_fonts() -> list[str]:
    """Return those of FONTS that are installed: matplotlib looks for others at every text, and long."""
    from matplotlib.font_manager import fontManager

    names = {font.name for font in fontManager.ttflist}
    return [name for name in FONTS if name in names]


def displayed_width(png: bytes) -> int:
    """Return how wide a page shows a picture of the attention, in its pixels; 0 for b""."""
    width = int.from_bytes(png[16:20], "big")  # of the header, PNG's IHDR
    return round(width * 96 / ATTENTION_DPI)


def to_png(figure: Figure) -> bytes:
    """Render a figure as a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font may lack characters of the run tag
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def evenly_spaced(n: int, most: int = MAX_PER_AXIS) -> list[int]:
    """Return range(n) as a list, or `most` numbers of it that include the first and the last."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, most))})
