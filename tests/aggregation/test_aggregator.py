"""The aggregator's edge cases, one by one, its state and what it tells the user."""

import json
import math
import warnings

import pytest
import torch

from trl_apex.aggregation import (
    AGGREGATION_OPTIONS,
    GRADIENT_RULES,
    RULES,
    ApexOptions,
    MultiObjectiveRewardAggregator,
)

NAMES = ["ocr", "pickscore", "deqa"]
NAN = math.nan


def groups(count: int = 4, size: int = 6) -> torch.Tensor:
    return torch.arange(count).repeat_interleave(size)


def rewards(seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(24, 3, generator=g) * torch.tensor([0.3, 1.0, 0.4]) + torch.tensor([0.5, 21.5, 4.0])


def make(count: int = 3, rule: str = "apex", weights=None, **options) -> MultiObjectiveRewardAggregator:
    return MultiObjectiveRewardAggregator(NAMES[:count], weights, rule, options)


def run(aggregator, steps: int, change=lambda step, values: values):
    for step in range(steps):
        values = change(step, rewards(step))[:, : len(aggregator.objectives)]
        advantages, metrics = aggregator(values, groups())
    return advantages, metrics


def put(value: float, column: int, rows=slice(None)):
    """For `run`: the batches with `value` in these rows of a column."""

    def change(_step, values):
        values[rows, column] = value
        return values

    return change


def rise(*slopes: float):
    """For `run`: the batches with each objective rising by its slope a step."""
    return lambda step, values: values[:, : len(slopes)] + step * torch.tensor(slopes)


PINNED = [
    # One objective, one live group 0..3: sigma = S = sqrt(1.25), z = d / (S (1 + 1e-4)), rms 1 up to that factor.
    ({}, [[0.0], [1.0], [2.0], [3.0]], [0, 0, 0, 0], [-1.3416, -0.4472, 0.4472, 1.3416]),
    # nu = 0: each group by its own spread. Group 2 has a tenth of group 1's.
    ({"scale_blend": 0.0}, [[0.0], [1.0], [5.0], [5.1]], [1, 1, 2, 2], [-1.0, 1.0, -1.0, 1.0]),
    # nu = inf: both by the pooled spread sqrt((0.25 + 0.0025) / 2) = 0.3553; rms is 1 again.
    ({"scale_blend": math.inf}, [[0.0], [1.0], [5.0], [5.1]], [1, 1, 2, 2], [-1.4072, 1.4072, -0.1407, 0.1407]),
    # In between, nu = 0.5 * 2: sigma = sqrt((2 * 0.25 + 0.12625) / 3) = 0.4569 and sqrt(0.13125 / 3) = 0.2092.
    ({"scale_blend": 0.5}, [[0.0], [1.0], [5.0], [5.1]], [1, 1, 2, 2], [-1.3817, 1.3817, -0.3018, 0.3018]),
    # Two objectives that cancel: |A| is 0, and the floor keeps the noise of the last rows small.
    ({"scale_blend": 0.0}, [[0.0, 1.0], [1.0, 0.0]], [0, 0], [0.0, 0.0]),
    # Floor: z = (-1, 1) and (0, 0) dead; A = z / 2, rms 0.5 > 0.5 * ||w|| = 0.3536.
    ({"scale_blend": 0.0}, [[0.0, 7.0], [1.0, 7.0]], [0, 0], [-1.0, 1.0]),
    # The floor binds: D = 2 ||w|| = 2 instead of rms = 1.
    ({"scale_blend": 0.0, "norm_floor": 2.0}, [[0.0], [1.0]], [0, 0], [-0.5, 0.5]),
    # A missing reward: z = (., -1, 1) and (-1.4142, .7071, .7071). The first row follows the second objective alone,
    # the others both by half: (-1.4142, -.1464, .8536), minus the mean, over the rms .9280.
    ({"scale_blend": 0.0, "norm_floor": 0.0}, [[NAN, 0.0], [0.0, 1.0], [2.0, 1.0]], [0, 0, 0], [-1.2700, 0.0962, 1.1738]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "values", "ids", "expected"), PINNED)
def test_pinned_values(options, values, ids, expected):
    advantages, _ = make(len(values[0]), **options)(torch.tensor(values, dtype=torch.float64), torch.tensor(ids))
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=0, atol=8e-4)


