"""The charts of the report as SVG: curves, objective against objective, strips and bars.

Colours are theme variables of the page, so one picture serves light and dark. Names stand in HTML around the pictures,
where they wrap on a phone; the pictures themselves hold ticks alone.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT, EDGE = 400, 216, 10  # the units of a chart, which is scaled to its column, and its right margin
MINUS = "\N{MINUS SIGN}"
SIGNIFICANT = 7  # as many decimals or more: three significant digits instead

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
    floor: float | None = None,
    reference: tuple[float, str] | None = None,
) -> Markup:
    """Curves over optimizer steps, with a legend that holds the last values; empty if no curve has a point.

    Args:
        lines (`Sequence[Line]`): curves; those without points are left out.
        floor (`float`, *optional*): where the vertical axis starts, unless a value is lower.
        reference (`tuple[float, str]`, *optional*): height and name of a dashed horizontal line.
    """
    lines = [Line(c.name, c.colour, *map(thin, c[2:])) for c in lines if c.x]
    if not lines:
        return Markup("")
    reach = [value for value in (floor, reference and reference[0]) if value is not None]
    for c in lines:
        reach += [*c.y, *c.points, *(v + s * e for v, e in zip(c.y, c.error, strict=False) for s in (-1, 1))]
    low, high = padded_range(reach)
    if floor is not None and floor <= min(reach):
        low = floor
    first, last = min(c.x[0] for c in lines), max(c.x[-1] for c in lines)
    last = last if last > first else first + 1
    bottom = HEIGHT - 36
    across, up, left, parts = _axes((first, last), (low, high), bottom)
    parts.append(element("text", "optimizer step", x=(left + WIDTH) / 2, y=HEIGHT - 3, class_="tick middle"))
    if reference:
        parts.append(_line(left, up(reference[0]), WIDTH - EDGE, up(reference[0]), "reference"))
        note += f"; dashed: {reference[1]}"
    decimals = decimals_for((high - low) / 50, 1) if high - low >= 1e-3 else SIGNIFICANT
    names, spoken, shown = [], [title], []
    for c in lines:
        x, y, drawn = [across(v) for v in c.x], [up(v) for v in c.y], []
        if c.error:
            upper, lower = ([up(v + s * e) for v, e in zip(c.y, c.error, strict=True)] for s in (1, -1))
            drawn.append(_path([*zip(x, upper, strict=True), *zip(x[::-1], lower[::-1], strict=True)], "band", "Z"))
        drawn += [element("circle", cx=a, cy=up(v), r=1.6, class_="dot") for a, v in zip(x, c.points, strict=False)]
        if len(x) > 1:
            drawn.append(_path(list(zip(x, y, strict=True)), "line"))
        drawn.append(element("circle", cx=x[-1], cy=y[-1], r=2.6 if len(x) > 1 else 3.5, class_="mark"))
        parts.append(_coloured(c.colour, drawn))
        values = [fixed(v, decimals) for v in c.y]
        names.append((c.name, c.colour, values[-1]))
        spoken.append(f"{c.name or 'value'}: {values[0]} at step {c.x[0]:g}, {values[-1]} at {c.x[-1]:g}")
        shown.append({"name": c.name, "x": [round(v, 1) for v in c.x], "y": values})
    parts.append(_line(0, 8, 0, bottom, "cross"))
    # For the script of the page, which shows the values under the pointer.
    data = {"left": left / WIDTH, "right": 1 - EDGE / WIDTH, "x": [first, last], "lines": shown}
    tip = Markup('<div class="tip" hidden aria-live="polite"></div>')
    body = legend(names) + _svg(parts, ". ".join(spoken)) + tip
    return _figure(title, note, body, tabindex="0", data_chart=json.dumps(data))


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
    for i in (0, 1):
        values = [v for t in tracks for v in (t.start[i], t.end[i] - t.error[i], t.end[i] + t.error[i])]
        ranges.append(padded_range([*values, *(point[i] for t in tracks for point in t.way)], 0.12))
    decimals = [decimals_for((high - low) / 50, 1) for low, high in ranges]
    height = HEIGHT + 60
    bottom = height - 26
    across, up, _, grid = _axes(ranges[0], ranges[1], bottom, x_grid=True)
    x0, y0 = across(tracks[0].start[0]), up(tracks[0].start[1])
    parts = [element("rect", x=x0, y=8, width=WIDTH - EDGE - x0, height=y0 - 8, class_="better"), *grid]
    parts.append(element("text", "both better", x=WIDTH - 16, y=24, class_="tick right"))
    spoken = [f"{y_name} against {x_name}"]
    for t in tracks:
        (x0, y0), (x1, y1) = ((across(x), up(y)) for x, y in (t.start, t.end))
        drawn = []
        if len(t.way) > 1:
            drawn.append(_path([(across(x), up(y)) for x, y in t.way], "line"))
        elif not t.way:
            drawn.append(_path([(x0, y0), (x1, y1)], "arrow"))
        if any(t.error):
            drawn.append(_line(across(t.end[0] - t.error[0]), y1, across(t.end[0] + t.error[0]), y1, "bar"))
            drawn.append(_line(x1, up(t.end[1] - t.error[1]), x1, up(t.end[1] + t.error[1]), "bar"))
        drawn.append(element("circle", cx=x1, cy=y1, r=5.5, class_="mark"))
        drawn.append(element("circle", cx=x0, cy=y0, r=5.0, class_="hollow"))
        parts.append(_coloured(t.colour, drawn))
        for i, name in enumerate((x_name, y_name)):
            spoken.append(f"{t.name}: {name} from {fixed(t.start[i], decimals[i])} to {fixed(t.end[i], decimals[i])}")
    axes = Markup('<p class="axes"><span>\N{UPWARDS ARROW} {}</span> <span>\N{RIGHTWARDS ARROW} {}</span></p>')
    names = legend([(t.name, t.colour, "") for t in tracks]) if len(tracks) > 1 else Markup("")
    picture = _svg(parts, ". ".join(spoken), height=height)
    return _figure(spoken[0], note, names + axes.format(y_name, x_name) + picture)


def strips(title: str, pairs: Mapping[str, Sequence[float]], note: str) -> Markup:
    """Measures over time, each as a strip of colour: negative in one, positive in another; empty without `pairs`."""
    if not pairs:
        return Markup("")
    largest = max(max(map(abs, values)) for values in pairs.values()) or 1.0
    rows = []
    for name, values in pairs.items():
        cells = thin(values, 40)
        width = 100 / len(cells)
        parts = [
            element("rect", x=i * width, y=0, width=width + 0.1, height=10, class_="against" if v < 0 else "along",
                    fill_opacity=round(min(abs(v) / largest, 1.0), 2))
            for i, v in enumerate(cells)
        ]  # fmt: skip
        spoken = f"{name}: {fixed(values[0], 2)} at first, {fixed(values[-1], 2)} at the end"
        picture = _svg(parts, spoken, 100, 10, class_="strip", preserveAspectRatio="none")
        row = [element("th", soft(name), scope="row"), element("td", picture), element("td", fixed(values[-1], 2))]
        rows.append(element("tr", _join(row)))
    key = Markup('{}; <b class="key against"></b> opposed, <b class="key along"></b> aligned, full colour at ±{}')
    body = element("table", _join(rows), class_="strips") + Markup('<p class="axes">start → end of training</p>')
    return _figure(title, key.format(note, fixed(largest, 2)), body)


def gain_bar(gain: float, error: float, reach: tuple[float, float], colour: int) -> Markup:
    """A gain as a point with a bar of two standard errors, on an axis that all rows of a table share."""
    across = _scale(*reach, 6, 154)
    parts = [
        _line(across(0), 0, across(0), 24, "zero"),
        _line(across(gain - 2 * error), 12, across(gain + 2 * error), 12, "bar"),
        element("circle", cx=across(gain), cy=12, r=5, class_="mark"),
    ]
    label = f"gain {fixed(gain, 2, sign=True)}, two standard errors {fixed(2 * error, 2)}"
    return _svg(parts, label, 160, 24, class_=f"gain c{colour % 8}")


# Numbers


def fixed(value: float, decimals: int, sign: bool = False) -> str:
    """A number with as many decimals as its column; with 7 or more, three significant digits.

    Example:
        >>> fixed(1234.5, 1), fixed(-0.126, 2), fixed(0.5, 2, sign=True), fixed(0.00002, 7)
        ('1,234.5', '\N{MINUS SIGN}0.13', '+0.50', '2e-05')
    """
    text = f"{abs(value):,.{decimals}f}" if decimals < SIGNIFICANT else f"{abs(value):.3g}"
    if not any(digit in "123456789" for digit in text):
        return text
    return (MINUS if value < 0 else "+" if sign else "") + text


def decimals_for(spread: float, digits: int = 2) -> int:
    """Decimals, 0 to 6, that show `spread` with `digits` significant digits: 2 for 0.35, 0 for 12, 4 for 0.0042."""
    if not (math.isfinite(spread) and spread > 0):
        return 2
    return min(max(digits - 1 - math.floor(math.log10(spread)), 0), 6)


def trend(values: Sequence[float]) -> tuple[list[float], list[float]]:
    r"""Gaussian-weighted moving mean and its standard error.

    $$m_t = \sum_s k_{ts} y_s, \qquad \mathrm{se}_t = \hat\sigma \sqrt{\textstyle\sum_s k_{ts}^2}$$

    with \(k_t\) a Gaussian in index distance that sums to one, as wide as a thirtieth of the length, at least 1.5, cut off at six
    widths, and \(\hat\sigma\) from the differences of neighbours.
    """
    y = np.asarray(values, dtype=float)
    if len(y) < 3:
        return list(values), [0.0] * len(y)
    width = max(len(y) / 30, 1.5)
    reach = math.ceil(6 * width)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)

    def over(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        return np.convolve(values, kernel)[reach : reach + len(y)]

    total, noise = over(np.ones_like(y), kernel), np.diff(y).std() / np.sqrt(2)
    error = noise * np.sqrt(over(np.ones_like(y), kernel**2)) / total
    return np.round(over(y, kernel) / total, 12).tolist(), error.tolist()


def thin(values: Sequence[float], most: int = 240) -> list[float]:
    """At most `most` values: means over equal runs of neighbours."""
    if len(values) <= most:
        return list(values)
    return [float(part.mean()) for part in np.array_split(np.asarray(values, dtype=float), most)]


def padded_range(values: Sequence[float], padding: float = 0.06) -> tuple[float, float]:
    """Smallest and largest finite value, with a margin; never an empty range."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    margin = (high - low) * padding if high > low else abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[tuple[float, str]]:
    """Round numbers inside a range, about `count` of them, with their labels; `whole` numbers alone for steps.

    Example:
        >>> ticks(20.9, 22.1, 2), ticks(0.0, 2e-6, 2)
        ([(21.0, '21.0'), (21.5, '21.5'), (22.0, '22.0')], [(0.0, '0'), (1e-06, '1e-06'), (2e-06, '2e-06')])
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [factor * power for factor in (1, 2, 2.5, 5, 10)]
    step = min((s for s in steps if not whole or s % 1 == 0), key=lambda s: abs(math.log(s / rough)))
    exact = (d for d in range(SIGNIFICANT) if abs(step * 10**d - round(step * 10**d)) < 1e-6)
    decimals = next(exact) if step >= 1e-4 else SIGNIFICANT
    values = [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(value, fixed(value, decimals)) for value in values]


# Elements


def element(tag: str, content: object = "", **attributes: object) -> Markup:
    """An element. Underscores in attribute names become hyphens, `class_` becomes `class`.

    Example:
        >>> str(element("text", "a < b", x=1.23456, class_="tick"))
        '<text x="1.23" class="tick">a &lt; b</text>'
    """
    parts = [
        Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), _short(value))
        for name, value in attributes.items()
    ]
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), _join(parts), escape(content))


def soft(name: str) -> Markup:
    """A name that may be broken after its underscores, where a column is narrow."""
    return Markup("_<wbr>").join(name.split("_"))


def legend(items: Sequence[tuple[str, int, str]]) -> Markup:
    """Names beside their colours, each with a value or none."""
    entry = Markup('<li class="c{}"><i></i>{}{}</li>')
    made = [entry.format(c % 8, soft(name), element("b", value) if value else "") for name, c, value in items]
    return element("ul", _join(made), class_="legend")


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def _join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def _path(points: Sequence[tuple[float, float]], class_: str, end: str = "") -> Markup:
    return element("path", d="M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points) + end, class_=class_)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _coloured(colour: int, parts: Sequence[Markup]) -> Markup:
    return element("g", _join(parts), class_=f"c{colour % 8}")


def _svg(parts: Sequence[Markup], label: str, width: float = WIDTH, height: float = HEIGHT, **more: object) -> Markup:
    """The picture, with what it says to those who do not see it."""
    return element("svg", _join(parts), viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, **more)


def _figure(title: str, note: object, body: Markup, **attributes: object) -> Markup:
    caption = element("strong", soft(title)) + (element("span", note) if note else "")
    return element("figure", element("figcaption", caption) + body, class_="chart", **attributes)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _axes(x: tuple[float, float], y: tuple[float, float], bottom: float, x_grid: bool = False):
    """Grid and ticks for ranges of data; returns the two scales, the left edge, and the elements."""
    x_ticks, y_ticks = ticks(*x) if x_grid else ticks(*x, 3, whole=True), ticks(*y)
    left = 12 + 6.8 * max((len(name) for _, name in y_ticks), default=1)
    across, up = _scale(*x, left, WIDTH - EDGE), _scale(*y, bottom, 8)
    parts = []
    for value, name in y_ticks:
        parts.append(_line(left, up(value), WIDTH - EDGE, up(value), "grid"))
        parts.append(element("text", name, x=left - 6, y=up(value) + 4.5, class_="tick right"))
    for value, name in x_ticks:
        if x_grid:
            parts.append(_line(across(value), 8, across(value), bottom, "grid"))
        place = min(across(value), WIDTH - EDGE - 3.4 * len(name))
        parts.append(element("text", name, x=place, y=bottom + 18, class_="tick middle"))
    return across, up, left, parts
