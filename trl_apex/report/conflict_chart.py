"""Which objectives pull against each other, over the run."""

import numpy as np
from markupsafe import Markup

from .axis import Scale, tick_labels, ticks
from .numbers import fixed
from .svg import WIDTH, element, picture

COLUMNS, ROW = 40, 30


def conflict_chart(
    title: str, pairs: dict[tuple[str, str], tuple[list[float], list[float]]], note: str = ""
) -> Markup:
    """A strip per pair of objectives: colour is the conflict measure over time, from -1 (opposed) to 1 (aligned).

    Args:
        title (`str`): what is shown.
        pairs (`dict`): optimizer steps and values by pair.
        note (`str`): a line below the title.

    Returns:
        `Markup`: a `<figure>`; empty without data.
    """
    pairs = {pair: series for pair, series in pairs.items() if series[0]}
    if not pairs:
        return Markup("")
    first, last = min(s[0][0] for s in pairs.values()), max(s[0][-1] for s in pairs.values())
    names = [f"{a} · {b}" for a, b in pairs]
    names = [name if len(name) <= 24 else f"{name[:23]}\N{HORIZONTAL ELLIPSIS}" for name in names]
    left, right, top = 12 + 6.6 * max(map(len, names)), WIDTH - 46, 4
    height = top + ROW * len(pairs) + 38
    x_scale = Scale(first, last if last > first else first + 1, left, right)
    largest = max(max(map(abs, s[1])) for s in pairs.values()) or 1.0
    parts, spoken = [], []
    for row, (name, (x, y)) in enumerate(zip(names, pairs.values(), strict=True)):
        y0 = top + ROW * row
        count = min(COLUMNS, len(x))
        edges = np.linspace(left, right, count + 1)
        parts.append(element("text", name, x=left - 8, y=y0 + ROW / 2 + 3, class_="name right small"))
        for column, part in enumerate(np.array_split(np.asarray(y), count)):
            value = float(part.mean())
            parts.append(
                element(
                    "rect",
                    x=float(edges[column]),
                    y=y0,
                    width=float(edges[column + 1] - edges[column]) + 0.4,
                    height=ROW - 4,
                    class_="against" if value < 0 else "along",
                    fill_opacity=round(min(abs(value) / largest, 1.0), 2),
                )
            )
        parts.append(element("rect", x=left, y=y0, width=right - left, height=ROW - 4, class_="frame"))
        parts.append(element("text", fixed(y[-1], 2), x=right + 6, y=y0 + ROW / 2 + 3, class_="end"))
        spoken.append(f"{name}: {fixed(y[0], 2)} at first, {fixed(y[-1], 2)} at the end")
    steps = [t for t in ticks(x_scale.low, x_scale.high, 3) if t == int(t)] or [first]
    for value, label in zip(steps, tick_labels(steps), strict=True):
        parts.append(element("text", label, x=x_scale(value), y=height - 20, class_="tick middle"))
    parts.append(element("text", "optimizer step", x=(left + right) / 2, y=height - 4, class_="tick middle"))
    shade = Markup(
        '<span>{} <span class="key-item"><b class="key against"></b> opposed,</span> '
        '<span class="key-item"><b class="key along"></b> aligned;</span> full colour at ±{}</span>'
    )
    return Markup('<figure class="chart">{}{}</figure>').format(
        Markup("<figcaption>{}{}</figcaption>").format(
            element("strong", title), shade.format(note, fixed(largest, 2))
        ),
        picture(parts, f"{title}. " + ". ".join(spoken), WIDTH, height),
    )
