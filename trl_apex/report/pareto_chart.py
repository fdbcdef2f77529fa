"""Two objectives against each other."""

from dataclasses import dataclass

from markupsafe import Markup

from .axis import Scale, dodge, padded_range, tick_labels, ticks
from .gain_chart import Outcome
from .svg import WIDTH, element, path, picture

HEIGHT = 290


@dataclass(frozen=True)
class Track:
    """A run in the plane of two objectives.

    Args:
        name (`str`): the run.
        colour (`int`): index into the page's palette.
        x, y (`list[float]`): trend of the two training rewards, in the order of time.
        results (`tuple[Outcome, Outcome]`, *optional*): held-out results of the two.
    """

    name: str
    colour: int
    x: list[float]
    y: list[float]
    results: tuple[Outcome, Outcome] | None = None


def pareto_chart(x_name: str, y_name: str, tracks: list[Track]) -> Markup:
    """Base and tuned models as points with two standard errors, joined by an arrow; without results, training's path.

    Args:
        x_name, y_name (`str`): the objectives.
        tracks (`list[Track]`): the runs.

    Returns:
        `Markup`: a `<figure>`; empty without data.
    """
    measured = [track for track in tracks if track.results]
    shown = measured or [track for track in tracks if len(track.x) > 1]
    if not shown:
        return Markup("")
    xs = [v for t in shown for v in _reach(t, 0)]
    ys = [v for t in shown for v in _reach(t, 1)]
    y_values = ticks(*padded_range(ys, 0.12))
    y_labels = tick_labels(y_values)
    left = 30 + 7.0 * max(map(len, y_labels), default=1)
    x_scale = Scale(*padded_range(xs, 0.12), left, WIDTH - 14)
    y_scale = Scale(*padded_range(ys, 0.12), HEIGHT - 46, 10)
    parts = []
    if measured:
        a, b = measured[0].results  # type: ignore[misc]
        corner_x, corner_y = x_scale(a.base), y_scale(b.base)
        parts.append(
            element("rect", x=corner_x, y=10, width=x_scale.end - corner_x, height=corner_y - 10, class_="better")
        )
        parts.append(element("text", "both better", x=x_scale.end - 6, y=24, class_="tick right"))
    for value, label in zip(y_values, y_labels, strict=True):
        y = y_scale(value)
        parts.append(element("line", x1=left, x2=x_scale.end, y1=y, y2=y, class_="grid"))
        parts.append(element("text", label, x=left - 6, y=y + 4.5, class_="tick right"))
    x_values = ticks(x_scale.low, x_scale.high)
    for value, label in zip(x_values, tick_labels(x_values), strict=True):
        x = x_scale(value)
        parts.append(element("line", x1=x, x2=x, y1=10, y2=HEIGHT - 46, class_="grid"))
        parts.append(element("text", label, x=x, y=HEIGHT - 28, class_="tick middle"))
    parts.append(
        element("text", f"{x_name} \N{RIGHTWARDS ARROW}", x=(left + WIDTH) / 2, y=HEIGHT - 8, class_="name middle")
    )
    middle = HEIGHT / 2 - 20
    parts.append(
        element(
            "text",
            f"{y_name} \N{RIGHTWARDS ARROW}",
            x=14,
            y=middle,
            class_="name middle",
            transform=f"rotate(-90 14 {middle:g})",
        )
    )
    ends = [_end(track) for track in shown]
    starts = [_start(track) for track in shown]
    away = [16 if start[1] > end[1] else -10 for start, end in zip(starts, ends, strict=True)]
    places = dodge([y_scale(end[1]) + d for end, d in zip(ends, away, strict=True)], 15, 20, HEIGHT - 52)
    for track, start, end, place in zip(shown, starts, ends, places, strict=True):
        parts += _measured(track, x_scale, y_scale) if track.results else _path(track, x_scale, y_scale)
        label = track.name if len(shown) > 1 else "tuned" if track.results else "end"
        room = x_scale.end - x_scale(end[0]) > 8 * len(label[:22])
        left_of = not room or (start[0] > end[0] and x_scale(end[0]) - left > 8 * len(label[:22]))
        x, side = x_scale(end[0]) + (-9 if left_of else 9), " right" if left_of else ""
        parts.append(element("text", label[:22], x=x, y=place, class_=f"end c{track.colour % 8}{side}"))
    for x, y in (
        {(round(x_scale(x) / 40), round(y_scale(y) / 40)): (x, y) for x, y in starts}.values() if measured else ()
    ):
        parts.append(element("text", "base", x=x_scale(x) + 8, y=y_scale(y) + 14, class_="tick"))
    spoken = f"{y_name} against {x_name}. " + ". ".join(
        f"{t.name}: {x_name} from {t.results[0].cells()[0]} to {t.results[0].cells()[1]}, "
        f"{y_name} from {t.results[1].cells()[0]} to {t.results[1].cells()[1]}"
        for t in measured
        if t.results
    )
    note = (
        "held-out prompts; bars: two standard errors of the difference"
        if measured
        else "trend of the training rewards"
    )
    return Markup('<figure class="chart"><figcaption>{}{}</figcaption>{}</figure>').format(
        element("strong", f"{y_name} against {x_name}"), element("span", note), picture(parts, spoken, WIDTH, HEIGHT)
    )


def _reach(track: Track, axis: int) -> list[float]:
    if track.results:
        row = track.results[axis]
        return [row.base, row.tuned - 2 * row.se, row.tuned + 2 * row.se]
    return track.x if axis == 0 else track.y


def _start(track: Track) -> tuple[float, float]:
    if track.results:
        return track.results[0].base, track.results[1].base
    return track.x[0], track.y[0]


def _end(track: Track) -> tuple[float, float]:
    if track.results:
        return track.results[0].tuned, track.results[1].tuned
    return track.x[-1], track.y[-1]


def _path(track: Track, x_scale: Scale, y_scale: Scale) -> list[Markup]:
    x, y = [x_scale(v) for v in track.x], [y_scale(v) for v in track.y]
    return [
        path(x, y, class_=f"line c{track.colour % 8}"),
        element("circle", cx=x[0], cy=y[0], r=4.5, class_="hollow"),
        element("text", "start", x=x[0] + 8, y=y[0] + 14, class_="tick"),
        element("circle", cx=x[-1], cy=y[-1], r=5.5, class_=f"mark c{track.colour % 8}"),
    ]


def _measured(track: Track, x_scale: Scale, y_scale: Scale) -> list[Markup]:
    assert track.results is not None
    a, b = track.results
    colour = f"c{track.colour % 8}"
    x0, y0, x1, y1 = x_scale(a.base), y_scale(b.base), x_scale(a.tuned), y_scale(b.tuned)
    return [
        path([x0, x1], [y0, y1], class_=f"arrow {colour}"),
        element(
            "line",
            x1=x_scale(a.tuned - 2 * a.se),
            x2=x_scale(a.tuned + 2 * a.se),
            y1=y1,
            y2=y1,
            class_=f"bar {colour}",
        ),
        element(
            "line",
            x1=x1,
            x2=x1,
            y1=y_scale(b.tuned - 2 * b.se),
            y2=y_scale(b.tuned + 2 * b.se),
            class_=f"bar {colour}",
        ),
        element("circle", cx=x1, cy=y1, r=5.5, class_=f"mark {colour}"),
        element("circle", cx=x0, cy=y0, r=5, class_="hollow"),
    ]
