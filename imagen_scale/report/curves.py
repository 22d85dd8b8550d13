"""Curves over the steps of training: where lines and ticks go in a picture of fixed size."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

WIDTH, HEIGHT = 560, 230  # as page.html has them
LEFT, RIGHT, TOP, BOTTOM = 66, 20, 12, 28
MOST_POINTS = 400  # of a line; more than this cannot be seen
LOG_RATIO = 8  # values that spread more are drawn on a logarithmic axis

Points = Sequence[tuple[int, float]]


class Tick(NamedTuple):
    """A mark on an axis."""

    at: float
    label: str


class Line(NamedTuple):
    """One curve."""

    name: str
    path: str  # SVG path data
    dots: list[tuple[float, float]]  # of a curve with few points


class Chart(NamedTuple):
    """Curves that share their axes."""

    title: str
    note: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    hover: str  # JSON: [[x, "step and values"], ...]
    newest: str  # step and values


def draw(title: str, series: Mapping[str, Points], *, from_zero: bool = False) -> Chart | None:
    """Lays out curves.

    Args:
        title: What is shown, with its unit.
        series: (step, value) by name, in the order of steps, all finite.
        from_zero: Whether the vertical axis begins at 0; otherwise it fits the values, and is
            logarithmic where all are positive and the largest is `LOG_RATIO` times the smallest.

    Returns:
        The chart, or None where there is no point.
    """
    thinned = {name: thin(points) for name, points in series.items() if points}
    if not thinned:
        return None
    steps = [step for points in thinned.values() for step, _ in points]
    values = [value for points in thinned.values() for _, value in points]
    low, high = min(values), max(values)
    is_log = not from_zero and low > 0 and high > LOG_RATIO * low
    y_marks = _log_marks(low, high) if is_log else _marks(min(low, 0) if from_zero else low, high)
    if is_log:
        y_low, y_high = math.log(low), math.log(high)
    else:
        y_low, y_high = min(low, y_marks[0]), max(high, y_marks[-1])
    x_low, x_high = min(0, *steps), max(steps)

    def x(step: float) -> float:
        share = (step - x_low) / ((x_high - x_low) or 1)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        height = math.log(value) if is_log else value
        share = (height - y_low) / ((y_high - y_low) or 1)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    hover = _hover(thinned, x)
    lines = []
    for name, points in thinned.items():
        places = [(x(step), y(value)) for step, value in points]
        path = "M" + "L".join(f"{across} {down}" for across, down in places)
        lines.append(Line(name, path, places if len(places) <= 40 else []))
    return Chart(
        title,
        "logarithmic" if is_log else "",
        [Tick(x(mark), count_text(mark)) for mark in _marks(x_low, x_high) if mark <= x_high],
        [Tick(y(mark), text) for mark, text in zip(y_marks, tick_texts(y_marks), strict=True)],
        lines,
        json.dumps(hover),
        hover[-1][1],
    )


def thin(points: Points) -> list[tuple[int, float]]:
    """At most `MOST_POINTS` points: neighbours are averaged, and stand at the last one's step."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], fmean(value for _, value in group)) for group in groups]


def value_text(value: float, digits: int = 3) -> str:
    """A value with so many digits, and no fewer than those before its point."""
    if value and not 1e-4 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:,.{digits}g}"


def tick_texts(marks: Sequence[float]) -> list[str]:
    """What stands at the marks of an axis: with three digits, and more where they are alike."""
    texts: list[str] = []
    for digits in range(3, 10):
        texts = [value_text(mark, digits) for mark in marks]
        if len(set(texts)) == len(texts):
            break
    return texts


def count_text(count: float) -> str:
    """A count of steps, short."""
    for letter, size in (("M", 10**6), ("k", 10**3)):
        if count >= 10 * size or (count >= size and count % (size / 10) == 0):
            return f"{count / size:g}{letter}"
    return f"{count:g}"


def _hover(
    thinned: dict[str, list[tuple[int, float]]], x: Callable[[float], float]
) -> list[tuple[float, str]]:
    texts: dict[int, list[str]] = {}
    for name, points in thinned.items():
        for step, value in points:
            text = value_text(value)
            texts.setdefault(step, []).append(f"{name} {text}" if len(thinned) > 1 else text)
    return [(x(step), f"step {step:,}: " + ", ".join(texts[step])) for step in sorted(texts)]


def _marks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` or just below it to `high` or just above it."""
    span = max(high - low, 1e-9 * abs(high))
    span = max(span, 1e-300) if span else 1.0  # so small it has no logarithm of its quarter
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    stride = next(power * times for times in (1, 2, 2.5, 5, 10) if power * times >= rough * 0.999)
    first, last = math.floor(low / stride + 1e-9), math.ceil(high / stride - 1e-9)
    return [float(f"{i * stride:.12g}") for i in range(first, max(last, first + 1) + 1)]


def _log_marks(low: float, high: float) -> list[float]:
    """Powers of ten between the two: 2 and 5 times them where there are few, else not every one."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    times = (1,) if last - first > 4 else (1, 2, 5)
    powers = range(first, last + 1, -(-(last - first) // 8))
    marks = [float(f"{t * 10.0**power:.12g}") for power in powers for t in times]
    return [mark for mark in marks if low <= mark <= high]
