"""Curves for the report: SVG that stretches to the width of a page, with its numbers as text around it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST_POINTS = 800  # of a curve: more than a page has pixels for
SPAN = 1000  # units along each side of a curve's own coordinates

Point = tuple[float, float]  # step, value


@dataclass
class Line:
    """One curve of a chart; `kind` is its class in the style sheet."""

    name: str
    kind: str
    points: list[Point]


def thinned(points: list[Point]) -> list[Point]:
    """At most MOST_POINTS points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= MOST_POINTS:
        return points
    n_stretches = MOST_POINTS // 2
    bounds = [round(i * len(points) / n_stretches) for i in range(n_stretches + 1)]
    kept: list[Point] = []
    for begin, end in itertools.pairwise(bounds):
        stretch = points[begin:end]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two others, two or about `most`: 1, 2 or 5 times a power of ten apart."""
    if not high - low > 1e-12 * max(abs(low), abs(high)):  # no room for numbers between them
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)] if last > first else ticks(low, high, 2 * most)


def chart(title: str, unit: str, lines: list[Line], n_steps: int, large: bool = False) -> str:
    """Curves over steps 0 to `n_steps` as a figure; nothing where there is no point.

    The drawing is stretched to the place it gets, the numbers beside it are not.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    last = max(n_steps, *(x for line in lines for x, _ in line.points), 1)
    ys = [y for line in lines for _, y in line.points]
    lowest, highest = min(ys), max(ys)
    spare = 0.05 * (highest - lowest) or abs(highest) or 1.0
    low, high = lowest - spare, highest + spare

    def across(x: float) -> float:
        return x / last

    def down(y: float) -> float:
        return (high - y) / (high - low)

    y_ticks, x_ticks = ticks(lowest, highest, 6 if large else 4), ticks(0, last, 5 if large else 3)
    grid = "".join(f"M0 {SPAN * down(y):.1f}H{SPAN}" for y in y_ticks)
    drawn = [f'<path class=grid d="{grid}"/>']
    for line in lines:
        points = thinned(line.points) if len(line.points) > 1 else line.points * 2  # a dot needs two ends
        path = " ".join(f"{SPAN * across(x):.1f},{SPAN * down(y):.1f}" for x, y in points)
        drawn.append(f'<polyline class="{line.kind}" points="{path}"/>')
    labels = [
        f'<span class=y style="top:{100 * down(y):.2f}%">{tick_label(y, y_ticks)}</span>' for y in y_ticks
    ]
    labels += [
        f'<span class=x style="left:{100 * across(x):.2f}%">{tick_label(x, x_ticks)}</span>' for x in x_ticks
    ]
    key = "".join(f'<li class="{line.kind}">{line.name}</li>' for line in lines) if len(lines) > 1 else ""
    return (
        f'<figure class="chart{" large" if large else ""}">'
        f"<figcaption>{title} <small>{unit}</small></figcaption>"
        f'<div class=plot><svg viewBox="0 0 {SPAN} {SPAN}" preserveAspectRatio=none role=img'
        f' aria-label="{title} over the steps">{"".join(drawn)}</svg>{"".join(labels)}</div>'
        f"{f'<ul class=key>{key}</ul>' if key else ''}</figure>"
    )


def tick_label(value: float, among: Sequence[float]) -> str:
    """A number as short as the distance of its neighbours allows."""
    if value == 0:
        return "0"
    largest = max(abs(tick) for tick in among)
    if largest < 0.1:
        return f"{value:.3g}"
    if largest >= 1e6:
        return f"{value / 1e6:.4g}M"
    if largest >= 1e4:
        return f"{value / 1e3:.4g}k"
    step = abs(among[1] - among[0]) if len(among) > 1 else largest
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
