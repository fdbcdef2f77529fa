"""The few SVG elements that the charts are made of. Colours are theme variables of the page, never literals."""

from collections.abc import Sequence

from markupsafe import Markup, escape

# A chart is drawn in these units and scaled to its column; on a phone one unit is a little less than a pixel.
WIDTH, HEIGHT = 400, 250


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
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), Markup("").join(parts), escape(content))


def _short(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def join(parts: Sequence[Markup]) -> Markup:
    """Elements, one after the other."""
    return Markup("").join(parts)


def path(x: Sequence[float], y: Sequence[float], **attributes: object) -> Markup:
    """A line through points.

    Example:
        >>> str(path([0, 1], [2, 3.5], class_="line"))
        '<path d="M0 2L1 3.5" class="line"></path>'
    """
    points = "L".join(f"{_short(float(a))} {_short(float(b))}" for a, b in zip(x, y, strict=True))
    return element("path", d=f"M{points}", **attributes)


def band(x: Sequence[float], low: Sequence[float], high: Sequence[float], **attributes: object) -> Markup:
    """The area between two lines."""
    points = "L".join(
        f"{_short(float(a))} {_short(float(b))}"
        for a, b in [*zip(x, high, strict=True), *list(zip(x, low, strict=True))[::-1]]
    )
    return element("path", d=f"M{points}Z", **attributes)


def picture(parts: Sequence[Markup], label: str, width: float = WIDTH, height: float = HEIGHT) -> Markup:
    """The `<svg>` with what it says to those who do not see it."""
    return element("svg", join(parts), viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)
