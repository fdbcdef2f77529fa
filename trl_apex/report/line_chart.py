"""Curves over the steps of a run, labelled where they end."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from .axis import Scale, dodge, padded_range, tick_labels, ticks
from .numbers import decimals_for, fixed, number
from .smooth import thin
from .svg import HEIGHT, WIDTH, band, element, join, path, picture


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        name (`str`): its label.
        colour (`int`): index into the page's palette.
        x, y (`list[float]`): optimizer steps and values.
        error (`list[float]`): half height of the band around it.
        faint (`list[float]`): values drawn as faint points behind it.
    """

    name: str
    colour: int
    x: list[float]
    y: list[float]
    error: list[float] = field(default_factory=list)
    faint: list[float] = field(default_factory=list)


def line_chart(
    title: str,
    lines: list[Line],
    note: str = "",
    include: list[float] | None = None,
    reference: tuple[float, str] | None = None,
) -> Markup:
    """A chart of curves over optimizer steps.

    Args:
        title (`str`): what is shown, with its unit.
        lines (`list[Line]`): curves.
        note (`str`): a line below the title.
        include (`list[float]`, *optional*): values that the vertical axis has to reach.
        reference (`tuple[float, str]`, *optional*): height and name of a dashed horizontal line.

    Returns:
        `Markup`: a `<figure>`; empty if no curve has a point.
    """
    lines = [_thinned(line) for line in lines if line.x]
    if not lines:
        return Markup("")
    reach = [v for line in lines for v in (*_edges(line), *line.faint)] + list(include or [])
    reach += [reference[0]] if reference else []
    low, high = padded_range(reach)
    if include:
        low, high = (min(include) if low < min(include) <= min(reach) else low), high
    first, last = min(line.x[0] for line in lines), max(line.x[-1] for line in lines)
    write = _writer(high - low)
    labels = [f"{line.name} {write(line.y[-1])}".strip() for line in lines]
    tick_values = ticks(low, high)
    names = tick_labels(tick_values)
    left = 14 + 7.0 * max(map(len, names), default=1)
    right = WIDTH - 12 - 7.0 * min(max(map(len, labels)), 20)
    x_scale = Scale(first, last if last > first else first + 1, left, right)
    y_scale = Scale(low, high, HEIGHT - 40, 10)
    parts = _axes(x_scale, y_scale, tick_values, names)
    for line in lines:
        parts.append(_curve(line, x_scale, y_scale))
    ends = [(y_scale(line.y[-1]), label, f"end c{line.colour % 8}") for line, label in zip(lines, labels, strict=True)]
    if reference:
        y = y_scale(reference[0])
        parts.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="reference"))
        ends.append((y, f"{reference[1]} {write(reference[0])}", "tick"))
    places = dodge([y for y, _, _ in ends], 16, 14, HEIGHT - 44)
    for (_, label, style), y in zip(ends, places, strict=True):
        parts.append(element("text", _cut(label), x=right + 7, y=y + 4.5, class_=style))
    parts.append(element("line", class_="cross", y1=10, y2=HEIGHT - 40, x1=0, x2=0))
    spoken = ". ".join([title, *(_spoken(line, write) for line in lines)])
    data = {
        "left": left / WIDTH,
        "right": right / WIDTH,
        "x": [first, x_scale.high],
        "lines": [
            {
                "name": line.name,
                "c": line.colour % 8,
                "x": [round(v, 1) for v in line.x],
                "y": [write(v) for v in line.y],
            }
            for line in lines
        ],
    }
    return Markup(
        '<figure class="chart" tabindex="0" data-chart="{}"><figcaption>{}{}</figcaption>{}'
        '<div class="tip" hidden aria-live="polite"></div></figure>'
    ).format(json.dumps(data), element("strong", title), element("span", note) if note else "", picture(parts, spoken))


def _writer(span: float) -> Callable[[float], str]:
    """How values of an axis of this length are written: about a tenth of it is the last digit that counts."""
    if span < 1e-3:
        return number
    decimals = decimals_for(span / 10, 1)
    return lambda value: fixed(value, decimals)


def _spoken(line: Line, write: Callable[[float], str]) -> str:
    first, last = write(line.y[0]), write(line.y[-1])
    return f"{line.name or 'value'}: from {first} at step {line.x[0]:g} to {last} at step {line.x[-1]:g}"


def _thinned(line: Line) -> Line:
    x, y = thin(line.x, line.y)
    return Line(
        line.name,
        line.colour,
        x,
        y,
        thin(line.x, line.error)[1] if line.error else [],
        line.faint and thin(line.x, line.faint)[1],
    )


def _edges(line: Line) -> list[float]:
    if not line.error:
        return line.y
    return [v + s * e for v, e in zip(line.y, line.error, strict=True) for s in (-1, 1)]


def _axes(x_scale: Scale, y_scale: Scale, values: list[float], names: list[str]) -> list[Markup]:
    parts = []
    for value, name in zip(values, names, strict=True):
        y = y_scale(value)
        parts.append(element("line", x1=x_scale.start, x2=x_scale.end, y1=y, y2=y, class_="grid"))
        parts.append(element("text", name, x=x_scale.start - 6, y=y + 4.5, class_="tick right"))
    steps = [t for t in ticks(x_scale.low, x_scale.high, 3) if t == int(t)] or [x_scale.low]
    for value, name in zip(steps, tick_labels(steps), strict=True):
        parts.append(element("text", name, x=x_scale(value), y=HEIGHT - 22, class_="tick middle"))
    centre = (x_scale.start + x_scale.end) / 2
    return [*parts, element("text", "optimizer step", x=centre, y=HEIGHT - 5, class_="tick middle")]


def _curve(line: Line, x_scale: Scale, y_scale: Scale) -> Markup:
    x, y = [x_scale(v) for v in line.x], [y_scale(v) for v in line.y]
    parts = []
    if line.error:
        low = [y_scale(v - e) for v, e in zip(line.y, line.error, strict=True)]
        high = [y_scale(v + e) for v, e in zip(line.y, line.error, strict=True)]
        parts.append(band(x, low, high, class_="band"))
    for a, value in zip(x, line.faint or [], strict=False):
        parts.append(element("circle", cx=a, cy=y_scale(value), r=1.6, class_="dot"))
    parts.append(
        path(x, y, class_="line") if len(x) > 1 else element("circle", cx=x[0], cy=y[0], r=3.5, class_="mark")
    )
    return element("g", join(parts), class_=f"c{line.colour % 8}")


def _cut(label: str) -> str:
    name, _, value = label.rpartition(" ")
    return label if len(label) <= 20 else f"{name[: 19 - len(value) - 1]}\N{HORIZONTAL ELLIPSIS} {value}"


def legend(names: list[str]) -> Markup:
    """The names beside their colours, for a row of charts that share them."""
    items = [Markup('<li class="c{}"><i></i>{}</li>').format(i % 8, escape(name)) for i, name in enumerate(names)]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))
