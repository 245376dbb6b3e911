"""Charts as inline SVG: lines over images, shares of a whole, and a field of numbers.

They have no script and no colours of their own: the page's style sheet gives both themes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from trainer.page.markup import Html, join, tag

COLOURS = 8
"""How many colours of lines the style sheet has."""

LARGEST = 1e100
"""Beyond it a value is drawn as none: arithmetic on it would be none either."""

_WIDTH, _HEIGHT = 560.0, 290.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 10.0, 42.0
_MAX_MARKERS = 48
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line.

    Attributes:
        label: What it is.
        points: Positions and values, rising; what is no number leaves a gap.
        colour: Number of its colour.
        is_thin: Whether it is one of several that stand for the same.
        band: Positions with the lowest and the highest value of what the line is the mean of.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    is_thin: bool = False
    band: Sequence[tuple[float, float, float]] = ()


class Axis(NamedTuple):
    """From values to places along an axis."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Return where a value stands, 0 to 1."""
        if self.is_log:
            return _share(math.log(value), math.log(self.low), math.log(self.high))
        return _share(value, self.low, self.high)


def line_chart(
    title: str,
    about: str,
    series: Sequence[Series],
    *,
    x_label: str = "images",
    log: bool = False,
    from_zero: bool = False,
    levels: Sequence[tuple[str, float]] = (),
) -> Html:
    """Draw lines over the images of a run.

    Args:
        title: What is drawn.
        about: One sentence of what it means, and its unit.
        series: The lines; those without a number are left out.
        x_label: What positions are.
        log: Whether to draw values on a logarithmic axis where they span much and are positive.
        from_zero: Whether the axis begins at 0.
        levels: Values to compare with, drawn as dashed lines with their names.

    Returns:
        A figure; nothing if there is no number to draw.
    """
    drawn = [each for each in series if any(_is_drawable(y) for _, y in each.points)]
    if not drawn:
        return Html()
    x_axis = _axis_of_images([x for each in drawn for x, _ in each.points])
    levels = [(name, value) for name, value in levels if _is_drawable(value)]
    values = [y for each in drawn for _, y in each.points if _is_drawable(y)]
    values += [value for each in drawn for _, low, high in each.band for value in (low, high)]
    values += [value for _, value in levels]
    y_axis = axis([*values, 0.0] if from_zero else values, log=log)
    svg = tag(
        "svg",
        _grid(x_axis, y_axis, x_label),
        *(_level(name, value, y_axis) for name, value in levels),
        *(_line(each, x_axis, y_axis) for each in drawn),
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
        aria_label=f"{title}: {about}",
        class_="chart",
    )
    return tag("figure", _caption(title, about), _legend(drawn), svg, class_="card")


def axis(values: Sequence[float], *, log: bool = False) -> Axis:
    """Choose an axis that shows all values, with round ticks.

    Args:
        values: Finite ones; at least one.
        log: Whether it may be logarithmic.
    """
    low, high = min(values), max(values)
    if log and low > 0 and high / low >= 10:
        return Axis(low / 1.05, high * 1.05, True, _log_ticks(low, high))
    # Beside 1e-300 there are too few numbers for ticks.
    if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-300):
        spare = abs(high) * 0.5 if abs(high) > 1e-300 else 1.0
        low, high = (0.0, high + spare) if low >= 0 else (low - spare, high + spare)
    step = _round_step((high - low) / 4.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(step * number for number in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], False, ticks)


def _axis_of_images(values: Sequence[float]) -> Axis:
    """Choose the axis of positions, which ends with the last one: what follows would be empty."""
    low, high = min(values), max(values)
    whole = axis([0.0 if low < 0.3 * high else low, high])
    first = whole.ticks[0]
    shown = tuple(tick for tick in whole.ticks if tick <= high * (1 + 1e-9))
    return Axis(first, max(high, shown[-1]), False, shown) if high > first else whole


