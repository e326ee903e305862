"""Problems with a user's input: collected, worded alike, and raised in one message."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.other_names import answer_to, bare, same_as
from utils_alg1.base.scripts import command

CONFIG_HINT = f"{command('train.py')} --help explains every value"
SHORTEST_BEGINNING = 3  # characters of a name that stand for all of it
LEAST_SIMILARITY = 0.75  # of a name with a typing error, see difflib.SequenceMatcher.ratio


class Problem(NamedTuple):
    """A problem with one parameter, or with several taken together."""

    text: str
    names: tuple[str, ...] = ()  # of the parameters that are wrong


def shown(value: Any) -> str:
    """Format a value for a message: on one line and not too long."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError):  # a mapping only YAML can express, or a huge integer
        text = f"({type(value).__name__})"
    return text if len(text) <= 60 else text[:57] + "..."


def raise_problems(problems: list[Problem], hint: str = CONFIG_HINT) -> None:
    """Raise one Alg1Error that lists every problem; do nothing if there is none.

    A problem of several parameters is left out if one of them has a problem of its own: it may be the cause.
    """
    wrong = {names[0] for _, names in problems if len(names) == 1}
    kept = [text for text, names in problems if len(names) < 2 or wrong.isdisjoint(names)]
    if len(kept) == 1:
        raise Alg1Error(kept[0], hint)
    if kept:
        raise Alg1Error("\n  - ".join([f"{len(kept)} problems:", *kept]), hint)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the name in `known` that `word` most likely means, or ""."""
    return same_as(word, known) or similar(word, known)


def explain(word: str, known: Iterable[str], value: Any = None) -> str:
    """Return what to write for an unknown flag or key, to be put behind it in a message; "" if nobody knows.

    See `answer_to`, which is asked first.
    """
    return answer_to(word, known, value) or similar(word, known)


def similar(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" with the only name that begins with `word` or looks like it; or "".

    What looks like it has its words in the same order, each with no more than a typing error, or is the
    same but for the underscores: min_iters does not look like max_iters, nor export_onnx like export.
    """
    by_name, key = {bare(name): name for name in known}, bare(word).lower()
    begun = [name for name in by_name if len(key) >= SHORTEST_BEGINNING and name.startswith(key)]
    ratios = {name: _similarity(key, name) for name in by_name}
    best = max(ratios.values(), default=0)
    close = [name for name in by_name if ratios[name] == best >= LEAST_SIMILARITY]
    for found in (begun, close):
        if len(found) == 1:
            return f"; did you mean {by_name[found[0]]}?"
    return ""


def _similarity(one: str, other: str) -> float:
    """Return how similar two names are, from 0 to 1: as their least similar words."""
    words, others = one.split("_"), other.split("_")
    if len(words) != len(others):
        return float("".join(words) == "".join(others))
    return min(difflib.SequenceMatcher(None, a, b).ratio() for a, b in zip(words, others, strict=True))
