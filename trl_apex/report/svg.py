"""The charts of the report as SVG: curves, objective against objective, strips and bars.

Colours are theme variables of the page, so one picture serves light and dark. Names stand in HTML around the pictures,
where they wrap on a phone; the pictures themselves hold ticks alone.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 400, 216  # the units of a chart; it is scaled to its column
MINUS, DASH = "\N{MINUS SIGN}", "\N{EM DASH}"


# Numbers


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; None and NaN give a dash.

    Example:
        >>> [number(v) for v in (0.51234, 21.718, 1234567.0, 2e-5, 0.0, None)]
        ['0.512', '21.7', '1,234,567', '2e-05', '0', '\N{EM DASH}']
    """
    if value is None or not math.isfinite(value):
        return DASH
    size = abs(value)
    return (MINUS if value < 0 else "") + (f"{size:,.0f}" if size >= 10**digits else f"{size:.{digits}g}")


def fixed(value: float | None, decimals: int, sign: bool = False) -> str:
    """A number with a fixed count of decimals, so that a column lines up.

    Example:
        >>> fixed(1234.5, 1), fixed(-0.126, 2), fixed(0.5, 2, sign=True)
        ('1,234.5', '\N{MINUS SIGN}0.13', '+0.50')
    """
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{abs(value):,.{decimals}f}"
    zero = not any(c in "123456789" for c in text)
    return (MINUS if value < 0 and not zero else "+" if sign and not zero else "") + text


def decimals_for(spread: float, digits: int = 2) -> int:
    """Decimals that show a difference of size `spread` with `digits` significant digits, from 0 to 6.

    Example:
        >>> decimals_for(0.35), decimals_for(12.0), decimals_for(0.0042)
        (2, 0, 4)
    """
    if not (math.isfinite(spread) and spread > 0):
        return 2
    return min(max(digits - 1 - math.floor(math.log10(spread)), 0), 6)


def trend(values: Sequence[float], width: float | None = None) -> tuple[list[float], list[float]]:
    r"""Gaussian-weighted moving mean and its standard error.

    $$m_t = \sum_s k_{ts} y_s, \qquad \mathrm{se}_t = \hat\sigma \sqrt{\textstyle\sum_s k_{ts}^2}$$

    with \(k_t\) a Gaussian in index distance that sums to one, of standard deviation `width` (a thirtieth of the length by
    default, at least 1.5), and \(\hat\sigma\) from the differences of neighbours.
    """
    y = np.asarray(values, dtype=float)
    if len(y) < 3:
        return list(values), [0.0] * len(y)
    width = max(len(y) / 30, 1.5) if width is None else width
    index = np.arange(len(y))
    kernel = np.exp(-0.5 * ((index[:, None] - index[None, :]) / width) ** 2)
    kernel /= kernel.sum(1, keepdims=True)
    noise = np.diff(y).std() / np.sqrt(2)
    return np.round(kernel @ y, 12).tolist(), (noise * np.sqrt((kernel**2).sum(1))).tolist()


def thin(values: Sequence[float], most: int = 240) -> list[float]:
    """At most `most` values: means over equal runs of neighbours."""
    if len(values) <= most:
        return list(values)
    return [float(part.mean()) for part in np.array_split(np.asarray(values, dtype=float), most)]


