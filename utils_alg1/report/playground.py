"""The playground: a model inside a page, which continues what one types there, without a network.

eval/report.html has one, and so has the page that `inference.py --page` writes of any export. The weights
are in it as 16-bit integers, and templates/model.js is the forward pass.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from utils import Tokenizer
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import check_target, write_atomically
from utils_alg1.network.decoder import Decoder
from utils_alg1.network.scoring import score_tokens
from utils_alg1.network.weights import Weights, model_shapes
from utils_alg1.report.rendering import render, source

LARGEST_IN_REPORT = 1_000_000  # parameters: 2.7 MB of a page
LARGEST_PAGE = 150_000_000  # a browser reads no longer string than the 400 MB of so many
GENERATOR = "ALG1 playground"  # by which a page of `write_page` is known
OPENING_LENGTH = 20  # characters at most that a playground has in it at first
STYLE = ("report.css", "playground.css")
SCRIPT = ("elements.js", "playground.js")


def playground_values(weights: Weights) -> dict[str, Any]:
    """Return what templates need to put a model into a page."""
    assert weights.vocabulary is not None
    shapes = model_shapes(weights.config)
    integers, scales = zip(*(quantize(weights.tensors[name]) for name in shapes), strict=True)
    model = {
        "config": dataclasses.asdict(weights.config),
        "vocabulary": weights.vocabulary,
        "default_prompt": Tokenizer(weights.vocabulary).default_prompt,
        "shapes": list(shapes.items()),  # in the order of the numbers
        "integers": to_base64(integers),
        "scales": to_base64(scales),
    }
    return {"playground": model, "model_script": source("model.js")}


@np.errstate(invalid="ignore")
def quantize(tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a tensor (..., N) as 16-bit integers and their scales (..., 1), one for each row.

    In rows of numbers of similar sizes that is several times as exact as float16, which is as large. A row of
    zeros has the scale 0, whatever its integers are.
    """
    scales = np.abs(tensor).max(axis=-1, keepdims=True).astype("<f4") / np.float32(32767)
    return np.round(tensor / scales).astype("<i2"), scales


def to_base64(arrays: Iterable[np.ndarray]) -> str:
    """Return the bytes of arrays, one after another, as base64."""
    return base64.b64encode(b"".join(array.tobytes() for array in arrays)).decode("ascii")


def opening(text: str) -> str:
    """Return the first words of a text, from one line: what the playground of a report continues at first."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    words = line[: OPENING_LENGTH + 1].rpartition(" ")[0].rstrip() if len(line) > OPENING_LENGTH else line
    return words or line[:OPENING_LENGTH]


def surprise(weights: Weights, tokens: np.ndarray) -> dict[str, Any]:
    """Return the characters of a text (n,) and the loss of each in nats; the first has none.

    "evenly" is the loss of a uniform guess.
    """
    assert weights.vocabulary is not None
    decoder = Decoder(weights.config, weights.tensors)
    losses = np.concatenate(list(score_tokens(decoder, [tokens])))
    return {
        "characters": [weights.vocabulary[token] for token in tokens],
        "losses": [None, *(round(float(loss), 3) for loss in losses)],
        "evenly": float(np.log(len(weights.vocabulary))),
    }


def check_page(path: str) -> None:
    """Check that --page can be written, and overwrites nothing but such a page. Raises Alg1Error if not."""

    def is_page(path: Path) -> bool:
        with path.open("rb") as file:
            return GENERATOR.encode() in file.read(1000)

    check_target("--page", path, "a page of a model", is_page)


def write_page(path: str, weights: Weights, name: str) -> None:
    """Write a page with a model in it.

    Raises:
        Alg1Error: the model cannot be in a page, or the file system refused (exit code 4).
    """
    n_parameters = weights.config.n_parameters
    if n_parameters > LARGEST_PAGE:
        text = f"a model of {n_parameters:,} parameters is too large for a page"
        raise Alg1Error(text, f"{LARGEST_PAGE:,} are the most that a browser can read")
    page = render(
        "playground.html",
        STYLE,
        SCRIPT,
        name=name,
        generator=GENERATOR,
        config=weights.config,
        **playground_values(weights),
    )
    write_atomically(path, page.encode("utf-8"))
