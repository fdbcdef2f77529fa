"""Adaptive priorities: what a batch says about each objective, and the weights of the next batch.

Learning potential, conflict penalty and progress need form one score per objective; a softmax over the scores gives the
priorities. All functions are pure. They are reconstructed from the abstract of arXiv 2601.06574; no equation is the paper's.

All tensors have shape `[K]`. In the formulas, in reward units: \\(f\\) = `mean`, fast average of the
mean reward; \\(R^0\\) = `first_mean`, its value at the end of the warm-up; \\(S\\) = `scale`, pooled within-group standard
deviation; \\(S^0\\) = `first_scale`, its value then. Both `first_` are NaN before. `weighted` is true where the user's weight is
positive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .conflict import conflict_penalty, opposition
from .normalize import GroupMoments, pooled_variance
from .options import ApexOptions
from .state import PriorityState

SMALL_FACTOR = 0.1  # keeps one vanishing factor of the product from silencing an objective


# What a batch says


@dataclass(frozen=True)
class Presence:
    """Which objectives a batch informs about."""

    absent: Bool[Tensor, " K"]  # no valid reward at all
    sparse: Bool[Tensor, " K"]  # too many rewards missing in the groups that have the objective
    live_groups: Float[Tensor, " K"]  # share of live groups among those that have the objective; 0 without any

    @property
    def held(self) -> Bool[Tensor, " K"]:
        """Objectives whose statistics are held."""
        return self.absent | self.sparse


def presence(moments: GroupMoments, sizes: Float[Tensor, " P"], max_missing: float) -> Presence:
    """Find the objectives that are absent, or present in too few rows to trust.

    A group without any reward of an objective is a prompt that it does not apply to, which is not missing.
    """
    has = moments.count > 0
    applicable = (has * sizes[:, None]).sum(0)
    missing = 1 - moments.count.sum(0) / applicable.clamp(min=1.0)
    absent = ~has.any(0)
    live = (has & ~moments.dead).sum(0) / has.sum(0).clamp(min=1).to(moments.count.dtype)
    return Presence(absent, ~absent & (missing > max_missing), live)


def observe_batch(
    state: PriorityState, moments: GroupMoments, held: Bool[Tensor, " K"], options: ApexOptions
) -> PriorityState:
    """Advance the moving averages by one batch, except of objectives that are `held`.

    The baselines are taken at the end of the warm-up, or as soon afterwards as they exist.
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


# The three terms


def trend_noise(error: Float[Tensor, " K"], fast_ema: float, slow_ema: float) -> Float[Tensor, " K"]:
    r"""Standard deviation of the gap between a fast and a slow moving average when nothing moves.

    $$\bar e_k \sqrt{\frac{1-\beta_f}{1+\beta_f} + \frac{1-\beta_s}{1+\beta_s}}$$

    \(\bar e\) = `error`, of one batch's mean reward. The averages share their batches, so this is an upper bound.
    """
    return error * math.sqrt((1 - fast_ema) / (1 + fast_ema) + (1 - slow_ema) / (1 + slow_ema))


def learning_potential(
    scale: Float[Tensor, " K"],
    first_scale: Float[Tensor, " K"],
    gap: Float[Tensor, " K"],
    noise: Float[Tensor, " K"],
    dead_fraction: Float[Tensor, " K"],
) -> Float[Tensor, " K"]:
    r"""How much there is left to learn, from 0 to 1: spread that is left, and movement beyond noise.

    $$L_k = (1 - \mathrm{dead}_k)\left(\tfrac12 \mathrm{clip}(S_k / S^0_k, 0, 1)
    + \tfrac12 \tanh\frac{|f_k - q_k|}{2\,\mathrm{noise}_k}\right)$$

    \(f - q\) = `gap`, fast minus slow average of the mean reward; `noise` is from [`trend_noise`].

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> learning_potential(0.5 * one, one, gap=zero, noise=one, dead_fraction=zero).tolist()
        [0.25]
    """
    spread = torch.nan_to_num(scale / first_scale, nan=1.0, posinf=1.0).clamp(0.0, 1.0)
    ratio = gap.abs() / (2 * torch.where(noise > 0, noise, 1.0))
    moving = torch.where(noise > 0, torch.tanh(ratio), (gap != 0).to(ratio.dtype))
    return (1 - dead_fraction) * 0.5 * (spread + torch.nan_to_num(moving, nan=0.0))