def padded_range(values: Sequence[float], padding: float = 0.06) -> tuple[float, float]:
    """Smallest and largest finite value, with a margin; never an empty range."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    margin = (high - low) * padding if high > low else abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside a range, about `count` of them.

    Example:
        >>> ticks(0.0, 1.0), ticks(20.9, 22.1)
        ([0.0, 0.25, 0.5, 0.75, 1.0], [21.0, 21.25, 21.5, 21.75, 22.0])
    """
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Tick labels with the decimals that the step needs.

    Example:
        >>> tick_labels([0.0, 0.25, 0.5]), tick_labels([0.0, 500.0, 1000.0]), tick_labels([0.0, 2e-6])
        (['0.00', '0.25', '0.50'], ['0', '500', '1,000'], ['0', '2e-06'])
    """
    step = min((b - a for a, b in zip(values, values[1:], strict=False)), default=abs(values[0]) if values else 1.0)
    if step < 1e-4:
        return [number(value, 2) for value in values]
    decimals = next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)
    return [fixed(value, decimals) for value in values]


# Elements


def element(tag: str, content: object = "", **attributes: object) -> Markup:
    """An element. Underscores in attribute names become hyphens, `class_` becomes `class`; None is left out.

    Example:
        >>> str(element("text", "a < b", x=1.23456, class_="tick"))
        '<text x="1.23" class="tick">a &lt; b</text>'
    """
    parts = [
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _short(value))
        for name, value in attributes.items()
        if value is not None
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), join(parts), escape(content))


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def join(parts: Iterable[Markup]) -> Markup:
    """Elements, one after the other."""
    return Markup("").join(parts)


def _path(points: Sequence[tuple[float, float]], end: str = "", **attributes: object) -> Markup:
    return element(
        "path", d="M" + "L".join(f"{_short(float(x))} {_short(float(y))}" for x, y in points) + end, **attributes
    )


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def _svg(parts: Sequence[Markup], label: str, width: float = WIDTH, height: float = HEIGHT, **more: object) -> Markup:
    """The picture, with what it says to those who do not see it."""
    return element("svg", join(parts), viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, **more)


def soft(name: str) -> Markup:
    """A name that may be broken after its underscores, where a column is narrow."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def legend(items: Sequence[tuple[str, int, str]]) -> Markup:
    """Names beside their colours, each with a value or none."""
    entry = Markup('<li class="c{}"><i></i>{}{}</li>')
    made = [entry.format(c % 8, soft(name), element("b", value) if value else "") for name, c, value in items]
    return Markup('<ul class="legend">{}</ul>').format(join(made)) if made else Markup("")


def _figure(title: str, note: object, body: Markup, **attributes: object) -> Markup:
    caption = element("strong", soft(title)) + (element("span", note) if note else Markup(""))
    return element("figure", element("figcaption", caption) + body, class_="chart", **attributes)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _axes(x: tuple[float, float], y: tuple[float, float], bottom: float, x_grid: bool = False):
    """Grid and ticks for ranges of data; returns the two scales, the left edge, and the elements."""
    y_values, x_values = ticks(*y), ticks(*x, 4 if x_grid else 3)
    if not x_grid:
        x_values = [value for value in x_values if value == int(value)] or [x[0]]
    names = tick_labels(y_values)
    left = 12 + 6.8 * max(map(len, names), default=1)
    across, up = _scale(*x, left, WIDTH - 10), _scale(*y, bottom, 8)
    parts = []
    for value, name in zip(y_values, names, strict=True):
        parts.append(_line(left, up(value), WIDTH - 10, up(value), "grid"))
        parts.append(element("text", name, x=left - 6, y=up(value) + 4.5, class_="tick right"))
    for value, name in zip(x_values, tick_labels(x_values), strict=True):
        if x_grid:
            parts.append(_line(across(value), 8, across(value), bottom, "grid"))
        place = min(across(value), WIDTH - 10 - 3.4 * len(name))
        parts.append(element("text", name, x=place, y=bottom + 18, class_="tick middle"))
    return across, up, left, parts


# Charts


class Line(NamedTuple):
    """One curve over optimizer steps."""

    name: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] = ()  # half the height of a band
    points: Sequence[float] = ()  # drawn faintly behind