# Edge cases


def test_zero_variance_group_is_zero_and_counted_and_others_still_train_it():
    aggregator = make()
    advantages, metrics = run(aggregator, 1, put(0.5, 0, slice(6)))
    assert (aggregator.normalized[:6, 0] == 0).all()
    assert metrics["live_groups/ocr"] == 0.75 and metrics["live_groups/deqa"] == 1.0
    assert (advantages[:6] != 0).all()


def test_objective_constant_in_the_batch_holds_its_scale_drifts_to_the_floor_and_recovers():
    aggregator = make(warmup_iterations=2, ramp_iterations=2, warn_after=1000)
    run(aggregator, 30)
    scale = aggregator._state.scale[0].item()
    run(aggregator, 40, put(0.5, 0))
    assert aggregator._state.scale[0].item() == scale
    lowest = aggregator.priorities["ocr"]
    assert 0.2 / 3 <= lowest < 0.2
    run(aggregator, 40)
    assert aggregator.priorities["ocr"] > lowest + 0.05


@pytest.mark.parametrize("rule", RULES)
def test_all_dead_gives_no_advantage_and_says_so(rule):
    aggregator = make(rule=rule)
    advantages, metrics = aggregator(torch.ones(24, 3), groups())
    assert (advantages == 0).all() and metrics["all_dead"] == 1.0
    assert aggregator(rewards(), groups())[1]["all_dead"] == 0.0


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_missing_is_masked_and_never_a_bad_score(bad):
    aggregator = make()
    advantages, metrics = run(aggregator, 1, put(bad, 1, 2))
    assert aggregator.normalized[2, 1] == 0
    assert metrics["missing/pickscore"] == pytest.approx(1 / 24)
    mask = torch.ones(24, 3, dtype=torch.bool)
    mask[2, 1] = False
    assert torch.equal(advantages, make()(rewards(), groups(), mask)[0])


def test_mostly_missing_freezes_the_statistics_and_warns_once():
    aggregator, sparse = make(), put(NAN, 2, torch.arange(24) % 3 > 0)
    run(aggregator, 3)
    before = aggregator._state
    with pytest.warns(UserWarning, match="'deqa' has more than 50% of its rewards missing"):
        run(aggregator, 1, sparse)
    run(aggregator, 1, sparse)  # warnings are errors: a second one would fail here
    after = aggregator._state
    assert after.variance.total[2] == before.variance.total[2] and after.fast.total[2] == before.fast.total[2]
    assert after.variance.total[1] != before.variance.total[1]
    assert after.conflict.total[0, 2] == before.conflict.total[0, 2]


def test_prompts_that_an_objective_does_not_apply_to_are_not_missing():
    aggregator = make()
    _, metrics = run(aggregator, 2, put(NAN, 0, slice(6, None)))  # three groups of four ask for no text
    assert aggregator._state.variance.weight[0] > 0
    assert metrics["live_groups/ocr"] == 1.0


def test_group_with_fewer_than_two_valid_rewards_is_dead():
    aggregator = make()
    _, metrics = run(aggregator, 1, put(NAN, 0, slice(1, 6)))
    assert aggregator.normalized[0, 0] == 0 and metrics["live_groups/ocr"] == 0.75


def test_absent_objective_holds_its_state_and_shares_its_weight_out():
    aggregator = make(warmup_iterations=2)
    run(aggregator, 5)
    before = aggregator._state
    _, metrics = run(aggregator, 1, put(NAN, 1))
    after = aggregator._state
    for name in ("variance", "fast", "slow", "error"):
        assert getattr(after, name).value[1] == getattr(before, name).value[1]
    assert after.dead_fraction[1] == before.dead_fraction[1]
    assert metrics["effective_weight/pickscore"] == 0.0 and metrics["live_groups/pickscore"] == 0.0
    assert sum(aggregator.effective_weights.values()) == pytest.approx(1.0)


