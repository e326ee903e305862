"""Line charts for the report: an SVG that scales with the page, and tick labels as HTML text around it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from utils_alg1.tracking.metrics_file import Point

MAX_POINTS = 800  # points of a curve; a page has fewer pixels
VIEW_SIZE = 1000  # width and height of the SVG's coordinate system
MAX_VALUE = 1e100  # larger than any float32, while sums and quotients of such values stay finite
FLAT_TOLERANCE = 1e-4  # values whose relative difference is smaller are drawn as a flat line


@dataclass
class Line:
    """A curve of a chart.

    Attributes:
        name: its name in the legend.
        kind: its class in the style sheet.
        points: (step, value) in the order of the steps.
    """

    name: str
    kind: str
    points: list[Point]


def downsample(points: list[Point]) -> list[Point]:
    """Reduce a curve to MAX_POINTS points: the minimum and the maximum of each interval, so peaks remain."""
    if len(points) <= MAX_POINTS:
        return points
    n_intervals = MAX_POINTS // 2
    bounds = [round(i * len(points) / n_intervals) for i in range(n_intervals + 1)]
    kept: list[Point] = []
    for begin, end in itertools.pairwise(bounds):
        interval = points[begin:end]
        kept += sorted({min(interval, key=lambda p: p[1]), max(interval, key=lambda p: p[1])})
    return kept


def clamp(value: float) -> float:
    """Clamp a value to [-MAX_VALUE, MAX_VALUE]; a value closer to zero than 1 / MAX_VALUE becomes zero."""
    return 0.0 if abs(value) < 1 / MAX_VALUE else min(max(value, -MAX_VALUE), MAX_VALUE)


def is_flat(low: float, high: float) -> bool:
    """Return whether two values are too close for tick labels that tell them apart."""
    return not high - low > FLAT_TOLERANCE * max(abs(low), abs(high))


def ticks(low: float, high: float, max_ticks: int, min_spacing: float = 0.0) -> list[float]:
    """Return round tick values between `low` and `high`, spaced by 1, 2 or 5 times a power of ten.

    There are at least two and about `max_ticks`. If the range is flat or narrower than two ticks
    `min_spacing` apart, the only tick is `low`.
    """
    if is_flat(low, high):
        return [low]
    raw = max((high - low) / max_ticks, min_spacing)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last > first:
        return [i * step for i in range(first, last + 1)]
    return [low] if raw <= min_spacing else ticks(low, high, 2 * max_ticks, min_spacing)


def chart(title: str, unit: str, lines: list[Line], n_steps: int, large: bool = False) -> str:
    """Return an HTML figure of curves over the steps, or "" if there is no point.

    The SVG is stretched to the available size; the labels around it are not. Values are clamped to MAX_VALUE.

    Args:
        title: the caption.
        unit: the unit of the values, printed after the caption.
        lines: the curves.
        n_steps: the x-axis ends here, or at the last point if that is later.
        large: use the style and the number of ticks of a large chart.
    """
    lines = [
        Line(line.name, line.kind, [(x, clamp(y)) for x, y in line.points]) for line in lines if line.points
    ]
    if not lines:
        return ""
    x_max = max(n_steps, *(x for line in lines for x, _ in line.points), 1)
    ys = [y for line in lines for _, y in line.points]
    y_min, y_max = min(ys), max(ys)
    margin = (abs(y_max) or 1.0) if is_flat(y_min, y_max) else 0.05 * (y_max - y_min)
    bottom, top = y_min - margin, y_max + margin

    def x_fraction(x: float) -> float:
        return x / x_max

    def y_fraction(y: float) -> float:
        return (top - y) / (top - bottom)

    y_ticks = ticks(y_min, y_max, 6 if large else 4)
    x_ticks = ticks(0, x_max, 5 if large else 3, min_spacing=1)
    y_labels = tick_labels(y_ticks)
    grid = "".join(f"M0 {VIEW_SIZE * y_fraction(y):.1f}H{VIEW_SIZE}" for y in y_ticks)
    shapes = [f'<path class=grid d="{grid}"/>']
    for line in lines:
        is_dot = len(line.points) == 1
        points = line.points * 2 if is_dot else downsample(line.points)  # a dot is a line of length zero
        path = " ".join(f"{VIEW_SIZE * x_fraction(x):.1f},{VIEW_SIZE * y_fraction(y):.1f}" for x, y in points)
        shapes.append(f'<polyline class="{line.kind}{" dot" if is_dot else ""}" points="{path}"/>')
    labels = [
        f'<span class=y style="top:{100 * y_fraction(y):.2f}%">{label}</span>'
        for y, label in zip(y_ticks, y_labels, strict=True)
    ]
    labels += [
        f'<span class=x style="left:{100 * x_fraction(x):.2f}%">{label}</span>'
        for x, label in zip(x_ticks, tick_labels(x_ticks), strict=True)
    ]
    entries = [f'<li class="{line.kind}">{line.name}</li>' for line in lines]
    legend = f"<ul class=key>{''.join(entries)}</ul>" if len(entries) > 1 else ""
    return (
        f'<figure class="chart{" large" if large else ""}" style="--widest:{max(map(len, y_labels))}">'
        f"<figcaption>{title} <small>{unit}</small></figcaption>"
        f'<div class=plot><svg viewBox="0 0 {VIEW_SIZE} {VIEW_SIZE}" preserveAspectRatio=none role=img'
        f' aria-label="{title} over the steps">{"".join(shapes)}</svg>{"".join(labels)}</div>'
        f"{legend}</figure>"
    )


def tick_labels(values: list[float]) -> list[str]:
    """Format tick values with the fewest decimals that tell them apart.

    Values below 0.001 and from one million on share one power of ten, written as e-5 or M for example.
    """
    largest = max(abs(value) for value in values)
    power = math.floor(math.log10(largest) + 1e-9) if largest else 0
    power = 0 if -3 <= power < 6 else 6 if 6 <= power < 9 else power
    unit = {0: "", 6: "M"}.get(power, f"e{power}")
    scaled = [value / 10.0**power for value in values]
    step = scaled[1] - scaled[0] if len(values) > 1 else largest / 10.0**power / 10
    decimals = next(n for n in itertools.count() if all(abs(round(x, n) - x) <= step / 100 for x in scaled))
    return [f"{x:,.{decimals}f}{unit}" if x else "0" for x in scaled]