def line_chart(
    title: str,
    lines: Sequence[Line],
    note: str = "",
    include: Sequence[float] = (),
    reference: tuple[float, str] | None = None,
) -> Markup:
    """Curves over optimizer steps, with a legend that holds the last values; empty if no curve has a point.

    Args:
        title (`str`), note (`str`): what is shown, and a line below it.
        lines (`Sequence[Line]`): curves; those without points are left out.
        include (`Sequence[float]`): values that the vertical axis must reach.
        reference (`tuple[float, str]`, *optional*): height and name of a dashed horizontal line.
    """
    lines = [Line(c.name, c.colour, thin(c.x), thin(c.y), thin(c.error), thin(c.points)) for c in lines if c.x]
    if not lines:
        return Markup("")
    reach = [*include, *([reference[0]] if reference else [])]
    for c in lines:
        reach += [*c.y, *c.points, *(v + s * e for v, e in zip(c.y, c.error, strict=False) for s in (-1, 1))]
    low, high = padded_range(reach)
    if include and min(include) <= min(reach):
        low = min(include)
    first, last = min(c.x[0] for c in lines), max(c.x[-1] for c in lines)
    last = last if last > first else first + 1
    bottom = HEIGHT - 36
    across, up, left, parts = _axes((first, last), (low, high), bottom)
    parts.append(element("text", "optimizer step", x=(left + WIDTH) / 2, y=HEIGHT - 3, class_="tick middle"))
    if reference:
        parts.append(_line(left, up(reference[0]), WIDTH - 10, up(reference[0]), "reference"))
        note += f"; dashed: {reference[1]}"
    for c in lines:
        x, y, drawn = [across(v) for v in c.x], [up(v) for v in c.y], []
        if c.error:
            edge = [[up(v + s * e) for v, e in zip(c.y, c.error, strict=True)] for s in (1, -1)]
            around = [*zip(x, edge[0], strict=True), *reversed(list(zip(x, edge[1], strict=True)))]
            drawn.append(_path(around, "Z", class_="band"))
        drawn += [element("circle", cx=a, cy=up(v), r=1.6, class_="dot") for a, v in zip(x, c.points, strict=False)]
        drawn.append(_path(list(zip(x, y, strict=True)), class_="line") if len(x) > 1 else Markup(""))
        drawn.append(element("circle", cx=x[-1], cy=y[-1], r=2.6 if len(x) > 1 else 3.5, class_="mark"))
        parts.append(element("g", join(drawn), class_=f"c{c.colour % 8}"))
    parts.append(_line(0, 8, 0, bottom, "cross"))
    decimals = decimals_for((high - low) / 50, 1)
    write = number if high - low < 1e-3 else lambda value: fixed(value, decimals)
    shown = [
        {"name": c.name, "x": [round(v, 1) for v in c.x], "y": [write(v) for v in c.y], "c": c.colour % 8}
        for c in lines
    ]
    spoken = [
        f"{c.name or 'value'}: {write(c.y[0])} at step {c.x[0]:g}, {write(c.y[-1])} at {c.x[-1]:g}" for c in lines
    ]
    data = {"left": left / WIDTH, "right": 1 - 10 / WIDTH, "x": [first, last], "lines": shown}
    body = legend([(c.name, c.colour, write(c.y[-1])) for c in lines]) + _svg(parts, ". ".join([title, *spoken]))
    tip = Markup('<div class="tip" hidden aria-live="polite"></div>')
    return _figure(title, note, body + tip, tabindex="0", data_chart=json.dumps(data))


class Track(NamedTuple):
    """A run in the plane of two rewards."""

    name: str
    colour: int
    start: tuple[float, float]
    end: tuple[float, float]
    error: tuple[float, float] = (0.0, 0.0)  # two standard errors of `end`
    way: Sequence[tuple[float, float]] = ()  # between them


