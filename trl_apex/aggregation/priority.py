"""Adaptive priorities: what a batch says about each objective, and the weights of the next batch.

Learning potential, progress need and conflict penalty form one score per objective; a softmax over the scores gives the
priorities. All functions are pure. They are reconstructed from the abstract of arXiv 2601.06574; no equation is the paper's.

In the formulas, in reward units: \\(f\\) = `mean`, fast average of the mean reward; \\(R^0\\) = `first_mean`, the mean before
training, or, where that was not measured, of the first batch; \\(S\\) = `scale`, pooled within-group standard
deviation; \\(S^0\\) = `first_scale`, its value at the end of the warm-up, NaN before. `weighted` is true where
the user's weight is positive.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from .normalize import Flags, GroupMoments, Groups, Matrix, Vector, pooled_variance
from .options import ApexOptions
from .state import PriorityState

SMALL_FACTOR = 0.1  # keeps one vanishing factor of the product from silencing an objective
ROUNDING = 1e-6  # spreads that no mean reward moves by chance, only by rounding


# What a batch says


def presence(moments: GroupMoments, groups: Groups, max_missing: float) -> tuple[Flags, Flags, Vector]:
    """Find the objectives that are absent from the batch, and those that lack more than `max_missing` of their rewards.

    A group without any reward of an objective is a prompt that it does not apply to, which is not missing. The third result
    is the share of live groups among the others.
    """
    has = moments.count > 0
    absent = ~has.any(0)
    applicable = (has * groups.sizes[:, None]).sum(0).clamp(min=1)
    sparse = ~absent & (1 - moments.count.sum(0) / applicable > max_missing)
    return absent, sparse, (has & ~moments.dead).sum(0) / has.sum(0).clamp(min=1).to(moments.count.dtype)


def observe_batch(state: PriorityState, moments: GroupMoments, held: Flags, options: ApexOptions) -> PriorityState:
    """Advance the moving averages by one batch, except of objectives that are `held`.

    The start, where it was not measured, is the mean of the first batch that has the objective. The first spread is taken at
    the end of the warm-up, or as soon afterwards as there is one.
    """
    has = moments.count > 0
    groups = has.sum(0)
    mean = torch.where(has, moments.mean, 0.0).sum(0) / groups
    between = torch.where(has, (moments.mean - mean) ** 2, 0.0).sum(0) / groups
    alone = torch.where(has, moments.variance / moments.count.clamp(min=1.0), 0.0).sum(0)
    error = torch.where(groups > 1, between / groups, alone).sqrt()
    variance, mean, error = (torch.where(held, torch.nan, new) for new in (pooled_variance(moments), mean, error))
    fast = state.fast.update(mean, options.fast_ema)
    state = replace(
        state,
        iteration=state.iteration + 1,
        variance=state.variance.update(variance, options.scale_ema),
        fast=fast,
        slow=state.slow.update(mean, options.slow_ema),
        error=state.error.update(error, options.slow_ema),
        first_mean=torch.where(state.first_mean.isnan(), fast.value, state.first_mean),
        dead_fraction=torch.where(held, state.dead_fraction, (moments.dead & has).sum(0) / groups),
    )
    if state.iteration < options.warmup_iterations:
        return state
    start = state.first_scale.isnan() & (state.scale > 0)  # where there is a spread, there is a mean
    return replace(
        state,
        first_scale=torch.where(start, state.scale, state.first_scale),
        largest_scale=torch.where(start, state.scale, torch.maximum(state.largest_scale, state.scale)),
    )


# The three terms


def learning_potential(
    scale: Vector, first_scale: Vector, gap: Vector, noise: Vector, dead_fraction: Vector
) -> Vector:
    r"""How much there is left to learn, from 0 to 1: spread that is left, and movement beyond noise.

    $$L_k = (1 - \mathrm{dead}_k)\left(\tfrac12 \mathrm{clip}(S_k / S^0_k, 0, 1)
    + \tfrac12 \tanh\frac{|f_k - q_k|}{2\,\mathrm{noise}_k}\right)$$

    \(f - q\) = `gap`, fast minus slow average of the mean reward; `noise`, of the gap when nothing moves. What is below
    a millionth of the spread is rounding.
    """
    spread = torch.nan_to_num(scale / first_scale, nan=1.0, posinf=1.0).clamp(0.0, 1.0)
    least = ROUNDING * scale
    ratio = gap.abs() / (2 * torch.where(noise > least, noise, 1.0))
    moving = torch.where(noise > least, torch.tanh(ratio), (gap.abs() > least).to(ratio.dtype))
    return (1 - dead_fraction) * 0.5 * (spread + torch.nan_to_num(moving, nan=0.0))


def trend_noise(error: Vector, fast_ema: float, slow_ema: float) -> Vector:
    r"""Standard deviation of \(f - q\) when nothing moves: \(\bar e_k \sqrt{(1-\beta_f)/(1+\beta_f) + (1-\beta_s)/(1+\beta_s)}\).

    \(\bar e\) = `error`, of one batch's mean reward. The averages share their batches, so this is an upper bound.
    """
    return error * math.sqrt((1 - fast_ema) / (1 + fast_ema) + (1 - slow_ema) / (1 + slow_ema))


def relative_need(mean: Vector, first_mean: Vector, unit: Vector, weighted: Flags, temperature: float = 0.5) -> Vector:
    r"""Need of the objectives that gained less than the others, in units of their spread.

    $$u_k = \frac{f_k - R^0_k}{U_k}, \qquad N_k = \mathrm{sigmoid}\left(\frac{\bar u - u_k}{T}\right)$$

    \(U\) = `unit`, \(T\) = `temperature`; only `weighted` objectives count in \(\bar u\). 0.5 while start or unit are unknown,
    and for an objective whose mean never moves, such as a rank within the group: it cannot lag.
    """
    gain = (mean - first_mean) / unit
    known = gain.isfinite() & (gain.abs() > ROUNDING)
    counted = known & weighted
    average = torch.where(counted, gain, 0.0).sum() / counted.sum().clamp(min=1)
    return torch.where(known, torch.sigmoid((average - gain) / temperature), 0.5)


def target_need(mean: Vector, first_mean: Vector, first_scale: Vector, targets: Vector, cap: float = 1.5) -> Vector:
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


def conflict_penalty(
    conflict: Matrix, margin: Matrix, need: Vector, weighted: Flags, attribution: str = "lag"
) -> Vector:
    r"""What each objective pays for opposing others beyond noise; never negative.

    $$h_{kj} = \mathrm{clip}\left(\frac{-c_{kj} - \delta}{1 - \delta}, 0, 1\right), \qquad
    C_k = \frac{1}{K-1}\sum_j a_{kj} h_{kj}, \qquad a_{kj} = \begin{cases} \max(N_j - N_k, 0) & \text{lag}\\
    \min(N_j, 1) & \text{victim}\\ 1 & \text{plain}\end{cases}$$

    \(c\) = `conflict`, NaN where unknown and 1 on the diagonal; \(\delta\) = `margin`, below 1; \(N\) = `need`. Objectives without
    weight are left out. With "lag" the objective that is ahead pays for opposing the one behind. "plain" also lowers the
    objective that is sacrificed; it is here for comparison.

    Example:
        >>> conflict, need = torch.tensor([[1.0, -0.625], [-0.625, 1.0]]), torch.tensor([0.25, 0.75])
        >>> conflict_penalty(conflict, torch.full((2, 2), 0.25), need, torch.tensor([True, True])).tolist()
        [0.25, 0.0]
    """
    opposition = ((-torch.nan_to_num(conflict, nan=0.0) - margin) / (1.0 - margin)).clamp(0.0, 1.0)
    share = {
        "lag": (need[None, :] - need[:, None]).clamp(min=0.0),
        "victim": need.clamp(max=1.0)[None, :],
        "plain": torch.ones_like(opposition),
    }[attribution]
    both = weighted[:, None] & weighted[None, :]
    return torch.where(both, share * opposition, 0.0).sum(1) / max(int(weighted.sum()) - 1, 1)


# From terms to weights


def priority_scores(
    potential: Vector, penalty: Vector, need: Vector, coefficients: tuple[float, float, float], combination: str
) -> Vector:
    r"""One score per objective, from its potential \(L\), penalty \(C\) and need \(N\).

    $$s_k = \alpha_L L_k - \alpha_C C_k + \alpha_N N_k \qquad\text{(additive)}$$
    $$s_k = \alpha_L \ln(L_k + 0.1) - \alpha_C \ln(1 + C_k) + \alpha_N \ln(N_k + 0.1) \qquad\text{(multiplicative)}$$
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
    priorities: Vector, weights: Vector, scores: Vector, strength: float, temperature: float, floor: float, ema: float
) -> Vector:
    r"""The priorities of the next batch.

    $$p = \eta\,\omega + (1-\eta)\,\mathrm{softmax}\left(\ln\omega + s/\tau\right), \qquad
    w \leftarrow \rho w + (1-\rho)\left((1-\lambda)\omega + \lambda p\right)$$

    \(w\) = `priorities`, \(\omega\) = `weights` (0 stays 0), \(s\) = `scores`, \(\lambda\) = `strength` from [`ramp`], \(\tau\) =
    `temperature`, \(\eta\) = `floor`, \(\rho\) = `ema`. They sum to one and are at least \(\eta\omega\).

    Example:
        >>> half, scores = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
        >>> next_priorities(half, half, scores, strength=1.0, temperature=0.5, floor=0.2, ema=0.0).tolist()
        [0.804..., 0.195...]
    """
    wanted = floor * weights + (1 - floor) * torch.softmax(torch.log(weights) + scores / temperature, 0)
    moved = ema * priorities + (1 - ema) * ((1 - strength) * weights + strength * wanted)
    return moved / moved.sum()


