"""The rules that APEX is compared with: one function each, and one table that names them.

A rule takes the rewards (NaN = missing), the user's weights as they were given, and the [`Groups`] of the rows. It returns the
scores that it sums, per objective, and the advantages. It works on the device and in the dtype of the rewards, in TRL's order
of operations: `sum_then_normalize` and `normalize_then_sum` give TRL's numbers to the last digits of float32.

To add a rule, write its function here and give it a row in `TABLE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .normalize import Groups, Matrix, Rows, Vector

LARGEST_SQUARED = 1e15  # in float32, the squares of much larger rewards overflow

Scored = tuple[Rows, Float[Tensor, " B"]]


def sum_then_normalize(
    rewards: Rows, weights: Vector, groups: Groups, scale_rewards: str = "group", std_epsilon: float = 1e-4
) -> Scored:
    r"""Weighted sum of the raw rewards, normalized as one reward.

    $$R_i = \sum_k w_k r_{ik}, \qquad A_i = \frac{R_i - \bar R_{group}}{\mathrm{std}(R) + \epsilon}$$

    The standard deviation is that of the "group" or of the "batch"; with `scale_rewards="none"` nothing is divided.

    Source: the default of `trl.GRPOTrainer`; Flow-GRPO (arXiv 2505.05470).
    """
    summed = weighted_sum(rewards, weights)[:, None]
    mean, divisor = mean_and_divisor(summed, groups, scale_rewards, std_epsilon)
    filled = torch.where(summed.isnan(), torch.nan, rewards.nan_to_num(nan=0.0))
    scores = (filled - group_mean_std(filled, groups)[0]) / divisor
    return scores.nan_to_num(nan=0.0), ((summed - mean) / divisor)[:, 0].nan_to_num(nan=0.0)


def weighted_advantages(
    rewards: Rows, weights: Vector, groups: Groups, scale_rewards: str = "group", std_epsilon: float = 1e-4
) -> Scored:
    r"""Weighted sum of each objective's own advantage, with no further normalization.

    $$A_i = \sum_k w_k \frac{r_{ik} - \bar r_{group,k}}{\mathrm{std}_k(r) + \epsilon}$$

    Source: MixGRPO and Pref-GRPO.
    """
    mean, divisor = mean_and_divisor(rewards, groups, scale_rewards, std_epsilon)
    scores = (rewards - mean) / divisor
    return scores.nan_to_num(nan=0.0), weighted_sum(scores, weights).nan_to_num(nan=0.0)


def normalize_then_sum(rewards: Rows, weights: Vector, groups: Groups, std_epsilon: float = 1e-4) -> Scored:
    r"""Each objective standardized in its group, then the weighted sum standardized over the batch.

    $$z_{ik} = \frac{r_{ik} - \bar r_{group,k}}{\mathrm{std}_{group,k} + \epsilon}, \qquad
    A_i = \frac{\sum_k w_k z_{ik} - \mathrm{mean}_{batch}}{\mathrm{std}_{batch} + \epsilon}$$

    Source: GDPO (arXiv 2601.05242); TRL's option of the same name.
    """
    mean, divisor = mean_and_divisor(rewards, groups, "group", std_epsilon)
    scores = (rewards - mean) / divisor
    # A row whose rewards are all missing stays out; one that is alone in its group counts as zero, as in TRL.
    summed = torch.where(rewards.isnan().all(1), torch.nan, (scores * weights).nansum(1))
    std_batch = nanstd(summed) if len(summed) > 1 else torch.zeros_like(summed)
    advantages = (summed - torch.nanmean(summed)) / (std_batch + std_epsilon)
    return scores.nan_to_num(nan=0.0), advantages.nan_to_num(nan=0.0)


def dvao(rewards: Rows, weights: Vector, groups: Groups, std_epsilon: float = 1e-4) -> Scored:
    r"""Weighted sum of centred rewards over the weighted sum of their group standard deviations.

    $$A_i = \frac{\sum_k w_k (r_{ik} - \bar r_{group,k})}{\sum_k w_k\, \mathrm{std}_{group,k} + \epsilon}$$

    Inside a group its direction is the plain sum's, so a large-scale reward still dominates.

    Source: after arXiv 2605.25604.
    """
    mean, std = group_mean_std(rewards, groups)
    divisor = (weights * std).nansum(1, keepdim=True) + std_epsilon
    scores = ((rewards - mean) / divisor).nan_to_num(nan=0.0)
    return scores, (weights * scores).sum(1)


def gd2po(
    rewards: Rows, weights: Vector, groups: Groups, gd2po_agreement: float = 0.2, std_epsilon: float = 1e-4
) -> Scored:
    r"""`normalize_then_sum` without the rows whose objectives disagree, and with less weight for groups with many of them.

    $$a_{ik} = w_k \frac{r_{ik} - \bar r_{group,k}}{\mathrm{std}_{group,k} + \epsilon}, \qquad
    q_i = \frac{\sum_k a_{ik}}{\sum_k |a_{ik}| + 10^{-8}}$$

    A row with positive and negative \(a_{ik}\) is dropped if \(|q_i|\) is below `gd2po_agreement`. The sums of the other rows are
    multiplied by the kept share of their group and standardized over the kept rows.

    Source: after GD2PO (arXiv 2606.16771), reconstructed from a description of its code.

    Example:
        >>> rewards = torch.tensor([[1.0, 1.0], [2.0, 3.0], [3.0, 0.9], [2.0, 2.0]])
        >>> gd2po(rewards, torch.ones(2), Groups(torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2])))[1].tolist()
        [-0.707..., 0.707..., 0.0, 0.0]
    """
    scores, _ = normalize_then_sum(rewards, weights, groups, std_epsilon)
    parts, there = scores * weights, ~rewards.isnan().all(1)
    agreement = parts.sum(1).abs() / (parts.abs().sum(1) + 1e-8)
    mixed = (parts > 0).any(1) & (parts < 0).any(1)
    kept = there & ~(mixed & (agreement < gd2po_agreement))
    share = groups.sum(kept.to(parts.dtype)) / groups.sum(there.to(parts.dtype)).clamp(min=1.0)
    weighted = torch.where(kept, parts.sum(1) * share[groups.index], torch.nan)
    advantages = (weighted - torch.nanmean(weighted)) / (nanstd(weighted) + std_epsilon)
    return scores * kept[:, None], advantages.nan_to_num(nan=0.0)


def saw(rewards: Rows, weights: Vector, groups: Groups, std_epsilon: float = 1e-4) -> Scored:
    r"""`normalize_then_sum` with weights by each reward's coefficient of variation over the batch.

    $$c_k = \frac{\mathrm{std}_{batch}(r_k)}{|\mathrm{mean}_{batch}(r_k)| + 10^{-8}}, \qquad w'_k = w_k \frac{K c_k}{\sum_j c_j}$$

    A shift of a reward changes its weight: one with mean 22 and spread 0.5 hardly counts beside one between 0 and 1.

    Source: after SAW (arXiv 2606.07705), its form on advantages, reconstructed from a description of its code.
    """
    variation = (nanstd(rewards)[0] / (torch.nanmean(rewards, 0).abs() + 1e-8)).nan_to_num(nan=0.0, posinf=0.0)
    total = float(variation.sum())
    factor = len(variation) * variation / total if total > 0 else torch.ones_like(variation)
    scores, advantages = normalize_then_sum(rewards, weights * factor, groups, std_epsilon)
    return scores * factor, advantages


def ctwa(rewards: Rows, weights: Vector, groups: Groups, std_epsilon: float = 1e-4) -> Scored:
    r"""`normalize_then_sum` with weights raised until no objective's reward is anticorrelated with the advantage.

    A policy gradient raises objective \(k\) to first order where \(\mathrm{Cov}(z_k, A) > 0\). With \(z\) the standardized
    rewards and \(C = z^\top z\), the weights become those that change \(A = z w'\) least:

    $$w' = \arg\min_v\; (v - w)^\top C (v - w) \quad\text{such that}\quad (C v)_k \ge 0 \text{ for all } k \text{ with } w_k > 0$$

    If objectives are linearly dependent, \(w'\) is not unique; \(A\) is.

    Source: after the condition of CTWA (arXiv 2602.06869); this way to meet it is ours.

    Example:
        >>> rewards = torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [4.0, 3.0]])
        >>> ctwa(rewards, torch.tensor([1.0, 0.1]), Groups(torch.tensor([0, 0, 0, 0]), torch.tensor([4])))[1].tolist()
        [-1.06..., -0.42..., 0.21..., 1.27...]
    """
    scores, _ = normalize_then_sum(rewards, weights, groups, std_epsilon)
    wide = scores.cpu().double()
    covariance = (wide.T @ wide).tolist()
    given = weights.tolist()
    raised, size = list(given), range(len(given))
    for _ in range(500):  # coordinate ascent on the multipliers, which are what each weight was raised by
        largest = 0.0
        for k in size:
            if given[k] > 0 and covariance[k][k] > 0:
                product = sum(covariance[k][j] * raised[j] for j in size)
                new = max(given[k], raised[k] - product / covariance[k][k])
                largest, raised[k] = max(largest, abs(new - raised[k])), new
        if largest <= 1e-12 * sum(raised):
            break
    factor = scores.new_tensor([r / g if g else 1.0 for r, g in zip(raised, given, strict=True)])
    return scores * factor, normalize_then_sum(rewards, weights * factor, groups, std_epsilon)[1]


# Weights from the Gram matrix of the objectives' gradients


def gramian_weights(
    rule: str, gramian: Matrix, weights: Vector, unit_gradients: bool = True, cagrad_c: float = 0.5, seed: int = 0
) -> Vector:
    r"""The weights that a multi-gradient method gives to the objectives, summing to one.

    Solved on \(\tilde G_{kj} = K^2 \omega_k \omega_j G_{kj}\), the Gram matrix of the gradients scaled by the user's
    weights. Objectives whose gradient is zero take no part: a min-norm method would follow them alone and stand still.

    Args:
        rule (`str`): one of `GRADIENT_RULES`.
        gramian (`Tensor` of shape `[K, K]`): \(G\), inner products of the objectives' gradients.
        weights (`Tensor` of shape `[K]`): \(\omega\), the user's, summing to one.
        unit_gradients (`bool`): for "mgda", solve for gradients of unit length, as MARBLE does, whatever the user's weights.
        cagrad_c (`float`): for "cagrad", the radius of its search around the mean gradient.
        seed (`int`): for "pcgrad", of the random order of its projections; must be the same on all ranks.

    Source: MGDA as in MARBLE (arXiv 2605.06507); UPGrad and CAGrad by TorchJD; PCGrad (arXiv 2001.06782).

    Example:
        >>> even = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> gramian_weights("mgda", torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64), even).tolist()
        [0.333..., 0.666...]
    """
    solver = TABLE[rule].solver
    assert solver, f"{rule} has no solver"
    active = (weights > 0) & (gramian.diagonal() > 0)
    if not bool(active.any()):
        return weights.clone()
    pick = active.nonzero()[:, 0]
    scale = len(weights) * weights[pick]
    if rule == "mgda" and unit_gradients:
        scale = 1.0 / gramian.diagonal()[pick].sqrt()
    scaled = gramian[pick][:, pick] * scale[:, None] * scale[None, :]
    scaled = scaled / scaled.diagonal().mean()  # the solvers' tolerances are absolute
    result = torch.zeros_like(weights)
    result[pick] = solver(scaled, cagrad_c, seed).to(weights.dtype) * scale
    total = float(result.sum())
    return result / total if total > 1e-9 else weights.clone()


def pcgrad_weights(gramian: Matrix, seed: int) -> Vector:
    """PCGrad from the Gram matrix: each gradient is projected away from those it opposes, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros_like(gramian[0])
    for own in range(len(gramian)):
        mix = torch.zeros_like(total)
        mix[own] = 1.0
        for other in torch.randperm(len(gramian), generator=generator).tolist():
            product = gramian[other] @ mix
            if other != own and product < 0:
                mix[other] -= product / gramian[other, other]
        total += mix
    return total


