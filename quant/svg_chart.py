"""Small charts as inline SVG: lines, points, bands and bars, in colours of the page around them.

No library and no script; a title in each mark is its tooltip. Colours are CSS variables (--series-1,
--series-2, --muted, --grid, --limit), so that a page's light and dark both fit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 44


@dataclass(frozen=True)
class Axis:
    """One axis; its range is that of what is shown, unless it is given."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    whole: bool = False  # ticks at whole numbers only


@dataclass(frozen=True)
class Series:
    """Marks of one colour.

    Attributes:
        name: for the legend; empty: not in it.
        points: (x, y), in order.
        colour: number of a CSS variable --series-N.
        marks: "line", "points", "both" or "bars".
        band: (low, high) around each point.
        titles: a tooltip for each point.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 1
    marks: str = "both"
    band: Sequence[tuple[float, float]] = ()
    titles: Sequence[str] = field(default_factory=tuple)


def chart(
    series: Sequence[Series], x: Axis, y: Axis, *, limit: float | None = None, alt: str = ""
) -> str:
    """An SVG element.

    Args:
        series: drawn in order.
        x, y: the axes.
        limit: a dashed line across, at this y.
        alt: what a screen reader says.
    """
    bars = any(s.marks == "bars" for s in series)
    across = _Scale(x, [p[0] for s in series for p in s.points], LEFT, WIDTH - RIGHT, bars)
    heights = [v for s in series for v in [*(p[1] for p in s.points), *(b for p in s.band for b in p)]]
    up = _Scale(y, heights + ([limit] if limit is not None else []), HEIGHT - BOTTOM, TOP, False)
    out = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">',
        *_grid(across, up, x, y),
    ]
    for one in series:
        out += _series(one, across, up)
    if limit is not None:
        level = up(limit)
        out.append(
            f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}">'
            f"<title>limit {limit:g}</title></line>"
        )
    return "".join([*out, *_legend(series), "</svg>"])


class _Scale:
    """Numbers to pixels."""

    def __init__(
        self, axis: Axis, values: Sequence[float], start: float, stop: float, wide: bool
    ) -> None:
        good = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)]
        low, high = min(good, default=1.0), max(good, default=1.0)
        if axis.log:
            low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
            high = high if high > low else low * 10
        elif wide:
            step = (high - low) / max(len(good) - 1, 1) or 1.0
            low, high = low - step / 2, high + step / 2
        elif low == high:
            low, high = low - 1, high + 1
        self.low = low if axis.low is None else axis.low
        self.high = high if axis.high is None else axis.high
        self._start, self._stop, self._log = start, stop, axis.log
        self.ticks = self._ticks(axis)

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self._log:
            value, low, high = (math.log10(max(v, 1e-300)) for v in (value, low, high))
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return self._start + share * (self._stop - self._start)

    def _ticks(self, axis: Axis) -> list[float]:
        if self._log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            step = max(1, -(-(last - first) // 5))
            return [10.0**e for e in range(first, last + 1, step)]
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        step = max(1, round(step)) if axis.whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _grid(across: _Scale, up: _Scale, x: Axis, y: Axis) -> list[str]:
    out = []
    floor = HEIGHT - BOTTOM
    for tick in up.ticks:
        level = up(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 6}" y="{level + 4:.1f}" text-anchor="end">{_number(tick, y)}</text>')
    for tick in across.ticks:
        out.append(f'<text class="tick" x="{across(tick):.1f}" y="{floor + 16}" text-anchor="middle">{_number(tick, x)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>')
    turn = (TOP + floor) / 2
    out.append(f'<text class="label" transform="translate(12 {turn}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>')
    return out


def _number(value: float, axis: Axis) -> str:
    if axis.log and (value >= 1e4 or value < 1e-2):
        power = str(round(math.log10(value))).replace("-", "\u2212")
        return f'10<tspan class="power" dy="-4">{power}</tspan>'
    return f"{value:,g}".replace("-", "\u2212") if abs(value) < 1e6 else f"{value:.0e}"


def _series(one: Series, across: _Scale, up: _Scale) -> list[str]:
    out = []
    colour = f'style="--colour: var(--series-{one.colour})"'
    places = [(across(a), up(b)) for a, b in one.points]
    titles = list(one.titles) or [f"{a:g}: {b:g}" for a, b in one.points]
    if one.band:
        edges = [(p[0], up(b[1])) for p, b in zip(places, one.band, strict=True)]
        edges += [(p[0], up(b[0])) for p, b in zip(places, one.band, strict=True)][::-1]
        out.append(f'<polygon class="band" {colour} points="{_path(edges)}"/>')
    if one.marks == "bars":
        width = 0.82 * (WIDTH - LEFT - RIGHT) / max(len(places), 1)
        floor = HEIGHT - BOTTOM
        for (a, b), title in zip(places, titles, strict=True):
            out.append(
                f'<rect class="bar" {colour} x="{a - width / 2:.1f}" y="{b:.1f}" '
                f'width="{width:.1f}" height="{max(floor - b, 0):.1f}" rx="2">'
                f"<title>{escape(title)}</title></rect>"
            )
        return out
    if one.marks in ("line", "both") and len(places) > 1:
        out.append(f'<polyline class="line" {colour} points="{_path(places)}"/>')
    if one.marks in ("points", "both"):
        out += [
            f'<circle class="point" {colour} cx="{a:.1f}" cy="{b:.1f}" r="3.5">'
            f"<title>{escape(title)}</title></circle>"
            for (a, b), title in zip(places, titles, strict=True)
        ]
    return out


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in places)


def _legend(series: Sequence[Series]) -> list[str]:
    named = [one for one in series if one.name]
    out, right = [], WIDTH - RIGHT
    for one in reversed(named if len(named) > 1 else []):
        right -= 7 * len(one.name) + 20
        out.append(
            f'<circle class="point" style="--colour: var(--series-{one.colour})" cx="{right}" '
            f'cy="{TOP + 2}" r="4"/><text class="tick" x="{right + 8}" y="{TOP + 6}">'
            f"{escape(one.name)}</text>"
        )
    return out