def test_one_objective_has_all_the_weight():
    aggregator = make(1, warmup_iterations=1)
    _, metrics = run(aggregator, 15)
    assert aggregator.priorities == {"ocr": 1.0}
    assert metrics["conflict_penalty/ocr"] == 0.0 and metrics["hijack_index"] == pytest.approx(1.0)


def test_without_history_it_uses_the_users_weights_and_this_batchs_scale():
    aggregator = make(weights=[2.0, 1.0, 1.0])
    run(aggregator, 1)
    assert aggregator.priorities == {"ocr": 0.5, "pickscore": 0.25, "deqa": 0.25}
    pooled = torch.stack([rewards()[groups() == p].double().var(0, unbiased=False) for p in range(4)]).mean(0).sqrt()
    torch.testing.assert_close(aggregator._state.scale, pooled)


def test_scores_in_units_of_the_initial_spread_count_an_outlier_in_full():
    calm, ids = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]), torch.tensor([0, 0, 1, 1])  # spread 1 in both groups
    broken = torch.tensor([[-60.0], [0.0], [-1.0], [1.0]])
    options = {"warmup_iterations": 2, "scale_blend": math.inf, "z_clip": 12.0}
    scores = {}
    for reference in ("current", "initial"):
        aggregator = make(1, scale_reference=reference, **options)
        aggregator(3 * calm, ids)  # until the warm-up has ended it is the current spread
        torch.testing.assert_close(aggregator.normalized, calm, rtol=2e-4, atol=0)
        aggregator(calm / 3, ids)
        start = aggregator._state.first_scale.item()
        aggregator(broken, ids)
        scores[reference] = aggregator.normalized
    expected = torch.tensor([[-12.0], [12.0], [-1 / start], [1 / start]])  # 30 / start is clipped
    torch.testing.assert_close(scores["initial"], expected, rtol=2e-4, atol=0)
    assert scores["current"].abs().max() < 4, "the outlier widens the scale that it is divided by"


def test_objective_without_spread_at_the_start_takes_its_baseline_at_its_first_live_batch():
    aggregator = make(warmup_iterations=3)
    run(aggregator, 6, put(0.0, 0))
    assert aggregator._state.first_scale[0].isnan() and aggregator._state.first_scale[1] > 0
    run(aggregator, 2)
    assert aggregator._state.first_scale[0] > 0
    assert all(math.isfinite(value) for value in aggregator.priorities.values())


def test_progress_is_measured_from_the_start_that_was_observed():
    aggregator, plain = (make(warmup_iterations=1, ramp_iterations=1) for _ in range(2))
    start = torch.tensor([[0.5, 22.4], [0.7, 22.6], [NAN, 1e30], [0.6, 22.5]], dtype=torch.float64)
    aggregator.observe_start(torch.cat([start, torch.full((4, 1), NAN, dtype=torch.float64)], 1))
    assert aggregator._state.first_mean.tolist() == pytest.approx([0.6, 22.5, NAN], nan_ok=True)
    resumed = make(warmup_iterations=1, ramp_iterations=1)
    resumed.load_state_dict(json.loads(json.dumps(aggregator.state_dict())))
    for each in (aggregator, plain, resumed):
        run(each, 20)
    assert aggregator._state.first_mean.tolist()[:2] == pytest.approx([0.6, 22.5])
    assert aggregator._state.first_mean[2] == plain._state.first_mean[2]  # not observed: taken from the first batch
    assert aggregator.priorities["pickscore"] > plain.priorities["pickscore"] + 0.1  # its mean is 21.5: it fell by one
    assert resumed.priorities == aggregator.priorities


def test_without_a_start_progress_is_measured_from_the_first_batch():
    aggregator = make(2, warmup_iterations=5)
    run(aggregator, 1)
    first = rewards(0)[:, :2].mean(0).double()
    assert aggregator._state.first_mean.tolist() == pytest.approx(first.tolist())
    run(aggregator, 10, rise(1.0, 1.0))
    assert aggregator._state.first_mean.tolist() == pytest.approx(first.tolist())  # not from the end of the warm-up