def _torchjd(name: str, **options: float) -> Callable[[Tensor], Tensor]:
    """A weighting of TorchJD, which is optional."""
    try:
        from torchjd import aggregation

        return getattr(aggregation, name)(**options)
    except ImportError as error:
        raise ImportError(
            f"The rules mgda, upgrad and cagrad need TorchJD and its solvers. Found them missing ({error}). "
            'Run `pip install "trl_apex[gradient]"`.'
        ) from error


# The table


@dataclass(frozen=True)
class Rule:
    """A row of `TABLE`."""

    function: Callable[..., Scored]
    options: tuple[str, ...] = ("std_epsilon",)  # the fields of ApexOptions that the function takes
    signed: bool = False  # whether a negative weight makes sense
    solver: Callable[[Tensor, float, int], Tensor] | None = None  # (gramian, cagrad_c, seed) -> weights


_SCALED = ("scale_rewards", "std_epsilon")
TABLE = {
    "sum_then_normalize": Rule(sum_then_normalize, _SCALED, signed=True),
    "normalize_then_sum": Rule(normalize_then_sum, signed=True),
    "weighted_advantages": Rule(weighted_advantages, _SCALED, signed=True),
    "dvao": Rule(dvao),
    "gd2po": Rule(gd2po, ("gd2po_agreement", "std_epsilon")),
    "saw": Rule(saw),
    "ctwa": Rule(ctwa),
    "mgda": Rule(normalize_then_sum, solver=lambda gramian, _c, _seed: _torchjd("MGDAWeighting")(gramian)),
    "upgrad": Rule(normalize_then_sum, solver=lambda gramian, _c, _seed: _torchjd("UPGradWeighting")(gramian)),
    "pcgrad": Rule(normalize_then_sum, solver=lambda gramian, _c, seed: pcgrad_weights(gramian, seed)),
    "cagrad": Rule(normalize_then_sum, solver=lambda gramian, c, _seed: _torchjd("CAGradWeighting", c=c)(gramian)),
}
RULES = ("apex", *TABLE)
GRADIENT_RULES = tuple(name for name, rule in TABLE.items() if rule.solver)
SIGNED_RULES = tuple(name for name, rule in TABLE.items() if rule.signed)


