"""Rules against straight-line computations, and what each promises; weights from the gradients' Gram matrix."""

import math
import statistics

import pytest
import torch

from trl_apex.aggregation import GRADIENT_RULES, MultiObjectiveRewardAggregator
from trl_apex.aggregation.rules import gramian_weights

NAMES, PROMPTS, GROUP = ["ocr", "pickscore", "deqa"], 4, 6
IDS = torch.arange(PROMPTS).repeat_interleave(GROUP)
EVEN = torch.full((3,), 1 / 3, dtype=torch.float64)


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


def test_weighted_advantages_and_dvao_in_numbers():
    values, ids = torch.tensor([[1.0, 10.0], [3.0, 40.0], [7.0, 20.0], [7.0, 20.0]]), torch.tensor([0, 0, 1, 1])
    pairs = [
        ("weighted_advantages", {}, 0.5**0.5 * 1.5),  # (1, 15) over std (2^0.5, 30 / 2^0.5), weights 1 and 0.5
        ("weighted_advantages", {"scale_rewards": "none"}, 1.0 + 0.5 * 15.0),
        ("weighted_advantages", {"scale_rewards": "batch"}, 1 / 9**0.5 + 0.5 * 15 / (475 / 3) ** 0.5),
        ("dvao", {}, (1.0 + 0.5 * 15.0) / (2**0.5 + 0.5 * 30 / 2**0.5)),
    ]
    for rule, options, upper in pairs:
        options = {"std_epsilon": 0.0, **options}
        found, _ = MultiObjectiveRewardAggregator(["a", "b"], [1.0, 0.5], rule, options)(values, ids)
        torch.testing.assert_close(found, torch.tensor([-upper, upper, 0.0, 0.0]), atol=1e-5, rtol=0)


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


# Weights from the Gram matrix


def gradients(seed: int = 0, size: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 8, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("rule", GRADIENT_RULES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_weights_are_a_distribution_at_any_gradient_scale(rule, scale):
    j = gradients() * scale
    weights = gramian_weights(rule, j @ j.T, EVEN)
    assert weights.sum() == pytest.approx(1.0) and (weights >= -1e-9).all()
    reference = gradients()
    torch.testing.assert_close(weights, gramian_weights(rule, reference @ reference.T, EVEN), atol=1e-6, rtol=0)


def test_mgda_finds_the_shortest_combination_of_unit_gradients():
    j = torch.tensor([[1.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    weights = gramian_weights("mgda", j @ j.T, EVEN[:2] * 1.5)
    direction = weights @ j
    assert direction[0] == pytest.approx(direction[1].item(), rel=1e-3)


def test_upgrad_and_mgda_harm_nobody():
    for seed in range(5):
        j = gradients(seed)
        j[1] = -0.9 * j[0] + 0.3 * j[1]
        for rule in ("upgrad", "mgda"):
            direction = gramian_weights(rule, j @ j.T, EVEN) @ j
            assert (j @ direction).min() > -1e-3 * direction.norm() * j.norm(dim=1).max()


def test_pcgrad_and_cagrad_reduce_the_harm_of_the_mean():
    j = torch.tensor([[1.0, 0.2], [-0.9, 0.4]], dtype=torch.float64) * torch.tensor([[3.0], [1.0]])
    mean = (j @ j.mean(0)).min()
    for rule in ("pcgrad", "cagrad"):
        assert (j @ (gramian_weights(rule, j @ j.T, EVEN[:2] * 1.5) @ j)).min() > mean


def test_pcgrad_is_the_same_on_all_ranks_and_leaves_the_random_state_alone():
    j = gradients(3) - gradients(4)
    j[2] = -j[0] - j[1]
    state = torch.random.get_rng_state()
    one, two = (gramian_weights("pcgrad", j @ j.T, EVEN, seed=5) for _ in range(2))
    assert torch.equal(one, two) and torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_objectives_without_gradient_or_weight_take_no_part(rule):
    j = gradients()
    j[1] = 0
    weights = gramian_weights(rule, j @ j.T, EVEN)
    assert weights[1] == 0 and weights.sum() == pytest.approx(1.0)
    assert gramian_weights(rule, gradients() @ gradients().T, torch.tensor([0.5, 0.0, 0.5]).double())[1] == 0
    assert torch.equal(gramian_weights(rule, torch.zeros(3, 3, dtype=torch.float64), EVEN), EVEN)


@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_the_aggregator_follows_the_observed_gramian_with_memory(rule):
    aggregator = MultiObjectiveRewardAggregator(["a", "b"], rule=rule, options={"gradient_ema": 0.5})
    g = torch.Generator().manual_seed(0)
    rewards, groups = torch.randn(24, 2, generator=g), torch.arange(4).repeat_interleave(6)
    before, _ = aggregator(rewards, groups)
    j = torch.tensor([[1.0, 0.0], [-0.5, 0.2]])
    aggregator.observe_conflict(j @ j.T)
    first = aggregator.priorities["a"]
    after, metrics = aggregator(rewards, groups)
    assert not torch.allclose(before, after) and metrics["priority/a"] == pytest.approx(first)
    aggregator.observe_conflict(torch.eye(2))
    alone = MultiObjectiveRewardAggregator(["a", "b"], rule=rule)
    alone.observe_conflict(torch.eye(2))
    # Bias-corrected moving average: (0.5 old + 1 new) / 1.5.
    assert aggregator.priorities["a"] == pytest.approx((first + 2 * alone.priorities["a"]) / 3, abs=1e-6)


def test_without_torchjd_the_user_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchjd", None)
    with pytest.raises(ImportError, match=r'pip install "trl_apex\[gradient\]"'):
        gramian_weights("mgda", torch.eye(3, dtype=torch.float64), EVEN)
