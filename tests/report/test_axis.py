"""Ticks and labels."""

from hypothesis import given
from hypothesis import strategies as st

from trl_apex.report.axis import dodge, padded_range, tick_labels, ticks

heights = st.lists(st.floats(0, 200), min_size=1, max_size=8)


@given(heights)
def test_labels_never_overlap_nor_leave_the_picture_nor_change_order(positions: list[float]) -> None:
    placed = dodge(positions, 16.0, 14.0, 206.0)
    ordered = sorted(placed)
    assert all(b - a > 16 - 1e-6 for a, b in zip(ordered, ordered[1:], strict=False))
    assert ordered[0] > 14 - 1e-6 and ordered[-1] < 206 + 1e-6
    assert all(
        placed[i] < placed[j] for i in range(len(placed)) for j in range(len(placed)) if positions[i] < positions[j]
    )


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_inside_and_have_distinct_labels(low: float, width: float) -> None:
    values = ticks(low, low + width)
    assert 1 <= len(values) <= 9
    assert all(low - 1e-6 * width - 1e-9 <= v <= low + width * (1 + 1e-6) + 1e-9 for v in values)


def test_tick_labels_are_distinct() -> None:
    for low, high in ((0, 1), (21.33, 21.41), (0, 3e-5), (-0.002, 0.003), (0, 12000)):
        labels = tick_labels(ticks(low, high))
        assert len(set(labels)) == len(labels) > 1


def test_a_constant_curve_still_has_a_range() -> None:
    low, high = padded_range([0.3, 0.3, float("nan")])
    assert low < 0.3 < high