# What the rules are made of


def wide_enough(rewards: Rows) -> Rows:
    """The rewards, in float64 if their squares would overflow float32; else the dtype stays, and the rounding TRL's."""
    return rewards.double() if bool((rewards.abs() > LARGEST_SQUARED).any()) else rewards


def mean_and_divisor(values: Rows, groups: Groups, scale_rewards: str, std_epsilon: float) -> tuple[Rows, Rows]:
    """Mean of each row's group, and what the difference from it is divided by."""
    mean, std = group_mean_std(values, groups)
    if scale_rewards == "none":
        return mean, torch.ones_like(mean)
    if scale_rewards == "batch":
        std = nanstd(values).expand_as(values) if len(values) > 1 else torch.zeros_like(values)
    return mean, std + std_epsilon


def group_mean_std(values: Rows, groups: Groups) -> tuple[Rows, Rows]:
    """Mean and sample standard deviation (Bessel's) of each row's group, over its valid values.

    The standard deviation of fewer than two values is NaN; in a group of one row it is 0, as in TRL.
    """
    mean, std = torch.empty_like(values), torch.empty_like(values)
    order = torch.argsort(groups.index, stable=True)
    starts = groups.sizes.cumsum(0) - groups.sizes
    for size in groups.sizes.unique().tolist():  # groups of one size form a dense block, so no padding is needed
        first = starts[groups.sizes == size]
        rows = order[first[:, None] + torch.arange(size, device=first.device)]
        block = values[rows]
        middle = torch.nanmean(block, dim=1, keepdim=True)
        mean[rows] = middle.expand_as(block)
        std[rows] = (nanstd(block, 1) if size > 1 else torch.zeros_like(middle)).expand_as(block)
    return mean, std


def nanstd(values: Float[Tensor, " ..."], dim: int = 0) -> Float[Tensor, " ..."]:
    """Sample standard deviation of the valid values along `dim`, which is kept; NaN if there are fewer than two."""
    deviation = values - torch.nanmean(values, dim=dim, keepdim=True)
    count = (~values.isnan()).sum(dim=dim, keepdim=True)
    variance = torch.nanmean(deviation**2, dim=dim, keepdim=True) * (count / (count - 1))
    return torch.where(count > 1, variance, torch.nan).sqrt()


def weighted_sum(values: Rows, weights: Vector) -> Float[Tensor, " B"]:
    """Weighted sum over the objectives that are there; NaN if none is."""
    return torch.where(values.isnan().all(1), torch.nan, (values * weights).nansum(1))