def relative_need(
    mean: Float[Tensor, " K"],
    first_mean: Float[Tensor, " K"],
    unit: Float[Tensor, " K"],
    weighted: Bool[Tensor, " K"],
    temperature: float = 0.5,
) -> Float[Tensor, " K"]:
    r"""Need of the objectives that gained less than the others, in units of their spread.

    $$u_k = \frac{f_k - R^0_k}{S_k}, \qquad N_k = \mathrm{sigmoid}\left(\frac{\bar u - u_k}{T}\right)$$

    \(S\) = `unit`, \(T\) = `temperature`; only `weighted` objectives count in \(\bar u\). 0.5 where there is no baseline yet.

    Example:
        >>> gains, zero, one = torch.tensor([2.0, 0.0]), torch.zeros(2), torch.ones(2)
        >>> relative_need(gains, zero, one, torch.tensor([True, True])).tolist()
        [0.119..., 0.880...]
    """
    gain = (mean - first_mean) / unit
    known = gain.isfinite()
    counted = known & weighted
    average = torch.where(counted, gain, 0.0).sum() / counted.sum().clamp(min=1)
    return torch.where(known, torch.sigmoid((average - gain) / temperature), 0.5)


def target_need(
    mean: Float[Tensor, " K"],
    first_mean: Float[Tensor, " K"],
    first_scale: Float[Tensor, " K"],
    targets: Float[Tensor, " K"],
    cap: float = 1.5,
) -> Float[Tensor, " K"]:
    r"""Need as the share of the way to a target that is still to go.

    $$N_k = \mathrm{clip}\left(\frac{R^*_k - f_k}{R^*_k - R^0_k}, 0, c\right)$$

    \(R^*\) = `targets`, \(c\) = `cap`, the need of an objective that fell behind its start. Where a target was met from the
    start, `first_scale` is the unit. NaN where there is no target, 1 where there is no baseline yet.

    Example:
        >>> now, start, target = torch.tensor([0.75]), torch.tensor([0.5]), torch.tensor([1.0])
        >>> target_need(now, start, torch.ones(1), target).tolist()
        [0.5]
    """
    way = targets - first_mean
    need = ((targets - mean) / torch.where(way > 0, way, first_scale)).clamp(0.0, cap)
    return torch.where(targets.isnan(), targets, torch.nan_to_num(need, nan=1.0))


# From terms to weights


def priority_scores(
    potential: Float[Tensor, " K"],
    penalty: Float[Tensor, " K"],
    need: Float[Tensor, " K"],
    coefficients: tuple[float, float, float] = (0.5, 1.0, 1.0),
    combination: str = "additive",
) -> Float[Tensor, " K"]:
    r"""One score per objective, from its potential \(L\), penalty \(C\) and need \(N\).

    $$s_k = \alpha_L L_k - \alpha_C C_k + \alpha_N N_k \qquad\text{(additive)}$$
    $$s_k = \alpha_L \ln(L_k + 0.1) - \alpha_C \ln(1 + C_k) + \alpha_N \ln(N_k + 0.1) \qquad\text{(multiplicative)}$$

    Example:
        >>> one = torch.ones(1)
        >>> priority_scores(one, 0.5 * one, 0.5 * one).tolist()
        [0.5]
    """
    gain, loss, want = coefficients
    if combination == "multiplicative":
        potential, need = torch.log(potential + SMALL_FACTOR), torch.log(need + SMALL_FACTOR)
        penalty = torch.log1p(penalty)
    return gain * potential - loss * penalty + want * need