def test_a_start_that_comes_late_or_has_another_shape_is_refused():
    aggregator = make()
    with pytest.raises(ValueError, match=r"shape \[P, 3\].*Found \[4, 2\]"):
        aggregator.observe_start(torch.zeros(4, 2))
    run(aggregator, 1)
    with pytest.raises(ValueError, match="Found 1 batches seen"):
        aggregator.observe_start(torch.zeros(4, 3))


def test_weight_zero_is_watched_but_not_trained_on():
    aggregator = make(weights=[1.0, 1.0, 0.0], warmup_iterations=1)
    _, metrics = run(aggregator, 20)
    assert aggregator.priorities["deqa"] == 0.0 and metrics["hijack_share/deqa"] == 0.0
    assert metrics["advantage_std/deqa"] > 0.5 and metrics["live_groups/deqa"] == 1.0
    twin, other = make(weights=[1.0, 1.0, 0.0]), rewards(7) * torch.tensor([1.0, 1.0, -5.0])
    assert torch.equal(twin(rewards(7), groups())[0], twin(other, groups())[0])


@pytest.mark.parametrize("rule", RULES)
def test_resumed_run_goes_on_bit_for_bit(rule):
    options = {"warmup_iterations": 2, "ramp_iterations": 3, "warn_after": 500}
    whole, first, second = (make(rule=rule, **options) for _ in range(3))
    gramian = torch.tensor([[2.0, -0.5, 0.1], [-0.5, 1.0, 0.3], [0.1, 0.3, 0.7]])
    for aggregator in (whole, first):
        run(aggregator, 7)
        aggregator.observe_conflict(gramian)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.state_dict() == whole.state_dict()
    for step in range(7, 12):
        assert torch.equal(whole(rewards(step), groups())[0], second(rewards(step), groups())[0])
    assert whole.state_dict() == second.state_dict()


def test_gathered_rewards_give_the_same_state_in_any_rank_order():
    """Another world size means another order of the gathered rows, up to rounding the same result."""
    one, two = make(), make()
    order = torch.cat([torch.arange(24).reshape(4, 6)[p::2].flatten() for p in range(2)])
    for step in range(15):
        one(rewards(step), groups())
        two(rewards(step)[order], groups()[order])
    assert one.priorities == pytest.approx(two.priorities, abs=1e-12)


def test_a_state_that_does_not_fit_is_refused_by_name():
    state = make().state_dict()
    for names in (["ocr", "pickscore"], ["pickscore", "ocr", "deqa"]):
        with pytest.raises(ValueError, match="must be for the objectives"):
            MultiObjectiveRewardAggregator(names).load_state_dict(state)
    with pytest.raises(ValueError, match="must be for the rule 'mgda'"):
        make(rule="mgda").load_state_dict(state)
    for name in ("objectives", "rule", "priorities", "owned"):
        cut = {key: value for key, value in state.items() if key != name}
        with pytest.raises(ValueError, match=f"saved state must (be for|hold).*{name}"):
            make().load_state_dict(cut)
    for name, value in (("variance", {"total": [1.0]}), ("priorities", [0.5]), ("iteration", "many"), ("margin", {})):
        with pytest.raises(ValueError, match=f"`{name}` of the saved state must hold"):
            make().load_state_dict({**state, name: value})


def test_a_state_of_0_1_0_is_read():
    whole, resumed = (make(weights=[2.0, 1.0, 1.0]) for _ in range(2))
    run(whole, 15)
    old = {k: v for k, v in whole.state_dict().items() if k not in ("weights", "effective", "measured", "absent")}
    resumed.load_state_dict(old)
    assert torch.equal(whole(rewards(15), groups())[0], resumed(rewards(15), groups())[0])
    assert whole.state_dict() == resumed.state_dict()


def test_what_was_measured_and_the_last_weights_survive_a_resume():
    first, second = make(), make()
    run(first, 1, put(NAN, 1))
    first.observe_conflict(torch.eye(3) - 0.25)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.effective_weights == first.effective_weights == {"ocr": 0.5, "pickscore": 0.0, "deqa": 0.5}
    assert second(rewards(1), groups())[1]["gradient_conflict/ocr/deqa"] == pytest.approx(-1 / 3)