def reweighted(priorities: Vector, old: Vector, new: Vector, floor: float = 0.2) -> Vector:
    r"""The priorities after the user changed the weights from \(\omega\) to \(\omega'\), as in annealing.

    What is above the floor is scaled with its weight: \(w' = \eta\omega' + (1-\eta)\,p'\), with \(p' \propto p\,\omega'/\omega\)
    and \(p = (w - \eta\omega)/(1-\eta)\). During the warm-up, where \(w = \omega\), the result is \(\omega'\).
    """
    free = (priorities - floor * old).clamp(min=0.0)
    scaled = torch.where(old > 0, free / old.clamp(min=1e-300), free.sum()) * new
    total = float(scaled.sum())
    return floor * new + (1 - floor) * (scaled / total if total > 0 else new)


def reprioritize(state: PriorityState, options: ApexOptions) -> tuple[PriorityState, dict[str, Vector]]:
    """The state with the priorities of the next batch, from everything seen so far, and the terms behind them."""
    weighted, mean = state.weights > 0, state.fast.value
    unit = state.largest_scale if options.need_scale == "largest" else state.first_scale
    need = relative_need(mean, state.first_mean, unit, weighted, options.need_temperature)
    if options.need_mode == "target":
        targets = torch.tensor(options.reward_targets, dtype=mean.dtype)
        wanted = target_need(mean, state.first_mean, state.first_scale, targets, options.need_cap)
        need = torch.where(wanted.isnan(), need, wanted)
    penalty = conflict_penalty(state.conflict.value, state.margin, need, weighted, options.conflict_attribution)
    need = need * (1 - state.dead_fraction)
    noise = trend_noise(state.error.value, options.fast_ema, options.slow_ema)
    gap = mean - state.slow.value
    potential = learning_potential(state.scale, state.first_scale, gap, noise, state.dead_fraction)
    if options.adaptive_priorities:
        coefficients = options.potential_coef, options.conflict_coef, options.need_coef
        scores = priority_scores(potential, penalty, need, coefficients, options.combination)
        faded_in = ramp(state.iteration, options.warmup_iterations, options.ramp_iterations)
        smoothing = options.priority_temperature, options.priority_floor, options.priority_ema
        priorities = next_priorities(state.priorities, state.weights, scores, faded_in, *smoothing)
        state = replace(state, priorities=priorities)
    return state, {"potential": potential, "conflict_penalty": penalty, "need": need}
