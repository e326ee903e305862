"""What Aim is shown as a picture, because it has no view of its own for it."""

from __future__ import annotations

import numpy as np

from utils_alg1.base.summaries import Embedding

SIZE, DPI = 6.0, 100  # inches, pixels in one
FONT_SIZE = 18.0  # points, at most: Aim lists its pictures at about a third of this size
MARGIN = 0.07  # of the span on each side
MOST_LABELS = 500  # more could not be told apart


def draw_embedding(embedding: Embedding) -> np.ndarray:
    """The vectors along their first two principal components, each label at its place: (H, W, 3) uint8.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = principal_components(embedding.vectors)[:MOST_LABELS]
    figure = Figure(figsize=(SIZE, SIZE), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.margins(MARGIN)
    axes.plot(*places.T, linestyle="")
    size = min(FONT_SIZE, 10 * FONT_SIZE / len(places) ** 0.5)  # of many labels, less of each
    for (x, y), label in zip(places, embedding.labels, strict=False):
        axes.text(x, y, in_font(label), ha="center", va="center", size=size, weight="bold", parse_math=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def principal_components(vectors: np.ndarray) -> np.ndarray:
    """(V, C) -> (V, 2). A component's largest coordinate is above zero, so that steps can be compared."""
    centred = np.nan_to_num(vectors.astype(np.float64))
    centred -= centred.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    places = np.zeros((len(vectors), 2))
    found = centred @ directions[:2].T
    places[:, : found.shape[1]] = found
    largest = np.abs(places).argmax(axis=0)
    return places * np.where(places[largest, [0, 1]] < 0, -1.0, 1.0)


def in_font(label: str) -> str:
    """The label, with escapes for the characters that matplotlib's font lacks."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont("DejaVu Sans:bold")).get_charmap()
    return "".join(c if ord(c) in known else c.encode("unicode_escape").decode("ascii") for c in label)
