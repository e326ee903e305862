"""Draws the pictures that trackers show, as arrays of grey pixels."""

from __future__ import annotations

import numpy as np

GRID_SIZE = 800  # pixels along a side, about
TILE_SIZES = 64, 384  # pixels along the side of a square, at least and at most
GAP, GAP_GREY, TEXT_GREY = 4, 96, 220  # pixels between squares, and shades from 0 to 255
LINE_HEIGHT, FONT_SIZE = 28, 20  # pixels; trackers show pictures at about half their size
CAPTION = "rows: queries, columns: keys"


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
    draw.text((left, picture.height - LINE_HEIGHT // 2), CAPTION, TEXT_GREY, font, anchor="lm")
    return np.asarray(picture)


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
