"""Curves for the report: SVG that stretches to the width of a page, with its numbers as text around it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from utils_alg1.tracking.metrics_file import Point

MOST_POINTS = 800  # of a curve: more than a page has pixels for
SPAN = 1000  # units along each side of a curve's own coordinates
LARGEST = 1e100  # past every float32; sums and quotients of such numbers are still numbers
LEVEL = 1e-4  # of its largest value: a chart whose values differ by less shows a level line


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


def drawable(value: float) -> float:
    """A value that a chart can compute with: at most LARGEST from zero, and zero where it is nearly so."""
    return 0.0 if abs(value) < 1 / LARGEST else min(max(value, -LARGEST), LARGEST)


def is_level(low: float, high: float) -> bool:
    """Whether numbers between these two would need more digits than there is room for."""
    return not high - low > LEVEL * max(abs(low), abs(high))


def ticks(low: float, high: float, most: int, smallest: float = 0.0) -> list[float]:
    """Round numbers between two others, two or about `most`: 1, 2 or 5 times a power of ten apart.

    They are at least `smallest` apart. Where the two are too close for that, there is one: the lower.
    """
    if is_level(low, high):
        return [low]
    raw = max((high - low) / most, smallest)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last > first:
        return [i * step for i in range(first, last + 1)]
    return [low] if raw <= smallest else ticks(low, high, 2 * most, smallest)


def chart(title: str, unit: str, lines: list[Line], n_steps: int, large: bool = False) -> str:
    """Curves over steps 0 to `n_steps` as a figure; nothing where there is no point.

    The drawing is stretched to the place it gets, the numbers beside it are not. Values past LARGEST are
    drawn there.
    """
    lines = [
        Line(line.name, line.kind, [(x, drawable(y)) for x, y in line.points])
        for line in lines
        if line.points
    ]
    if not lines:
        return ""
    last = max(n_steps, *(x for line in lines for x, _ in line.points), 1)
    ys = [y for line in lines for _, y in line.points]
    lowest, highest = min(ys), max(ys)
    spare = (abs(highest) or 1.0) if is_level(lowest, highest) else 0.05 * (highest - lowest)
    low, high = lowest - spare, highest + spare

    def across(x: float) -> float:
        return x / last

    def down(y: float) -> float:
        return (high - y) / (high - low)

    y_ticks = ticks(lowest, highest, 6 if large else 4)
    x_ticks = ticks(0, last, 5 if large else 3, smallest=1)
    y_labels = tick_labels(y_ticks)
    grid = "".join(f"M0 {SPAN * down(y):.1f}H{SPAN}" for y in y_ticks)
    drawn = [f'<path class=grid d="{grid}"/>']
    for line in lines:
        is_dot = len(line.points) == 1
        points = line.points * 2 if is_dot else thinned(line.points)  # a dot is a line from itself to itself
        path = " ".join(f"{SPAN * across(x):.1f},{SPAN * down(y):.1f}" for x, y in points)
        drawn.append(f'<polyline class="{line.kind}{" dot" if is_dot else ""}" points="{path}"/>')
    labels = [
        f'<span class=y style="top:{100 * down(y):.2f}%">{label}</span>'
        for y, label in zip(y_ticks, y_labels, strict=True)
    ]
    labels += [
        f'<span class=x style="left:{100 * across(x):.2f}%">{label}</span>'
        for x, label in zip(x_ticks, tick_labels(x_ticks), strict=True)
    ]
    key = "".join(f'<li class="{line.kind}">{line.name}</li>' for line in lines) if len(lines) > 1 else ""
    return (
        f'<figure class="chart{" large" if large else ""}" style="--widest:{max(map(len, y_labels))}">'
        f"<figcaption>{title} <small>{unit}</small></figcaption>"
        f'<div class=plot><svg viewBox="0 0 {SPAN} {SPAN}" preserveAspectRatio=none role=img'
        f' aria-label="{title} over the steps">{"".join(drawn)}</svg>{"".join(labels)}</div>'
        f"{f'<ul class=key>{key}</ul>' if key else ''}</figure>"
    )


def tick_labels(values: list[float]) -> list[str]:
    """The numbers of an axis, with the fewest decimals that tell them apart.

    Below 0.001 and from a million on they count in a power of ten, all in the same one.
    """
    largest = max(abs(value) for value in values)
    power = math.floor(math.log10(largest) + 1e-9) if largest else 0
    power = 0 if -3 <= power < 6 else 6 if 6 <= power < 9 else power
    unit = {0: "", 6: "M"}.get(power, f"e{power}")
    scaled = [value / 10.0**power for value in values]
    step = scaled[1] - scaled[0] if len(values) > 1 else largest / 10.0**power / 10
    decimals = next(n for n in itertools.count() if all(abs(round(x, n) - x) <= step / 100 for x in scaled))
    return [f"{x:,.{decimals}f}{unit}" if x else "0" for x in scaled]
