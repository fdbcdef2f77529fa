"""What must hold for any number of objectives, group sizes, masks and scales."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_apex.aggregation import RULES, MultiObjectiveRewardAggregator
from trl_apex.aggregation.normalize import adaptive_normalize, group_moments, group_rows, pooled_variance

pytestmark = pytest.mark.filterwarnings("ignore:The objective .* has")  # much is missing here
fast = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
CLOSED_FORM = [rule for rule in RULES if rule not in ("upgrad", "cagrad")]  # the others call a solver


@dataclass
class Batch:
    rewards: torch.Tensor
    groups: torch.Tensor
    weights: list[float]

    @property
    def names(self) -> list[str]:
        return [f"objective{k}" for k in range(self.rewards.shape[1])]

    def aggregator(self, rule: str = "apex", **options) -> MultiObjectiveRewardAggregator:
        return MultiObjectiveRewardAggregator(self.names, self.weights, rule, options)


@st.composite
def batches(draw, missing: bool = True, equal: bool = False, objectives: tuple[int, int] = (1, 6)) -> Batch:
    count = draw(st.integers(*objectives))
    size = draw(st.integers(2, 8))
    sizes = [size] * draw(st.integers(2, 6)) if equal else draw(st.lists(st.integers(1, 8), min_size=1, max_size=6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    rows = sum(sizes)
    scale = 10.0 ** draw(st.integers(-3, 3))
    rewards = torch.randn(rows, count, generator=g, dtype=torch.float64) * scale
    rewards += scale * draw(st.integers(-20, 20))
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) * 3 - 1
    if not equal:
        groups = groups[torch.randperm(rows, generator=g)]
    for kind in draw(st.lists(st.sampled_from(["constant", "nearly"]), max_size=2)):
        column = draw(st.integers(0, count - 1))
        rewards[groups == groups[0], column] = 1.5 * scale
        if kind == "nearly":
            rewards[0, column] += 1e-3 * scale
    if missing:
        holes = torch.rand(rows, count, generator=g) < draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
        rewards[holes] = math.nan
    weights = [draw(st.sampled_from([0.0, 0.1, 1.0, 3.0])) for _ in range(count)]
    weights[draw(st.integers(0, count - 1))] = 1.0
    return Batch(rewards, groups, weights)


@pytest.mark.parametrize("rule", CLOSED_FORM)
@given(batches())
@fast
def test_finite_for_any_mask(rule, batch):
    aggregator = batch.aggregator(rule, warmup_iterations=1)
    for _ in range(3):
        advantages, metrics = aggregator(batch.rewards, batch.groups)
        assert advantages.isfinite().all() and advantages.dtype == torch.float32
        assert all(math.isfinite(value) for value in metrics.values())
        assert sum(aggregator.priorities.values()) == pytest.approx(1.0, abs=1e-9)
    assert (advantages[batch.rewards.isnan().all(1)] == 0).all()


@given(st.data(), st.sampled_from([0.0, 0.2, 0.9, 1.0]))
@fast
def test_priorities_are_a_distribution_above_the_floor(data, floor):
    first = data.draw(batches())
    aggregator = first.aggregator(priority_floor=floor, warmup_iterations=1, ramp_iterations=1, priority_ema=0.0)
    omega = torch.tensor(first.weights) / sum(first.weights)
    g = torch.Generator().manual_seed(0)
    for step in range(6):
        noise = torch.randn(first.rewards.shape, generator=g, dtype=torch.float64)
        aggregator(first.rewards + step * noise, first.groups)
        weights = torch.tensor(list(aggregator.priorities.values()))
        assert weights.sum() == pytest.approx(1.0, abs=1e-6)
        assert (weights >= floor * omega - 1e-7).all()
        assert (weights[omega == 0] == 0).all()


@given(batches(), st.integers(-3, 3), st.floats(-50.0, 50.0))
@fast
def test_scores_do_not_change_under_a_positive_affine_map(batch, exponent, shift):
    mask, groups = batch.rewards.isfinite(), group_rows(batch.groups)
    factor = 10.0**exponent
    size = float(batch.rewards.nan_to_num().abs().max()) or 1.0
    scores = []
    for rewards in (batch.rewards, factor * (batch.rewards + shift * size)):
        moments = group_moments(rewards, mask, groups, tolerance=1e-11)
        scores.append(adaptive_normalize(moments, groups, pooled_variance(moments).sqrt().nan_to_num()))
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", [rule for rule in CLOSED_FORM if rule != "pcgrad"])
@given(batches(objectives=(2, 5)), st.integers(0, 1000))
@fast
def test_permuting_the_objectives_permutes_everything(rule, batch, seed):
    order = torch.randperm(len(batch.names), generator=torch.Generator().manual_seed(seed)).tolist()
    names, weights = ([values[k] for k in order] for values in (batch.names, batch.weights))
    first = batch.aggregator(rule, warmup_iterations=1)
    second = MultiObjectiveRewardAggregator(names, weights, rule, {"warmup_iterations": 1})
    for step in range(3):
        rewards = batch.rewards * (1 + step)
        one, one_metrics = first(rewards, batch.groups)
        two, two_metrics = second(rewards[:, order], batch.groups)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    for name in batch.names:
        assert first.priorities[name] == pytest.approx(second.priorities[name], abs=1e-6)
        if rule != "ctwa":  # its weights are not unique where objectives are linearly dependent; its advantages are
            assert one_metrics[f"advantage_std/{name}"] == pytest.approx(
                two_metrics[f"advantage_std/{name}"], rel=1e-6
            )


@given(batches())
@fast
def test_groups_have_zero_mean_before_the_last_clip(batch):
    advantages, _ = batch.aggregator(advantage_clip=math.inf)(batch.rewards, batch.groups)
    for group in batch.groups.unique():
        assert abs(float(advantages[batch.groups == group].double().mean())) < 1e-5


@given(batches(), st.integers(0, 1000))
@fast
def test_the_order_of_the_rows_does_not_matter(batch, seed):
    order = torch.randperm(len(batch.rewards), generator=torch.Generator().manual_seed(seed))
    one, _ = batch.aggregator()(batch.rewards, batch.groups)
    two, _ = batch.aggregator()(batch.rewards[order], batch.groups[order])
    torch.testing.assert_close(one[order], two, rtol=1e-5, atol=1e-6)


OFF = {"scale_blend": 0.0, "norm_floor": 0.0, "z_clip": math.inf, "advantage_clip": math.inf}


@given(batches(missing=False, equal=True))
@fast
def test_with_everything_off_it_is_gdpo_up_to_the_bessel_factor(batch):
    rows = len(batch.groups)
    batch.weights = [1.0] * len(batch.names)
    ours, _ = batch.aggregator(adaptive_priorities=False, **OFF)(batch.rewards, batch.groups)
    theirs, _ = batch.aggregator("normalize_then_sum", std_epsilon=0.0)(batch.rewards, batch.groups)
    spreads = torch.stack([batch.rewards[batch.groups == group].std(0) for group in batch.groups.unique()])
    if spreads.min() > 1e-2 * batch.rewards.abs().max():  # a constant is 0/0 for GDPO without its epsilon
        torch.testing.assert_close(ours, theirs * math.sqrt(rows / (rows - 1)), rtol=1e-3, atol=2e-3)


@given(batches(missing=False, equal=True, objectives=(1, 1)))
@fast
def test_one_objective_without_blend_and_clips_is_grpo(batch):
    aggregator = batch.aggregator(**OFF)
    ours, metrics = aggregator(batch.rewards, batch.groups)
    grouped = torch.stack([batch.rewards[batch.groups == group, 0] for group in batch.groups.unique()])
    spread = grouped.std(1, unbiased=False, keepdim=True)
    if bool((spread > 1e-2 * batch.rewards.abs().max()).all()):
        expected = ((grouped - grouped.mean(1, keepdim=True)) / spread).flatten()
        torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-3)
        assert metrics["conflict_penalty/objective0"] == 0.0
    assert aggregator.priorities == {"objective0": 1.0}


@given(batches())
@fast
def test_hijack_shares_sum_to_one(batch):
    _, metrics = batch.aggregator()(batch.rewards, batch.groups)
    total = sum(metrics[f"hijack_share/{name}"] for name in batch.names)
    assert total == pytest.approx(0.0 if metrics["all_dead"] else 1.0, abs=1e-6)
