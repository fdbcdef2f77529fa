"""Weights from the Gram matrix: what each method promises."""

import pytest
import torch

from trl_apex.aggregation import GRADIENT_RULES, MultiObjectiveRewardAggregator
from trl_apex.aggregation.rules import gramian_weights

EVEN = torch.full((3,), 1 / 3, dtype=torch.float64)


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
