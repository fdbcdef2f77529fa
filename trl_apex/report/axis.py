"""Axes: where data lands in a picture, where ticks go, and labels that do not overlap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A straight map from data to picture coordinates.

    Example:
        >>> Scale(0.0, 10.0, 100.0, 0.0)(5.0)
        50.0
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def padded_range(values: Sequence[float], padding: float = 0.06) -> tuple[float, float]:
    """Smallest and largest finite value, with a margin; never an empty range.

    Example:
        >>> padded_range([0.0, 1.0], 0.1)
        (-0.1, 1.1)
        >>> padded_range([])
        (0.0, 1.0)
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    margin = (high - low) * padding if high > low else abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside a range, about `count` of them.

    Example:
        >>> ticks(0.0, 1.0)
        [0.0, 0.25, 0.5, 0.75, 1.0]
        >>> ticks(20.9, 22.1)
        [21.0, 21.25, 21.5, 21.75, 22.0]
    """
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Tick labels with the decimals that the step needs.

    Example:
        >>> tick_labels([0.0, 0.25, 0.5]), tick_labels([0.0, 500.0, 1000.0])
        (['0.00', '0.25', '0.50'], ['0', '500', '1,000'])
        >>> tick_labels([0.0, 2e-6])
        ['0', '2e-06']
    """
    from .numbers import fixed, number

    step = min((b - a for a, b in zip(values, values[1:], strict=False)), default=abs(values[0]) if values else 1.0)
    if step < 1e-4:
        return [number(value, 2) for value in values]
    decimals = next((d for d in range(6) if abs(step * 10**d - round(step * 10**d)) < 1e-6), 6)
    return [fixed(value, decimals) for value in values]


def dodge(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move positions apart until neighbours are at least `gap` apart, as little as a few sweeps can, inside a range.

    Example:
        >>> dodge([50.0, 52.0], 10.0, 0.0, 100.0)
        [46.0, 56.0]
        >>> dodge([99.0, 100.0], 10.0, 0.0, 100.0)
        [90.0, 100.0]
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    clusters = [[positions[i], 1] for i in order]  # centre and count; each cluster is a run of labels `gap` apart
    merged = True
    while merged:
        merged = False
        for i, (centre, count) in enumerate(clusters):
            half = (count - 1) * gap / 2
            clusters[i][0] = min(max(centre, low + half), high - half)
        for i in range(len(clusters) - 1):
            (a, n), (b, m) = clusters[i], clusters[i + 1]
            if b - a < gap * (n + m) / 2 - 1e-9:
                clusters[i : i + 2] = [[(a * n + b * m) / (n + m), n + m]]
                merged = True
                break
    placed = [centre + (i - (count - 1) / 2) * gap for centre, count in clusters for i in range(int(count))]
    result = [0.0] * len(positions)
    for index, position in zip(order, placed, strict=True):
        result[index] = position
    return result
