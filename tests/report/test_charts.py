"""Ticks, numbers, the trend with its band, and charts of data at the edge."""

import re
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_apex.report.svg import Line, Track, line_chart, padded_range, plane_chart, ticks, trend


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_inside_and_are_few(low: float, width: float) -> None:
    values = [value for value, _ in ticks(low, low + width)]
    assert 1 <= len(values) <= 9
    assert all(low - 1e-6 * width - 1e-9 <= v <= low + width * (1 + 1e-6) + 1e-9 for v in values)


@pytest.mark.parametrize("low, high", [(0, 1), (21.33, 21.41), (0, 3e-5), (-0.002, 0.003), (0, 12000)])
def test_tick_labels_are_distinct(low: float, high: float) -> None:
    labels = [label for _, label in ticks(low, high)]
    assert len(set(labels)) == len(labels) > 1


@given(st.floats(0, 1e6), st.floats(1, 1e6))
def test_ticks_of_steps_are_whole(low: float, width: float) -> None:
    values = ticks(low, low + width, 3, whole=True)
    assert values and all(value == int(value) and "." not in label for value, label in values)


def test_a_constant_curve_still_has_a_range() -> None:
    low, high = padded_range([0.3, 0.3, float("nan")])
    assert low < 0.3 < high


def test_the_band_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    truth = np.linspace(0, 1, 200)
    inside = []
    for _ in range(40):
        mean, error = (np.array(v) for v in trend((truth + rng.normal(0, 0.3, 200)).tolist()))
        inside.append((np.abs(mean - truth) < 2 * error)[20:-20].mean())
    assert 0.9 < np.mean(inside) < 0.99


def test_the_trend_of_a_long_run_is_that_of_the_whole_kernel_in_little_memory() -> None:
    values = np.random.default_rng(0).normal(size=200)
    index = np.arange(200)
    kernel = np.exp(-0.5 * ((index[:, None] - index) / (200 / 30)) ** 2)
    kernel /= kernel.sum(1, keepdims=True)
    mean, error = trend(values.tolist())
    np.testing.assert_allclose(mean, kernel @ values, atol=1e-7)
    np.testing.assert_allclose(error, np.diff(values).std() / 2**0.5 * (kernel**2).sum(1) ** 0.5, atol=1e-7)
    tracemalloc.start()
    trend([0.0, 1.0] * 10_000)
    assert tracemalloc.get_traced_memory()[1] < 20e6  # a kernel of all pairs takes 3.2 GB
    tracemalloc.stop()


def test_a_curve_is_drawn_where_its_values_are() -> None:
    chart = str(line_chart("up", [Line("a", 0, [0.0, 10.0], [0.0, 1.0])]))
    (start, end) = re.search(r'd="M([\d.]+ [\d.]+)L([\d.]+ [\d.]+)"', chart).groups()
    (x0, y0), (x1, y1) = (map(float, point.split()) for point in (start, end))
    assert x0 < x1 and y0 > y1, "SVG counts downwards"
    assert "a: 0.00 at step 0, 1.00 at 10" in chart and 'aria-label="up. a' in chart


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-1e-9, 2e-9, 0.0], [1e9, -1e9], [0.1] * 1000])
def test_any_values_make_a_chart_without_broken_coordinates(values: list[float]) -> None:
    steps = [float(i) for i in range(len(values))]
    chart = str(line_chart("x", [Line("x", 3, steps, values, [0.1] * len(values), values)]))
    assert "<svg" in chart and not re.search(r'"[^"]*\b(nan|inf)\b', chart)
    assert len(chart) < 60_000, "long curves are thinned"


def test_a_run_that_improves_both_ends_up_and_right_of_its_start() -> None:
    chart = str(plane_chart("a", "b", [Track("run", 0, (0.0, 0.0), (1.0, 2.0), (0.1, 0.1))], "note"))
    full, hollow = (
        re.search(rf'<circle cx="([\d.]+)" cy="([\d.]+)" r="[\d.]+" class="{c}"', chart) for c in ("mark", "hollow")
    )
    assert float(full[1]) > float(hollow[1]) and float(full[2]) < float(hollow[2])


def test_no_data_makes_no_chart() -> None:
    assert line_chart("x", [Line("x", 0, [], [])]) == "" and plane_chart("a", "b", [], "") == ""
