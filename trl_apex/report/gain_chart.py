"""What training changed, on prompts it never saw, with two standard errors."""

import math
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .axis import Scale, tick_labels, ticks
from .numbers import decimals_for, fixed
from .svg import WIDTH, element, picture


@dataclass(frozen=True)
class Outcome:
    """One row of the results.

    Args:
        name (`str`): objective or held-out metric.
        base, tuned (`float`): means before and after.
        se (`float`): standard error of the paired difference.
        gain (`float`, *optional*): the difference in units of the base model's standard deviation.
        gain_se (`float`): its standard error.
        trained (`bool`): whether it was a reward of the training.
    """

    name: str
    base: float
    tuned: float
    se: float
    gain: float | None
    gain_se: float
    trained: bool

    @property
    def z(self) -> float:
        """The difference in standard errors."""
        difference = self.tuned - self.base
        return difference / self.se if self.se else math.copysign(math.inf, difference) if difference else 0.0

    @property
    def verdict(self) -> str:
        """In a word, by two standard errors."""
        return "rose" if self.z > 2 else "fell" if self.z < -2 else "within noise"

    def cells(self) -> list[str]:
        """Base, tuned, difference with its error, and gain, as text that lines up."""
        decimals = decimals_for(
            self.se or abs(self.tuned - self.base) or abs(self.base) / 10, 2 if f"{self.se:e}"[0] == "1" else 1
        )
        difference = f"{fixed(self.tuned - self.base, decimals, sign=True)} ± {fixed(self.se, decimals)}"
        gain = f"{fixed(self.gain, 2, sign=True)} ± {fixed(self.gain_se, 2)}" if self.gain is not None else ""
        return [fixed(self.base, decimals), fixed(self.tuned, decimals), difference, gain]


def outcomes(summary: dict[str, Any]) -> list[Outcome]:
    """The rows of a run's `summary.json`, objectives first.

    Example:
        >>> row = outcomes({"objectives": {"ocr": {"base": 0.5, "tuned": 0.62, "se": 0.02, "gain": 0.6}}})[0]
        >>> row.verdict, row.cells()
        ('rose', ['0.50', '0.62', '+0.12 ± 0.02', '+0.60 ± 0.10'])
    """
    rows = []
    for part, trained in (("objectives", True), ("held_out", False)):
        for name, entry in (summary.get(part) or {}).items():
            numbers = [entry.get(key) for key in ("base", "tuned", "se", "gain", "gain_se")]
            base, tuned, se, gain, gain_se = (
                float(v) if isinstance(v, int | float) and math.isfinite(v) else None for v in numbers
            )
            if base is None or tuned is None:
                continue
            if gain_se is None and gain and tuned != base:
                gain_se = (se or 0.0) * abs(gain / (tuned - base))
            rows.append(Outcome(name, base, tuned, se or 0.0, gain, gain_se or 0.0, trained))
    return rows


def gain_chart(rows: list[Outcome]) -> Markup:
    """Gains of the trained objectives in units of the base model's standard deviation, as points with bars of two SE."""
    rows = [row for row in rows if row.gain is not None]
    if not rows:
        return Markup("")
    edges = [row.gain + s * 2 * row.gain_se for row in rows for s in (-1, 1)]  # type: ignore[operator]
    low, high = min([*edges, 0.0]), max([*edges, 0.0])
    margin = (high - low or 1.0) * 0.08
    left, row_height, top = 16 + 7.2 * min(max(len(row.name) for row in rows), 16), 34, 8
    height = top + row_height * len(rows) + 44
    x_scale = Scale(low - margin, high + margin, left, WIDTH - 62)
    bottom = top + row_height * len(rows)
    values = ticks(x_scale.low, x_scale.high)
    parts = []
    for value, name in zip(values, tick_labels(values), strict=True):
        x = x_scale(value)
        parts.append(element("line", x1=x, x2=x, y1=top, y2=bottom, class_="zero" if value == 0 else "grid"))
        parts.append(element("text", name, x=x, y=bottom + 17, class_="tick middle"))
    parts.append(
        element(
            "text",
            "gain, in standard deviations of the base",
            x=(left + WIDTH) / 2,
            y=height - 6,
            class_="tick middle",
        )
    )
    for index, row in enumerate(rows):
        assert row.gain is not None
        y, bar = top + row_height * (index + 0.5), 2 * row.gain_se
        parts.append(element("text", row.name[:16], x=left - 8, y=y + 4.5, class_="name right"))
        parts.append(
            element(
                "line", x1=x_scale(row.gain - bar), x2=x_scale(row.gain + bar), y1=y, y2=y, class_=f"bar c{index % 8}"
            )
        )
        parts.append(element("circle", cx=x_scale(row.gain), cy=y, r=5.5, class_=f"mark c{index % 8}"))
        parts.append(element("text", fixed(row.gain, 2, sign=True), x=WIDTH - 52, y=y + 4.5, class_="end"))
    spoken = "Gain of each objective over the base model: " + ", ".join(
        f"{row.name} {row.cells()[3]}, {row.verdict}" for row in rows
    )
    return Markup('<figure class="chart"><figcaption>{}{}</figcaption>{}</figure>').format(
        element("strong", "Gain on held-out prompts"),
        element("span", "bars: two standard errors of the paired difference"),
        picture(parts, spoken, WIDTH, height),
    )