# Weights that the user changes


def test_changed_weights_count_from_the_next_batch_on():
    aggregator, alone = make(rule="sum_then_normalize"), make(rule="sum_then_normalize", weights=[1.0, 0.0, 0.0])
    aggregator.weights = [1.0, 0.0, 0.0]
    assert torch.equal(aggregator(rewards(), groups())[0], alone(rewards(), groups())[0])
    with pytest.raises(ValueError, match="must have one number per objective"):
        aggregator.weights = [1.0]


@pytest.mark.parametrize("rule", GRADIENT_RULES)
def test_changed_weights_drop_what_was_solved_with_the_old_ones(rule):
    aggregator = make(rule=rule)
    aggregator.observe_conflict(torch.eye(3))
    run(aggregator, 1)
    aggregator.weights = [1.0, 3.0, 0.0]
    assert list(aggregator.priorities.values()) == pytest.approx([0.25, 0.75, 0.0])
    run(aggregator, 1)
    assert list(aggregator.priorities.values()) == pytest.approx([0.25, 0.75, 0.0])


def test_priorities_of_an_earlier_run_end_where_they_are_switched_off():
    adaptive, fixed = make(warmup_iterations=1, ramp_iterations=1), make(adaptive_priorities=False)
    run(adaptive, 12, rise(0.0, 0.1, 0.0))
    assert adaptive.priorities["pickscore"] < 0.2
    fixed.load_state_dict(adaptive.state_dict())
    assert list(fixed.priorities.values()) == pytest.approx([1 / 3] * 3)


def test_annealed_weights_scale_the_priorities_and_keep_the_floor():
    options = {"warmup_iterations": 2, "ramp_iterations": 1}
    aggregator, resumed = make(**options), make(**options)
    aggregator.weights = [8.0, 1.0, 1.0]
    assert list(aggregator.priorities.values()) == pytest.approx([0.8, 0.1, 0.1])  # the user's, in the warm-up
    run(aggregator, 12, rise(0.0, 0.1, 0.0))
    before = aggregator.priorities
    for weights in ([1.0, 1.0, 8.0], [0.0, 1.0, 1.0], [1.0, 98.0, 1.0]):
        aggregator.weights = weights
        after = aggregator.priorities
        assert sum(after.values()) == pytest.approx(1.0)
        assert all(after[name] >= 0.2 * w / sum(weights) - 1e-12 for name, w in zip(NAMES, weights, strict=True))
    aggregator.weights = [8.0, 1.0, 1.0]
    assert aggregator.priorities == pytest.approx(before)  # nothing was seen in between, so nothing was learned
    aggregator.weights = [4.0, 5.0, 1.0]
    resumed.load_state_dict(aggregator.state_dict())
    resumed.weights = [4.0, 5.0, 1.0]
    assert resumed.priorities == pytest.approx(aggregator.priorities)


def test_evaluation_leaves_no_trace():
    aggregator = make()
    run(aggregator, 3)
    before, scores = aggregator.state_dict(), aggregator.normalized
    aggregator(rewards(99), groups(), update=False)
    assert aggregator.state_dict() == before and aggregator.normalized is scores


# Priorities do what they are for


@pytest.mark.parametrize("combination", ["additive", "multiplicative"])
def test_the_lagging_objective_gains_priority(combination):
    aggregator = make(warmup_iterations=3, ramp_iterations=3, combination=combination)
    _, metrics = run(aggregator, 25, rise(0.0, 0.2, 0.08))
    assert aggregator.priorities["ocr"] > 1.3 / 3
    assert metrics["need/ocr"] > metrics["need/pickscore"]


