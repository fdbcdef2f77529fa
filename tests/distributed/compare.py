"""What has to be equal between two runs, and how nearly."""

import numpy as np


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Between two models' weights, which must have the same names."""
    assert set(a) == set(b)
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def movement(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Norm of the difference of two models' weights."""
    return float(np.sqrt(sum(((a[name] - b[name]) ** 2).sum() for name in a)))


def curve(run: dict, key: str) -> list[float]:
    """A logged value over the run."""
    return [entry[key] for entry in run["logs"]]


def assert_same_training(run: dict, reference: dict, tolerance: float) -> None:
    """Same rollouts, priorities, loss, gradient norm and weights, on every step."""
    assert len(run["iterations"]) == len(reference["iterations"])
    for mine, theirs in zip(run["iterations"], reference["iterations"], strict=True):
        np.testing.assert_allclose(mine["rewards"], theirs["rewards"], atol=tolerance)
        for name, priority in theirs["priorities"].items():
            assert abs(mine["priorities"][name] - priority) < 10 * tolerance
    np.testing.assert_allclose(curve(run, "loss"), curve(reference, "loss"), atol=tolerance)
    np.testing.assert_allclose(curve(run, "grad_norm"), curve(reference, "grad_norm"), rtol=1e-3)
    assert largest_difference(run["weights"], reference["weights"]) < tolerance


def assert_same_state(state, reference, place: str = "aggregator") -> None:
    """Every number of two aggregators' states: priorities to 1e-6, the others to 1e-4; everything else is equal."""
    assert type(state) is type(reference), place
    if isinstance(state, dict):
        assert list(state) == list(reference), place
        for key in state:
            assert_same_state(state[key], reference[key], f"{place}.{key}")
    elif isinstance(state, list):
        assert len(state) == len(reference), place
        for i, pair in enumerate(zip(state, reference, strict=True)):
            assert_same_state(*pair, f"{place}.{i}")
    elif isinstance(state, float):
        tolerance = 1e-6 if "priorit" in place else 1e-4
        np.testing.assert_allclose(state, reference, rtol=tolerance, atol=tolerance, err_msg=place)
    else:
        assert state == reference, place
