"""A noisy curve, its trend, and how sure the trend is."""

import numpy as np


def trend(values: list[float], width: float | None = None) -> tuple[list[float], list[float]]:
    r"""Gaussian-weighted moving mean and its standard error.

    $$m_t = \sum_s k_{ts} y_s, \qquad \mathrm{se}_t = \hat\sigma \sqrt{\textstyle\sum_s k_{ts}^2}$$

    with \(k_t\) a Gaussian in index distance that sums to one, and \(\hat\sigma\) from the differences of neighbours.

    Args:
        values (`list[float]`): \(y\), in the order of time.
        width (`float`, *optional*): standard deviation of the Gaussian in points; a thirtieth of the length by default,
            at least 1.5.

    Returns:
        `tuple` of two lists as long as `values`.

    Example:
        >>> mean, error = trend([1.0, 1.0, 1.0])
        >>> mean, error
        ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
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


def thin(steps: list[float], values: list[float], most: int = 240) -> tuple[list[float], list[float]]:
    """At most `most` points: means over equal runs of neighbours.

    Example:
        >>> thin([1, 2, 3, 4], [0.0, 2.0, 4.0, 6.0], most=2)
        ([1.5, 3.5], [1.0, 5.0])
    """
    if len(steps) <= most:
        return list(steps), list(values)
    x = [float(part.mean()) for part in np.array_split(np.asarray(steps, dtype=float), most)]
    y = [float(part.mean()) for part in np.array_split(np.asarray(values, dtype=float), most)]
    return x, y
