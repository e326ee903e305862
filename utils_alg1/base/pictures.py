"""Draws the pictures that trackers show, as arrays of grey pixels."""

from __future__ import annotations

import io
import math

import numpy as np

from utils_alg1.base.plotting import import_matplotlib

GRID_SIZE = 800  # pixels along a side, about
TILE_SIZES = 64, 384  # pixels along the side of a square, at least and at most
GAP, GAP_GREY, TEXT_GREY = 4, 96, 220  # pixels between squares, and shades from 0 to 255
LINE_HEIGHT, FONT_SIZE = 46, 36  # pixels, at most; TensorBoard shows pictures at about 0.4 of their size
CAPTION = "rows: queries, columns: keys"

LABEL_SIDE, LABEL_COLOUR = 48, (40, 40, 120, 255)  # pixels, and red, green, blue, opacity
LABEL_SIZES = 36, 18  # pixels: the font of a character, and of the escape of one
MISSING = "\u2022"  # in place of a character that the font lacks


def draw_grid(weights: np.ndarray, row_name: str, column_name: str) -> np.ndarray:
    """Draw matrices of weights between 0 and 1, (rows, columns, T, T), as a grid of squares: (H, W) uint8.

    Each row and column is labelled with its name and number. The brightness is the square root of the weight,
    because small weights would all look black otherwise.
    """
    from PIL import Image, ImageDraw, ImageFont

    n_rows, n_columns = weights.shape[:2]
    smallest, largest = TILE_SIZES
    tiles = _resize(np.nan_to_num(weights), min(max(GRID_SIZE // max(n_rows, n_columns), smallest), largest))
    side = tiles.shape[-1]
    font = ImageFont.load_default(FONT_SIZE)
    widest = font.getlength(f"{column_name} {n_columns - 1}")
    if widest > side:
        font = ImageFont.load_default(FONT_SIZE * side / widest)
    labels = [f"{row_name} {i}" for i in range(n_rows)]
    left = GAP + round(max(font.getlength(label) for label in labels)) + GAP
    width = max(left + n_columns * (side + GAP), round(font.getlength(CAPTION)) + 2 * GAP)
    picture = Image.new("L", (width, LINE_HEIGHT + n_rows * (side + GAP) + LINE_HEIGHT), GAP_GREY // 4)
    draw = ImageDraw.Draw(picture)
    for i, label in enumerate(labels):
        top = LINE_HEIGHT + i * (side + GAP)
        draw.text((GAP, top + side // 2), label, TEXT_GREY, font, anchor="lm")
        for j in range(n_columns):
            picture.paste(Image.fromarray(tiles[i, j]), (left + j * (side + GAP), top))
    for j in range(n_columns):
        middle = left + j * (side + GAP) + side // 2
        draw.text((middle, LINE_HEIGHT // 2), f"{column_name} {j}", TEXT_GREY, font, anchor="mm")
    draw.text((GAP, picture.height - LINE_HEIGHT // 2), CAPTION, TEXT_GREY, font, anchor="lm")
    return np.asarray(picture)


def draw_labels(labels: list[str]) -> np.ndarray:
    """Draw each label in a square of LABEL_SIDE: (H, W, 4) uint8, with as many squares across as down.

    This is what TensorBoard's projector shows in place of points.
    """
    from PIL import Image, ImageDraw, ImageFont

    import_matplotlib()
    from matplotlib import font_manager

    path = font_manager.findfont("DejaVu Sans")  # it comes with matplotlib, and has most alphabets
    known = font_manager.get_font(path).get_charmap()
    large, small = (ImageFont.truetype(path, size) for size in LABEL_SIZES)
    across = math.isqrt(max(len(labels) - 1, 0)) + 1
    picture = Image.new("RGBA", (across * LABEL_SIDE, across * LABEL_SIDE))
    draw = ImageDraw.Draw(picture)
    for i, label in enumerate(labels):
        text = label if all(ord(c) in known for c in label) else MISSING
        middle = ((i % across + 0.5) * LABEL_SIDE, (i // across + 0.5) * LABEL_SIDE)
        draw.text(middle, text, LABEL_COLOUR, large if len(text) == 1 else small, anchor="mm")
    return np.asarray(picture)


def to_png(pixels: np.ndarray) -> bytes:
    """Return pixels, (H, W) or (H, W, 3 or 4) uint8, as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def _resize(weights: np.ndarray, size: int) -> np.ndarray:
    """Return the grey levels of matrices (..., T, T), enlarged or averaged by a whole factor to about `size`.

    They become no larger than `size`, unless T is.
    """
    side = weights.shape[-1]
    factor = -(-side // size)  # how many weights become one pixel
    if factor > 1:
        padding = [(0, 0)] * (weights.ndim - 2) + [(0, -side % factor)] * 2
        n = -(-side // factor)
        blocks = np.pad(weights, padding).reshape(*weights.shape[:-2], n, factor, n, factor)
        weights = blocks.mean(axis=(-3, -1))
    grey = np.rint(255 * np.sqrt(weights)).astype(np.uint8)
    factor = max(1, size // weights.shape[-1])
    return grey.repeat(factor, axis=-2).repeat(factor, axis=-1)