def compact(value: float) -> str:
    """Write a number in few characters: 0.0123, 250, 12k, 1.2M."""
    for size, unit in _UNITS:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * each for each in (1.0, 2.0, 2.5, 5.0, 10.0) if power * each >= 0.999 * step)


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [each * 10.0**power for power in powers for each in steps]
        shown = tuple(tick for tick in ticks if low / 1.05 <= tick <= high * 1.05)
        if len(shown) <= 7:
            return shown
    return shown[:: -(-len(shown) // 7)]


def _x(value: float, across: Axis) -> float:
    return _LEFT + across.share(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, up: Axis) -> float:
    return _HEIGHT - _BOTTOM - up.share(value) * (_HEIGHT - _BOTTOM - _TOP)


def _grid(across: Axis, up: Axis, x_label: str) -> Html:
    parts = []
    bottom = _HEIGHT - _BOTTOM
    for tick in up.ticks:
        y = _y(tick, up)
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", compact(tick), x=_LEFT - 8, y=y + 4, class_="tick left"))
    for tick in across.ticks:
        x = _x(tick, across)
        parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(tag("text", compact(tick), x=x, y=bottom + 18, class_="tick"))
    parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="axis"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(tag("text", x_label, x=middle, y=_HEIGHT - 6, class_="tick"))
    return join(*parts)


def _level(name: str, value: float, up: Axis) -> Html:
    y = _y(value, up)
    line = tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="level")
    above = y - 5 if y > _TOP + 14 else y + 14
    return join(line, tag("text", name, x=_WIDTH - _RIGHT - 2, y=above, class_="tick left"))


def _line(series: Series, across: Axis, up: Axis) -> Html:
    colour = f"c{series.colour % COLOURS}"
    parts = []
    if series.band:
        there = [f"{_x(x, across):.1f},{_y(low, up):.1f}" for x, low, _ in series.band]
        back = [f"{_x(x, across):.1f},{_y(high, up):.1f}" for x, _, high in reversed(series.band)]
        parts.append(tag("polygon", points=" ".join([*there, *back]), class_=f"band {colour}"))
    path = _path(series.points, across, up)
    kind = "line thin" if series.is_thin else "line"
    parts.append(tag("path", d=path, class_=f"{kind} {colour}"))
    shown = [(x, y) for x, y in series.points if _can_be_drawn(y, up)]
    if len(shown) <= _MAX_MARKERS and not series.is_thin:
        for x, y in shown:
            says = tag("title", f"{series.label}: {y:.5g} at {x:,.0f}")
            place = {"cx": _x(x, across), "cy": _y(y, up)}
            parts.append(tag("circle", says, r=2.6, class_=f"dot {colour}", **place))
    return tag("g", tag("title", _last_value(series)), *parts)


def _last_value(series: Series) -> str:
    known = [(x, y) for x, y in series.points if _is_drawable(y)]
    return f"{series.label}: {known[-1][1]:.5g} at {known[-1][0]:,.0f}"


def _is_drawable(value: float) -> bool:
    """Tell whether a value is a number, and none beyond which arithmetic on it is none."""
    return math.isfinite(value) and abs(value) < LARGEST


def _can_be_drawn(value: float, up: Axis) -> bool:
    return _is_drawable(value) and not (up.is_log and value <= 0)


def _path(points: Sequence[tuple[float, float]], across: Axis, up: Axis) -> str:
    steps, is_down = [], False
    for x, y in points:
        if _can_be_drawn(y, up):
            steps.append(f"{'L' if is_down else 'M'}{_x(x, across):.1f} {_y(y, up):.1f}")
        is_down = _can_be_drawn(y, up)
    return "".join(steps)


def _caption(title: str, about: str) -> Html:
    return tag("figcaption", tag("strong", title), " ", tag("span", about))


def _legend(series: Sequence[Series]) -> Html:
    named = {each.label: each.colour for each in series if not each.is_thin}
    if len(named) < 2:
        return Html()
    items = [tag("li", swatch(colour), label) for label, colour in named.items()]
    return tag("ul", *items, class_="legend")


def swatch(colour: int) -> Html:
    """Return a small field of a colour, which stands before what it means."""
    return tag("span", class_=f"swatch c{colour % COLOURS}")


def share_bar(title: str, about: str, parts: Sequence[tuple[str, float, str]]) -> Html:
    """Draw how a whole is divided.

    Args:
        title: What the whole is.
        about: One sentence of what it means.
        parts: Name, size and a text for people of each, in their order.

    Returns:
        A figure with all parts that have a size; nothing without any.
    """
    sizes = [max(0.0, size) for _, size, _ in parts]
    whole = sum(sizes)
    if whole <= 0 or not _is_drawable(whole):
        return Html()
    edges = [sum(sizes[:count]) / whole * 1000 for count in range(len(sizes) + 1)]
    bars, items = [], []
    for colour, ((begin, end), (name, _, words)) in enumerate(
        zip(pairwise(edges), parts, strict=True)
    ):
        share = (end - begin) / 1000
        if share <= 0:
            continue
        says = tag("title", f"{name}: {words}, {share:.1%}")
        field = {"x": begin, "y": 0, "width": max(end - begin - 1.5, 0.5), "height": 34}
        bars.append(tag("rect", says, class_=f"bar c{colour % COLOURS}", **field))
        told = join(tag("strong", name), f" {words} ", tag("span", f"{share:.1%}"))
        items.append(tag("li", swatch(colour), told))
    svg = tag(
        "svg",
        *bars,
        viewBox="0 0 1000 34",
        role="img",
        aria_label=f"{title}: {about}",
        class_="bars",
        preserveAspectRatio="none",
    )
    return tag(
        "figure", _caption(title, about), svg, tag("ul", *items, class_="legend"), class_="card"
    )


def number_field(
    title: str,
    about: str,
    rows: Sequence[tuple[str, Sequence[float | None]]],
    columns: Sequence[str],
) -> Html:
    """Draw numbers as a field whose cells are the darker the greater they are.

    Args:
        title: What they are.
        about: One sentence of what they mean.
        rows: Name and numbers of each row; None is none.
        columns: Their names.

    Returns:
        A figure; nothing if there is no number.
    """
    known = [value for _, row in rows for value in row if value is not None]
    if not known or not all(map(_is_drawable, known)):
        return Html()
    high = max(known)
    width, height = (_WIDTH - 70) / len(columns), 54.0
    parts = []
    for number, name in enumerate(columns):
        x = 70 + (number + 0.5) * width
        parts.append(tag("text", name, x=x, y=14, class_="tick"))
    for down, (name, row) in enumerate(rows):
        y = 22 + down * height
        parts.append(tag("text", name, x=62, y=y + height / 2 + 4, class_="tick left"))
        for number, value in enumerate(row):
            if value is None:
                continue
            strength = 0.08 + 0.5 * (value / high if high > 0 else 0.0)
            x = 70 + number * width
            cell = {"x": x + 1, "y": y + 1, "width": width - 2, "height": height - 2}
            parts.append(tag("rect", class_="bar c0", fill_opacity=strength, rx=3, **cell))
            place = {"x": x + width / 2, "y": y + height / 2 + 4}
            parts.append(tag("text", compact(value), class_="tick value", **place))
    svg = tag(
        "svg",
        *parts,
        viewBox=f"0 0 {_WIDTH:g} {26 + len(rows) * height:g}",
        role="img",
        aria_label=f"{title}: {about}",
        class_="chart",
    )
    return tag("figure", _caption(title, about), svg, class_="card")
