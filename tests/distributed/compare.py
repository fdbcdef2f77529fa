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