def test_a_rank_in_the_group_cannot_lag():
    options, noise = {"warmup_iterations": 2, "ramp_iterations": 1}, torch.Generator().manual_seed(0)
    aggregator = MultiObjectiveRewardAggregator(["rank", "ocr"], options=options)
    for step in range(60):
        values = torch.randn(8, 8, generator=noise, dtype=torch.float64)
        ranks = values.argsort(1).argsort(1) / 7
        rising = 0.2 * torch.randn(64, generator=noise, dtype=torch.float64) + 0.01 * step
        _, metrics = aggregator(torch.stack([ranks.flatten(), rising], 1), torch.arange(64) // 8)
    assert [metrics[name] for name in ("need/rank", "need/ocr", "potential/rank")] == pytest.approx([0.5] * 3)
    assert aggregator.priorities["rank"] > 0.35  # only the other's learning potential is ahead


def test_an_objective_that_was_never_scored_has_no_more_potential_than_any():
    values = rewards()
    values[:, 1] = torch.nan
    _, metrics = make()(values, groups())
    assert metrics["potential/pickscore"] == 0.5


def test_targets_end_the_need():
    aggregator = make(warmup_iterations=2, need_mode="target", reward_targets=[0.5, 25.0, NAN])
    met = torch.tensor([0.2, 0.0, 0.0])
    _, metrics = run(aggregator, 25, lambda step, values: values + (met if step > 3 else -met))
    assert metrics["need/ocr"] < 0.1 and metrics["need/pickscore"] > 0.9
    assert 0.5 < metrics["need/deqa"] < 1.0  # no target: behind the mean, because ocr rose


@pytest.mark.parametrize(("attribution", "payer"), [("lag", "pickscore"), ("plain", "both"), ("victim", "pickscore")])
def test_who_pays_for_a_conflict(attribution, payer):
    def opposed(step, values):
        values[:, 0] = 0.5 - 0.3 * (values[:, 1] - 21.5)
        values[:, 1] += 0.3 * step  # pickscore is ahead
        return values

    _, metrics = run(make(2, warmup_iterations=2, conflict_attribution=attribution, warn_after=1000), 30, opposed)
    ahead, behind = metrics["conflict_penalty/pickscore"], metrics["conflict_penalty/ocr"]
    assert metrics["conflict/ocr/pickscore"] < -0.99
    assert ahead > 0.5
    assert behind == pytest.approx(ahead) if payer == "both" else behind < 0.2


def test_a_weak_correlation_is_no_conflict():
    _, metrics = run(make(), 5)
    assert min(value for key, value in metrics.items() if key.startswith("conflict/")) < 0
    assert all(metrics[f"conflict_penalty/{name}"] == 0 for name in NAMES)


def test_measured_conflict_drives_the_penalty_when_asked_to():
    measured = torch.tensor([[1.0, -0.8, 0.0], [-0.8, 1.0, NAN], [0.0, NAN, 1.0]])
    by_scores = make(conflict_attribution="plain")
    by_gradient = make(conflict_attribution="plain", conflict_source="gradient")
    for aggregator in (by_gradient, by_scores):
        aggregator.observe_conflict(measured, samples=10_000)
        _, metrics = run(aggregator, 1)
        assert metrics["gradient_conflict/ocr/pickscore"] == pytest.approx(-0.8)
        assert "gradient_conflict/pickscore/deqa" not in metrics
    baseline = make(rule="dvao", conflict_source="gradient")
    baseline.observe_conflict(measured, samples=10_000)
    assert "conflict/ocr/pickscore" not in baseline(torch.ones(24, 3), groups())[1]  # this key is of the scores
    assert by_gradient._state.conflict.value[0, 1] == pytest.approx(-0.8)
    assert by_gradient(rewards(), groups())[1]["conflict_penalty/ocr"] > 0.3
    assert by_scores(rewards(), groups())[1]["conflict_penalty/ocr"] == 0.0


def test_an_uncertain_measurement_does_not_count():
    aggregator = make(2, conflict_source="population", conflict_attribution="plain")
    measured = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
    for error, expected in ((0.3, 0.0), (0.1, (0.5 - 0.2) / 0.8)):
        aggregator.observe_conflict(measured, standard_error=torch.full((2, 2), error))
        _, metrics = aggregator(rewards()[:, :2], groups())
        assert metrics["conflict_penalty/ocr"] == pytest.approx(expected, abs=1e-6)


def test_priorities_start_after_the_warm_up_and_fade_in():
    aggregator = make(2, warmup_iterations=5, ramp_iterations=5, priority_ema=0.0)
    seen = []
    for step in range(15):
        aggregator(rise(0.0, 1.0)(step, rewards(step)), groups())
        seen.append(aggregator.priorities["ocr"])
    assert seen[:5] == [0.5] * 5
    assert 0.5 < seen[6] < seen[8] < seen[9]


def test_the_floor_holds_however_far_an_objective_is_ahead():
    aggregator = make(2, warmup_iterations=2, ramp_iterations=1, priority_ema=0.0, priority_temperature=0.01)
    run(aggregator, 10, rise(0.0, 1.0))
    assert aggregator.priorities["pickscore"] == pytest.approx(0.2 * 0.5, abs=1e-6)


# Hijacking, and what the user is warned about


def test_normalizing_first_ends_hijacking():
    rules = ("sum_then_normalize", "dvao", "normalize_then_sum", "apex")
    shares = [run(make(rule=rule), 1)[1]["hijack_share/pickscore"] for rule in rules]
    assert min(shares[:2]) > 0.6 and max(shares[2:]) < 0.5  # a third was intended


def louder(_step, values):
    values[:, 1] = 21.5 + 3 * (values[:, 1] - 21.5)
    return values


@pytest.mark.parametrize(
    ("count", "rule", "change", "after", "message"),
    [
        (
            3,
            "sum_then_normalize",
            louder,
            20,
            "'pickscore' has owned more than 70% of the advantage's variance for 20",
        ),
        (3, "apex", put(0.0, 0), 20, "'ocr' has scored all samples of every group alike for 20 iterations"),
        (2, "apex", put(NAN, 0), 5, "'ocr' has had no reward at all for 5 iterations"),  # 'pickscore' is not blamed
    ],
)
def test_a_hijacked_dead_or_absent_objective_is_warned_about_once(count, rule, change, after, message):
    aggregator = make(count, rule)
    run(aggregator, after - 1, change)
    with pytest.warns(UserWarning, match=message):
        run(aggregator, 1, change)
    run(aggregator, 25, change)  # warnings are errors: a second one would fail here


def test_an_objective_that_is_favoured_in_vain_is_named():
    options = {"need_coef": 4.0, "warmup_iterations": 2, "ramp_iterations": 1, "priority_ema": 0.0, "warn_after": 4}
    aggregator = make(2, **options)
    run(aggregator, 15, rise(0.0, 1.0))
    assert aggregator.priorities["ocr"] > 0.75
    with pytest.warns(
        UserWarning, match="'ocr' has had more than 1.5 times its weight for 20 iterations.*`need_coef`"
    ):
        run(aggregator, 15, rise(0.0, 1.0))
    run(make(2, **options), 40, rise(0.05, 1.0))  # this one lags as much, but gains
    run(make(2, "normalize_then_sum", warn_after=4), 40, rise(0.0, 1.0))


def test_no_warning_where_the_user_wanted_it_so():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(make(weights=[10.0, 1.0, 1.0]), 22)
        run(make(1), 22)


def test_only_the_rule_that_clips_counts_clipped_advantages():
    values, one_group = torch.zeros(64, 1), torch.zeros(64, dtype=torch.int64)
    values[0] = 1.0
    assert make(1)(values, one_group)[1]["advantage_clipped"] == 1 / 64
    advantages, metrics = make(1, "sum_then_normalize")(values, one_group)
    assert advantages.max() > 5 and metrics["advantage_clipped"] == 0.0


# What it accepts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((rewards()[:, :2], groups()), r"shape \[B, K\] with K = 3 \('ocr', 'pickscore', 'deqa'\). Found \[24, 2\]"),
        ((rewards(), groups()[:23]), r"`group_ids` must be integers of shape \[24\]"),
        ((rewards(), groups().float()), "`group_ids` must be integers"),
        ((rewards(), groups(), torch.ones(24, 2, dtype=torch.bool)), "`mask` must have the shape"),
    ],
)
def test_a_batch_that_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        make()(*arguments)
    with pytest.raises(ValueError, match=r"`matrix` must have shape \[3, 3\]"):
        make().observe_conflict(torch.eye(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "magic"}, "`rule` must be one of apex"),
        ({"objectives": ["ocr", "ocr"]}, "distinct names"),
        ({"weights": [1.0]}, "one number per objective"),
        (
            {"weights": [1.0, -1.0, 1.0]},
            "reward_weights.*must not be negative.*sum_then_normalize, normalize_then_sum",
        ),
        ({"weights": [0.0, 0.0, 0.0]}, "not all zero"),
        ({"options": {"tau": 1.0}}, "Options must be fields of ApexOptions. Found tau"),
        ({"options": {"scale_blend": -1.0}}, "`scale_blend` must lie in"),
        ({"options": {"priority_ema": 1.0}}, "must be below 1"),
        ({"options": {"adaptive_priorities": "no"}}, "must be True or False"),
        ({"options": {"warmup_iterations": 2.5}}, "whole number"),
        ({"options": {"reward_targets": "high"}}, "list of numbers"),
        ({"options": {"z_clip": 0.0}}, "pass inf"),
        ({"options": {"need_mode": "absolute"}}, "`need_mode` must be one of"),
        ({"options": {"need_mode": "target"}}, "`reward_targets` must be given"),
        ({"options": {"need_mode": "target", "reward_targets": [1.0]}}, "`reward_targets` must have one number"),
        ({"options": {"conflict_attribution": "nobody"}}, "'lag', 'victim', 'plain'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiObjectiveRewardAggregator(**{"objectives": NAMES, **arguments})


def test_options_are_an_object_or_a_dictionary():
    with pytest.raises(ValueError, match=r"must be an ApexOptions or a dictionary of its fields. Found \[0.5\]"):
        ApexOptions.read([0.5])
    assert ApexOptions.read({"scale_blend": 0.5}) == ApexOptions(scale_blend=0.5)
    one = MultiObjectiveRewardAggregator(NAMES, options=ApexOptions(warmup_iterations=3))
    with pytest.warns(FutureWarning, match=r"Pass options=ApexOptions\(warmup_iterations=...\)"):
        two = MultiObjectiveRewardAggregator(NAMES, warmup_iterations=3)  # as in 0.1.0
    assert one.options == two.options
    with pytest.raises(ValueError, match="in one place"):
        MultiObjectiveRewardAggregator(NAMES, options={"need_coef": 2.0}, warmup_iterations=3)
    for name in AGGREGATION_OPTIONS:
        assert f"{name} (" in MultiObjectiveRewardAggregator.__doc__ and f"{name} (" in ApexOptions.__doc__


def test_negative_weights_are_fine_where_trl_has_them():
    aggregator = make(2, "sum_then_normalize", [1.0, -1.0], scale_rewards=False)
    advantages, _ = aggregator(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    assert advantages.tolist() == [1.0, -1.0]


def test_every_option_is_described_and_plain():
    assert set(AGGREGATION_OPTIONS) == set(ApexOptions.__dataclass_fields__)
    for name, (default, doc) in AGGREGATION_OPTIONS.items():
        assert getattr(ApexOptions(), name) == default
        assert len(doc) > 20 and "%" not in doc
        assert default is None or isinstance(default, bool | int | float | str)


def test_log_keys_and_dtypes():
    aggregator = make()
    advantages, metrics = aggregator(rewards().to(torch.bfloat16), groups().to(torch.int32))
    assert advantages.dtype == torch.float32 and advantages.shape == (24,)
    assert aggregator.normalized.shape == (24, 3)
    of_each = (
        "priority effective_weight potential need conflict_penalty hijack_share advantage_std live_groups missing"
    )
    keys = {f"{key}/{name}" for key in of_each.split() for name in NAMES}
    keys |= {f"conflict/{pair}" for pair in ("ocr/pickscore", "ocr/deqa", "pickscore/deqa")}
    assert metrics.keys() == keys | {"hijack_index", "advantage_rms", "advantage_clipped", "all_dead"}
    assert all(isinstance(value, float) for value in metrics.values())
