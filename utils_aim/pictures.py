"""Draws what Aim has no page of its own for: embeddings."""

from __future__ import annotations

import numpy as np

from utils_alg1.base.plotting import import_matplotlib
from utils_alg1.base.summaries import Embedding

SIZE, DPI = 6.0, 100  # inches, pixels per inch
FONT_SIZE = 18.0  # points, at most; Aim shows images at about a third of their size
MARGIN = 0.07  # on each side, relative to the range of the data
MAX_LABELS = 500  # more would overlap


def draw_embedding(embedding: Embedding) -> np.ndarray:
    """Draw the labels at the first two principal components of their vectors: (H, W, 3) uint8.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = principal_components(embedding.vectors)[:MAX_LABELS]
    figure = Figure(figsize=(SIZE, SIZE), dpi=DPI)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.margins(MARGIN)
    axes.plot(*points.T, linestyle="")
    size = min(FONT_SIZE, 10 * FONT_SIZE / len(points) ** 0.5)  # smaller if there are many labels
    for (x, y), label in zip(points, embedding.labels, strict=False):
        axes.text(x, y, in_font(label), ha="center", va="center", size=size, weight="bold", parse_math=False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def principal_components(vectors: np.ndarray) -> np.ndarray:
    """Project vectors (V, C) onto their first two principal components: (V, 2).

    The sign of each component makes its largest coordinate positive, so that steps can be compared.
    """
    centred = np.nan_to_num(vectors.astype(np.float64))
    centred -= centred.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(vectors), 2))
    points[:, : len(s)] = (u * s)[:, :2]
    largest = np.abs(points).argmax(axis=0)
    return points * np.where(points[largest, [0, 1]] < 0, -1.0, 1.0)


def in_font(label: str) -> str:
    """Escape the characters of a label that matplotlib's font lacks."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont("DejaVu Sans:bold")).get_charmap()
    return "".join(c if ord(c) in known else c.encode("unicode_escape").decode("ascii") for c in label)
