"""Small charts as inline SVG: lines, points, bands and bars, in colours of the page around them.

No library and no script; a title in each mark is its tooltip. Colours are the page's (--series-1,
--series-2, and the classes of lines and texts), so that its light and dark both fit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 22, 14, 46


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
    heights = [
        v for s in series for v in [*(p[1] for p in s.points), *(b for p in s.band for b in p)]
    ]
    up = _Scale(y, heights + ([limit] if limit is not None else []), HEIGHT - BOTTOM, TOP, False)
    out = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">',
        *_grid(across, up, x, y),
    ]
    for one in series:
        out += _series(one, across, up)
    if limit is not None:
        out.append(_level("limit", up(limit), f"limit {limit:g}"))
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
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    out = []
    for tick in up.ticks:
        out.append(_level("grid", up(tick)))
        out.append(_text("tick", LEFT - 6, up(tick) + 4, "end", _number(tick, y, up)))
    for tick in across.ticks:
        out.append(_text("tick", across(tick), floor + 17, "middle", _number(tick, x, across)))
    out.append(_level("axis", floor))
    out.append(_text("label", (LEFT + right) / 2, HEIGHT - 8, "middle", escape(x.label)))
    turned = f'transform="translate(14 {(TOP + floor) / 2}) rotate(-90)"'
    return [*out, _text("label", 0, 0, "middle", escape(y.label), turned)]


def _level(kind: str, y: float, title: str = "") -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line class="{kind}" {ends}>{inside}</line>'


def _text(kind: str, x: float, y: float, anchor: str, text: str, more: str = "") -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {where} {more}>{text}</text>'


def _number(value: float, axis: Axis, scale: _Scale) -> str:
    if axis.log and scale.ticks[0] < 0.1:  # all of them alike
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
        right -= 8 * len(one.name) + 24  # wide enough for the larger letters of a phone
        out.append(
            f'<circle class="point" style="--colour: var(--series-{one.colour})" cx="{right}" '
            f'cy="{TOP + 2}" r="4"/><text class="tick" x="{right + 8}" y="{TOP + 6}">'
            f"{escape(one.name)}</text>"
        )
    return out
