"""Line charts as inline SVG; the page's script reads values off them."""

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

Point = tuple[float, float]

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 28
MAX_POINTS = 600  # of a line; more than a screen shows
LOG_FROM = 20.0  # largest over smallest value from which a logarithmic scale shows more


class Series(NamedTuple):
    """One line of a chart: `kind` is a class of the page's style."""

    name: str
    kind: str
    points: Sequence[Point]  # (step, value), by step


def line_chart(title: str, unit: str, series: Sequence[Series], *, zero: bool = False) -> Markup:
    """A chart over steps.

    Args:
        title: Above it.
        unit: Of the values.
        series: Lines; those without points are left out.
        zero: Whether the scale begins at 0. Otherwise it is logarithmic where values span much.

    Returns:
        A `figure`, or nothing where there is no point.
    """
    series = [one._replace(points=thinned(finite(one.points))) for one in series]
    series = [one for one in series if one.points]
    if not series:
        return Markup("")
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    low, high = (0.0 if zero else min(ys)), max(ys)
    is_log = not zero and low > 0 and high / low > LOG_FROM
    to_x = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    to_y = _scale(*_padded(low, high, is_log, zero), HEIGHT - BOTTOM, TOP, is_log=is_log)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_grid(to_x, to_y),
        *(_line(one, to_x, to_y) for one in series),
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" hidden></line></svg>',
    ]
    legend = " ".join(
        f'<span class="key {one.kind}"><i></i>{escape(one.name)} '
        f"<b data-series>{number(one.points[-1][1])}</b></span>"
        for one in series
    )
    data = {
        "x": [to_x.low, to_x.high, LEFT, WIDTH - RIGHT],
        "series": [one.points for one in series],
    }
    scale = ", logarithmic" if is_log else ""
    return Markup(
        f'<figure class="chart" data-chart="{escape(json.dumps(data))}">'
        f"<figcaption><strong>{escape(title)}</strong> <small>{escape(unit)}{scale}</small>"
        f'<span class="at">step <b data-at>{round(max(xs)):,}</b></span></figcaption>'
        f'{"".join(parts)}<p class="legend">{legend}</p></figure>'
    )


def finite(points: Sequence[Point]) -> list[Point]:
    """Without what is not a number: a loss that broke down is shown by its absence."""
    return [(x, y) for x, y in points if math.isfinite(y)]


def thinned(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points: each the mean of as many that follow each other."""
    group = -(-len(points) // most)
    if group <= 1:
        return list(points)
    groups = [points[start : start + group] for start in range(0, len(points), group)]
    return [
        (some[-1][0], math.fsum(y for _, y in some) / len(some)) for some in groups
    ]  # fmt: skip


def smoothed(points: Sequence[Point]) -> list[Point]:
    """A running mean over about a thirtieth of the points, unbiased from the first one on."""
    weight = 1 - 1 / max(3.0, len(points) / 30)
    mean, total, result = 0.0, 0.0, []
    for x, y in finite(points):
        mean, total = weight * mean + (1 - weight) * y, weight * total + (1 - weight)
        result.append((x, mean / total))
    return result


def number(value: float) -> str:
    """Four significant digits."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from `low` to `high`."""
    if high <= low:
        return [low]
    step = (high - low) / count
    power = 10.0 ** math.floor(math.log10(step))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    return [value for value in found if low <= value <= high]


class _Scale(NamedTuple):
    """Values to pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool

    def __call__(self, value: float) -> float:
        place = math.log10 if self.is_log else float
        low, high = place(self.low), place(self.high)
        share = 0.5 if high == low else (place(value) - low) / (high - low)
        return self.start + share * (self.end - self.start)


def _scale(low: float, high: float, start: float, end: float, *, is_log: bool = False) -> _Scale:
    return _Scale(low, high, start, end, is_log)


def _padded(low: float, high: float, is_log: bool, zero: bool) -> Point:
    if is_log:
        return low / 1.1, high * 1.1
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (low if zero else low - room), high + room


def _grid(to_x: _Scale, to_y: _Scale) -> list[str]:
    values = (_log_ticks if to_y.is_log else ticks)(to_y.low, to_y.high)
    parts = []
    for value in values:
        y = to_y(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(to_x.low, to_x.high):
        parts.append(
            f'<text x="{to_x(value):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{value:,.0f}</text>'
        )
    return parts


def _line(one: Series, to_x: _Scale, to_y: _Scale) -> str:
    places = [f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in one.points]
    dots = "".join(
        f'<circle cx="{place.partition(",")[0]}" cy="{place.partition(",")[2]}" r="2.4"/>'
        for place in places
    )
    shown = dots if len(places) <= 40 and one.kind != "raw" else ""
    return f'<g class="{one.kind}"><polyline points="{" ".join(places)}"/>{shown}</g>'