def plane_chart(x_name: str, y_name: str, tracks: Sequence[Track], note: str) -> Markup:
    """Two rewards against each other: each run from its start (hollow) to its end (full); better is up and right."""
    if not tracks:
        return Markup("")
    ranges = []
    for axis in (0, 1):
        values = [v for t in tracks for v in (t.start[axis], t.end[axis] - t.error[axis], t.end[axis] + t.error[axis])]
        ranges.append(padded_range([*values, *(point[axis] for t in tracks for point in t.way)], 0.12))
    height = HEIGHT + 60
    bottom = height - 26
    across, up, _, grid = _axes(ranges[0], ranges[1], bottom, x_grid=True)
    corner = across(tracks[0].start[0]), up(tracks[0].start[1])
    parts = [element("rect", x=corner[0], y=8, width=WIDTH - 10 - corner[0], height=corner[1] - 8, class_="better")]
    parts += [*grid, element("text", "both better", x=WIDTH - 16, y=24, class_="tick right")]
    for t in tracks:
        (x0, y0), (x1, y1) = ((across(x), up(y)) for x, y in (t.start, t.end))
        drawn = [_path([(across(x), up(y)) for x, y in t.way], class_="line")] if len(t.way) > 1 else []
        drawn += [] if t.way else [_path([(x0, y0), (x1, y1)], class_="arrow")]
        if any(t.error):
            drawn.append(_line(across(t.end[0] - t.error[0]), y1, across(t.end[0] + t.error[0]), y1, "bar"))
            drawn.append(_line(x1, up(t.end[1] - t.error[1]), x1, up(t.end[1] + t.error[1]), "bar"))
        drawn.append(element("circle", cx=x1, cy=y1, r=5.5, class_="mark"))
        drawn.append(element("circle", cx=x0, cy=y0, r=5.0, class_="hollow"))
        parts.append(element("g", join(drawn), class_=f"c{t.colour % 8}"))
    decimals = [decimals_for((high - low) / 50, 1) for low, high in ranges]
    title = f"{y_name} against {x_name}"
    spoken = [
        f"{t.name}: {name} from {fixed(t.start[i], decimals[i])} to {fixed(t.end[i], decimals[i])}"
        for t in tracks
        for i, name in enumerate((x_name, y_name))
    ]
    key = Markup('<p class="axes"><span>\N{UPWARDS ARROW} {}</span> <span>\N{RIGHTWARDS ARROW} {}</span></p>').format(
        y_name, x_name
    )
    names = legend([(t.name, t.colour, "") for t in tracks] if len(tracks) > 1 else [])
    return _figure(title, note, names + key + _svg(parts, ". ".join([title, *spoken]), height=height))


def strips(title: str, pairs: Mapping[str, Sequence[float]], note: str, columns: int = 40) -> Markup:
    """Measures over time, each as a strip of colour: negative in one colour, positive in another; empty without `pairs`."""
    if not pairs:
        return Markup("")
    largest = max(max(map(abs, values)) for values in pairs.values()) or 1.0
    rows = []
    for name, values in pairs.items():
        cells = [float(part.mean()) for part in np.array_split(np.asarray(values), min(columns, len(values)))]
        width = 100 / len(cells)
        parts = [
            element("rect", x=i * width, y=0, width=width + 0.1, height=10, class_="against" if v < 0 else "along",
                    fill_opacity=round(min(abs(v) / largest, 1.0), 2))
            for i, v in enumerate(cells)
        ]  # fmt: skip
        spoken = f"{name}: {fixed(values[0], 2)} at first, {fixed(values[-1], 2)} at the end"
        picture = _svg(parts, spoken, 100, 10, class_="strip", preserveAspectRatio="none")
        row = [element("th", soft(name), scope="row"), element("td", picture), element("td", fixed(values[-1], 2))]
        rows.append(element("tr", join(row)))
    key = Markup('{}; <b class="key against"></b> opposed, <b class="key along"></b> aligned, full colour at ±{}')
    body = element("table", join(rows), class_="strips") + Markup('<p class="axes">start → end of training</p>')
    return _figure(title, key.format(note, fixed(largest, 2)), body)


def gain_bar(gain: float, error: float, reach: tuple[float, float], colour: int | None) -> Markup:
    """A gain as a point with a bar of two standard errors, on an axis that all rows of a table share."""
    across = _scale(*reach, 6, 154)
    parts = [
        _line(across(0), 0, across(0), 24, "zero"),
        _line(across(gain - 2 * error), 12, across(gain + 2 * error), 12, "bar"),
        element("circle", cx=across(gain), cy=12, r=5, class_="mark"),
    ]
    label = f"gain {fixed(gain, 2, sign=True)}, two standard errors {fixed(2 * error, 2)}"
    return _svg(parts, label, 160, 24, class_=f"gain c{7 if colour is None else colour % 8}")