def ramp(iteration: int, warmup: int, length: int) -> float:
    r"""How far the priorities have faded in: \(\lambda_t = \mathrm{clip}((t - T_w)/T_r, 0, 1)\)."""
    if length == 0:
        return float(iteration >= warmup)
    return min(max((iteration - warmup) / length, 0.0), 1.0)


def next_priorities(
    priorities: Float[Tensor, " K"],
    weights: Float[Tensor, " K"],
    scores: Float[Tensor, " K"],
    strength: float,
    temperature: float = 0.5,
    floor: float = 0.2,
    ema: float = 0.7,
) -> Float[Tensor, " K"]:
    r"""The priorities of the next batch.

    $$p = \eta\,\omega + (1-\eta)\,\mathrm{softmax}\left(\ln\omega + s/\tau\right), \qquad
    w \leftarrow \rho w + (1-\rho)\left((1-\lambda)\omega + \lambda p\right)$$

    \(w\) = `priorities`, \(\omega\) = `weights` (0 stays 0), \(s\) = `scores`, \(\lambda\) = `strength` from [`ramp`], \(\tau\) =
    `temperature`, \(\eta\) = `floor`, \(\rho\) = `ema`. They sum to one and are at least \(\eta\omega\).

    Example:
        >>> half = torch.tensor([0.5, 0.5])
        >>> next_priorities(half, half, torch.tensor([1.0, 0.0]), strength=1.0, ema=0.0).tolist()
        [0.804..., 0.195...]
    """
    wanted = floor * weights + (1 - floor) * torch.softmax(torch.log(weights) + scores / temperature, 0)
    moved = ema * priorities + (1 - ema) * ((1 - strength) * weights + strength * wanted)
    return moved / moved.sum()


def reweighted(
    priorities: Float[Tensor, " K"], old: Float[Tensor, " K"], new: Float[Tensor, " K"], floor: float = 0.2
) -> Float[Tensor, " K"]:
    r"""The priorities after the user changed the weights from \(\omega\) to \(\omega'\), as in annealing.

    What is above the floor is scaled with its weight: \(w' = \eta\omega' + (1-\eta)\,p'\), with \(p' \propto p\,\omega'/\omega\)
    and \(p = (w - \eta\omega)/(1-\eta)\). During the warm-up, where \(w = \omega\), the result is \(\omega'\).

    Example:
        >>> even, new = torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25])
        >>> reweighted(even, even, new).tolist()
        [0.75, 0.25]
    """
    free = (priorities - floor * old).clamp(min=0.0)
    scaled = torch.where(old > 0, free / old.clamp(min=1e-300), free.sum()) * new
    total = float(scaled.sum())
    return floor * new + (1 - floor) * (scaled / total if total > 0 else new)


@dataclass(frozen=True)
class Terms:
    """The three terms behind the priorities."""

    potential: Float[Tensor, " K"]
    penalty: Float[Tensor, " K"]
    need: Float[Tensor, " K"]


def reprioritize(state: PriorityState, options: ApexOptions) -> tuple[PriorityState, Terms]:
    """The priorities of the next batch, from everything seen so far."""
    weighted, mean = state.weights > 0, state.fast.value
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
    terms = Terms(potential, penalty, need * (1 - state.dead_fraction))
    if not options.adaptive_priorities:
        return state, terms
    coefficients = options.potential_coef, options.conflict_coef, options.need_coef
    scores = priority_scores(terms.potential, terms.penalty, terms.need, coefficients, options.combination)
    faded_in = ramp(state.iteration, options.warmup_iterations, options.ramp_iterations)
    smoothing = options.priority_temperature, options.priority_floor, options.priority_ema
    return replace(
        state, priorities=next_priorities(state.priorities, state.weights, scores, faded_in, *smoothing)
    ), terms
