"""Rules of 2026 against straight-line computations, and what each promises."""

import math
import statistics

import pytest
import torch

from trl_apex.aggregation import MultiObjectiveRewardAggregator

NAMES, PROMPTS, GROUP = ["ocr", "pickscore", "deqa"], 4, 6
IDS = torch.arange(PROMPTS).repeat_interleave(GROUP)


def batch(seed: int = 3, holes: bool = False) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(PROMPTS * GROUP, 3, generator=g, dtype=torch.float64)
    values = values * torch.tensor([0.3, 1.0, 0.4]) + torch.tensor([0.5, 21.5, 4.0])
    values[:GROUP, 1] = 21.0  # a constant group
    if holes:
        values[3, 0] = values[8, 2] = math.nan
        values[13] = math.nan
    return values


def standardized(values: torch.Tensor, epsilon: float = 1e-4) -> list[list[float]]:
    """Each objective in its group, 0 where missing, in plain Python."""
    result = [[0.0] * 3 for _ in values]
    for first in range(0, len(values), GROUP):
        for k in range(3):
            rows = [i for i in range(first, first + GROUP) if not values[i, k].isnan()]
            numbers = [float(values[i, k]) for i in rows]
            for i, number in zip(rows, numbers, strict=True):
                result[i][k] = (number - statistics.mean(numbers)) / (statistics.stdev(numbers) + epsilon)
    return result


def whitened(sums: dict[int, float], size: int, epsilon: float = 1e-4) -> torch.Tensor:
    """Standardized over the rows that have a sum, 0 for the others."""
    mean, spread = statistics.mean(sums.values()), statistics.stdev(sums.values())
    return torch.tensor([(sums[i] - mean) / (spread + epsilon) if i in sums else 0.0 for i in range(size)])


def advantages(rule: str, values: torch.Tensor, weights=(1.0, 1.0, 1.0), **options) -> torch.Tensor:
    return MultiObjectiveRewardAggregator(NAMES, list(weights), rule, options)(values, IDS)[0]


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("agreement", [0.2, 1.0])
def test_gd2po_drops_rows_that_disagree_and_weakens_their_group(holes, agreement):
    values, weights = batch(holes=holes), (1.0, 2.0, 0.5)
    parts = [[w * z for w, z in zip(weights, row, strict=True)] for row in standardized(values)]
    there = [i for i in range(len(values)) if not values[i].isnan().all()]
    kept = []
    for i in there:
        mixed = min(parts[i]) < 0 < max(parts[i])
        if not mixed or abs(sum(parts[i])) / (sum(map(abs, parts[i])) + 1e-8) >= agreement:
            kept.append(i)
    sums = {}
    for i in kept:
        own = [j for j in there if j // GROUP == i // GROUP]
        sums[i] = sum(parts[i]) * sum(j in kept for j in own) / len(own)
    assert 3 < len(kept) < len(there)
    torch.testing.assert_close(
        advantages("gd2po", values, weights, gd2po_agreement=agreement), whitened(sums, len(values)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("holes", [False, True])
def test_saw_weighs_by_the_coefficient_of_variation(holes):
    values = batch(holes=holes)
    columns = [[float(v) for v in values[:, k] if not v.isnan()] for k in range(3)]
    variation = [statistics.stdev(c) / (abs(statistics.mean(c)) + 1e-8) for c in columns]
    weights = [3 * c / sum(variation) for c in variation]
    scores = standardized(values)
    there = [i for i in range(len(values)) if not values[i].isnan().all()]
    sums = {i: sum(w * z for w, z in zip(weights, scores[i], strict=True)) for i in there}
    torch.testing.assert_close(advantages("saw", values), whitened(sums, len(values)), atol=1e-5, rtol=0)
    assert weights[0] > 2 > 0.5 > weights[1]  # PickScore starves, for its mean is large
    assert not torch.allclose(advantages("saw", values), advantages("saw", values + 10.0), atol=1e-2)


def test_ctwa_leaves_nobody_behind_and_changes_nothing_where_nobody_is():
    values = batch(1)
    values[:, 2] = 4.0 - 2.0 * (values[:, 0] - 0.5) - 0.5 * (values[:, 1] - 21.5) + 0.1 * values[:, 2]
    scores = torch.tensor(standardized(values))
    plain = advantages("normalize_then_sum", values, (1.0, 1.0, 0.3)).double()
    cured = advantages("ctwa", values, (1.0, 1.0, 0.3)).double()
    assert (scores.double().T @ plain).min() < -1.0  # deqa would fall
    assert (scores.double().T @ cured).min() > -1e-3
    # Of all weights on a grid for which nobody falls, none is nearer to the plain sum.
    wanted = scores.double() @ torch.tensor([1.0, 1.0, 0.3], dtype=torch.float64)
    used = scores.double()
    solution = torch.linalg.lstsq(used, cured[:, None]).solution[:, 0]
    found = used @ (solution / solution[0])
    grid = torch.cartesian_prod(*[torch.linspace(0.5, 3.0, 26, dtype=torch.float64)] * 3)
    candidates = grid @ used.T
    feasible = candidates[((candidates @ used) >= 0).all(1)]
    assert (found - wanted).norm() <= (feasible - wanted).norm(dim=1).min() + 1e-3
    assert torch.equal(advantages("ctwa", batch()), advantages("normalize_then_sum", batch()))


@pytest.mark.parametrize("rule", ["gd2po", "ctwa", "saw"])
def test_units_do_not_matter(rule):
    factors = torch.tensor([100.0, 0.01, 3.0], dtype=torch.float64)
    shift = torch.tensor([7.0, -20.0, 1.0], dtype=torch.float64) if rule != "saw" else 0.0
    one, two = (advantages(rule, v, std_epsilon=1e-8) for v in (batch(2), batch(2) * factors + shift))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=0)
