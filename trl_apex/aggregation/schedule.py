"""One batch through the aggregator's memory: statistics in, next priorities out. Pure: a state in, a new state out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .conflict import conflict_penalty, opposition
from .normalize import GroupMoments, pooled_variance
from .options import ApexOptions
from .potential import learning_potential, trend_noise
from .priority import next_priorities, priority_scores, ramp
from .progress import relative_need, target_need
from .state import AggregatorState


@dataclass(frozen=True)
class Presence:
    """Which objectives a batch informs about.

    Args:
        absent (`Tensor` of shape `[K]`): no valid reward at all.
        sparse (`Tensor` of shape `[K]`): too many rewards missing in the groups that have the objective.
    """

    absent: Bool[Tensor, " K"]
    sparse: Bool[Tensor, " K"]

    @property
    def held(self) -> Bool[Tensor, " K"]:
        """Objectives whose statistics are held."""
        return self.absent | self.sparse


def presence(moments: GroupMoments, sizes: Float[Tensor, " P"], max_missing: float) -> Presence:
    """Find the objectives that are absent, or present in too few rows to trust.

    A group without a single reward of an objective is a prompt that the objective does not apply to, so it is not
    counted as missing.

    Args:
        moments ([`GroupMoments`]): the groups' statistics.
        sizes (`Tensor` of shape `[P]`): rows in each group.
        max_missing (`float`): share of missing rewards above which an objective is sparse.

    Returns:
        [`Presence`]
    """
    has = moments.count > 0
    applicable = (has * sizes[:, None]).sum(0)
    missing = 1 - moments.count.sum(0) / applicable.clamp(min=1.0)
    absent = ~has.any(0)
    return Presence(absent, ~absent & (missing > max_missing))


def observe_batch(
    state: AggregatorState, moments: GroupMoments, held: Bool[Tensor, " K"], options: ApexOptions
) -> AggregatorState:
    """Advance the moving averages of scale and mean reward by one batch.

    Args:
        state ([`AggregatorState`]): before the batch.
        moments ([`GroupMoments`]): the batch's statistics.
        held (`Tensor` of shape `[K]`): objectives that this batch says nothing reliable about.
        options ([`ApexOptions`]): the decays and the length of the warm-up.

    Returns:
        [`AggregatorState`]: with the baselines taken at the end of the warm-up, or as soon after as they exist.
    """
    has = moments.count > 0
    groups = has.sum(0)
    mean = torch.where(has, moments.mean, 0.0).sum(0) / groups
    between = torch.where(has, (moments.mean - mean) ** 2, 0.0).sum(0) / groups
    alone = torch.where(has, moments.variance / moments.count.clamp(min=1.0), 0.0).sum(0)
    error = torch.where(groups > 1, between / groups, alone).sqrt()
    dead = (moments.dead & has).sum(0) / groups

    def unless_held(values: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        return torch.where(held, torch.nan, values)

    state = replace(
        state,
        iteration=state.iteration + 1,
        variance=state.variance.update(unless_held(pooled_variance(moments)), options.scale_ema),
        fast=state.fast.update(unless_held(mean), options.fast_ema),
        slow=state.slow.update(unless_held(mean), options.slow_ema),
        error=state.error.update(unless_held(error), options.slow_ema),
        dead_fraction=torch.where(held, state.dead_fraction, dead),
    )
    if state.iteration < options.warmup_iterations:
        return state
    start = state.first_scale.isnan() & (state.scale > 0) & state.fast.value.isfinite()
    return replace(
        state,
        first_mean=torch.where(start, state.fast.value, state.first_mean),
        first_scale=torch.where(start, state.scale, state.first_scale),
        largest_scale=torch.where(start, state.scale, torch.maximum(state.largest_scale, state.scale)),
    )


@dataclass(frozen=True)
class Terms:
    """The three terms behind the priorities, each of shape `[K]`."""

    potential: Float[Tensor, " K"]
    penalty: Float[Tensor, " K"]
    need: Float[Tensor, " K"]


def reprioritize(
    state: AggregatorState, weights: Float[Tensor, " K"], options: ApexOptions
) -> tuple[AggregatorState, Terms]:
    """The priorities of the next batch, from everything seen so far.

    Args:
        state ([`AggregatorState`]): after the batch's statistics went in.
        weights (`Tensor` of shape `[K]`): the user's, summing to one.
        options ([`ApexOptions`]): coefficients, modes, temperature, floor and schedule.

    Returns:
        `tuple` of the [`AggregatorState`] with new priorities and the [`Terms`] behind them.
    """
    weighted = weights > 0
    mean = state.fast.value
    unit = state.largest_scale if options.need_scale == "largest" else state.first_scale
    need = relative_need(mean, state.first_mean, unit, weighted, options.need_temperature)
    if options.need_mode == "target":
        targets = torch.tensor(options.reward_targets, dtype=mean.dtype)
        wanted = target_need(mean, state.first_mean, state.first_scale, targets, options.need_cap)
        need = torch.where(wanted.isnan(), need, wanted)
    strength = opposition(state.conflict.value, state.margin)
    penalty = conflict_penalty(strength, need, weighted, options.conflict_attribution)
    noise = trend_noise(state.error.value, options.fast_ema, options.slow_ema)
    gap = mean - state.slow.value
    potential = learning_potential(state.scale, state.first_scale, gap, noise, state.dead_fraction)
    alive_need = need * (1 - state.dead_fraction)
    terms = Terms(potential, penalty, alive_need)
    if not options.adaptive_priorities:
        return state, terms
    scores = priority_scores(
        potential,
        penalty,
        alive_need,
        (options.potential_coef, options.conflict_coef, options.need_coef),
        options.combination,
    )
    priorities = next_priorities(
        state.priorities,
        weights,
        scores,
        ramp(state.iteration, options.warmup_iterations, options.ramp_iterations),
        options.priority_temperature,
        options.priority_floor,
        options.priority_ema,
    )
    return replace(state, priorities=priorities), terms
