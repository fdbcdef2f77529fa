"""Dual-stage normalization: each objective inside its group, then the weighted sum over the batch.

Shapes: B rows in P groups (one per prompt), K objectives. `mask` and `valid` are true for rewards that count, `present` is true
for rows with a weighted objective. Everything is computed on the device and in the dtype of the inputs. The equations are
reconstructed from the abstract of arXiv 2601.06574.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SMALL_SCALE = 1e-4  # the part of the pooled scale that is added to a group's own, so that it never vanishes


@dataclass(frozen=True)
class Groups:
    """Which rows belong to which group; groups may have different sizes and need not be contiguous."""

    index: Int[Tensor, " B"]  # the number of each row's group, in 0..P-1
    sizes: Int[Tensor, " P"]  # rows of each group

    def sum(self, values: Float[Tensor, " B *K"]) -> Float[Tensor, " P *K"]:
        """Sum of `values` inside each group."""
        return values.new_zeros(len(self.sizes), *values.shape[1:]).index_add_(0, self.index, values)

    def widest(self, values: Float[Tensor, "B K"]) -> Float[Tensor, "P K"]:
        """Largest of the non-negative `values` inside each group."""
        rows = self.index[:, None].expand_as(values)
        return values.new_zeros(len(self.sizes), values.shape[1]).scatter_reduce_(0, rows, values, "amax")


def group_rows(group_ids: Int[Tensor, " B"]) -> Groups:
    """Number the groups of a batch from the ids of its rows (any integers), in ascending order of id.

    Example:
        >>> group_rows(torch.tensor([7, 7, 3])).index.tolist()
        [1, 1, 0]
    """
    _, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    return Groups(index, sizes)


def implausible(
    rewards: Float[Tensor, "B K"],
    valid: Bool[Tensor, "B K"],
    centre: Float[Tensor, " K"],
    unit: Float[Tensor, " K"],
    limit: float,
) -> Bool[Tensor, "B K"]:
    r"""Find rewards more than `limit` spreads away from their objective's mean: \(|r_{ik} - q_k| > L S_k\).

    \(q\) = `centre`, the mean so far; \(S\) = `unit`, the largest spread so far; \(L\) = `limit`. If `centre` is NaN or `unit` 0,
    the batch's median is used, and as unit the lower quartile of the distances from it that are not zero. One reward of
    1e30 among values near 1 would own the moving averages for more than a thousand iterations.

    Example:
        >>> rewards, unknown = torch.tensor([[1.0], [2.0], [3.0], [1e30]], dtype=torch.float64), torch.zeros(1).double()
        >>> implausible(rewards, rewards.isfinite(), unknown, unknown, 1e9).flatten().tolist()
        [False, False, False, True]
    """
    if limit == math.inf:
        return torch.zeros_like(valid)
    known = torch.where(valid, rewards, torch.nan)
    remembered = (unit > 0) & centre.isfinite()
    if not bool(remembered.all()):
        middle = known.nanmedian(0).values
        distance = (known - middle).abs()
        ordered = torch.where(distance > 0, distance, torch.nan).sort(0).values  # NaN last
        quarter = ((ordered.isfinite().sum(0) - 1).clamp(min=0) // 4)[None]
        centre = torch.where(remembered, centre, middle)
        unit = torch.where(remembered, unit, ordered.gather(0, quarter)[0])
    return (known - centre).abs() > limit * unit


@dataclass(frozen=True)
class GroupMoments:
    """Statistics of every objective in every group, over the valid rewards."""

    count: Float[Tensor, "P K"]  # valid rewards
    mean: Float[Tensor, "P K"]  # 0 if there are none
    variance: Float[Tensor, "P K"]  # of the population
    dead: Bool[Tensor, "P K"]  # true if the group cannot tell its members apart
    centred: Float[Tensor, "B K"]  # reward minus group mean, 0 where missing


def group_moments(
    rewards: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"], groups: Groups, tolerance: float = 1e-6
) -> GroupMoments:
    r"""Mean, variance and liveness of each objective in each group, over the valid rewards.

    $$n_{pk} = \sum_i M_{ik}, \quad \mu_{pk} = \tfrac{1}{n}\sum_i M r, \quad d = (r - \mu) M, \quad
    s^2_{pk} = \tfrac{1}{n}\sum_i d^2$$

    A group is dead if it has fewer than two valid rewards, if they all lie within `tolerance` times the mean of each other
    (rounding noise of a constant), or if their variance is exactly zero.

    Example:
        >>> rewards = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> moments = group_moments(rewards, torch.ones(2, 2, dtype=torch.bool), group_rows(torch.tensor([0, 0])))
        >>> moments.variance.tolist(), moments.dead.tolist()
        ([[1.0, 0.0]], [[False, True]])
    """
    values = torch.where(mask, rewards, 0.0)
    count = groups.sum(mask.to(values.dtype))
    filled = count.clamp(min=1.0)
    mean = groups.sum(values) / filled
    centred = torch.where(mask, values - mean[groups.index], 0.0)
    variance = groups.sum(centred * centred) / filled
    spread = groups.widest(centred.clamp(min=0.0)) + groups.widest((-centred).clamp(min=0.0))
    dead = (count < 2) | (spread <= tolerance * mean.abs()) | (variance == 0)
    return GroupMoments(count, mean, variance, dead, centred)


def pooled_variance(moments: GroupMoments) -> Float[Tensor, " K"]:
    r"""Within-group variance pooled over the live groups, in squared reward units; NaN where an objective has none.

    $$\frac{\sum_{p\,\text{live}} n_{pk} s^2_{pk}}{\sum_{p\,\text{live}} n_{pk}}$$

    Example:
        >>> mask, groups = torch.ones(4, 1, dtype=torch.bool), group_rows(torch.tensor([0, 0, 1, 1]))
        >>> pooled_variance(group_moments(torch.tensor([[0.0], [2.0], [5.0], [5.0]]), mask, groups)).tolist()
        [1.0]
    """
    live = torch.where(moments.dead, 0.0, moments.count)
    return (live * moments.variance).sum(0) / live.sum(0)  # 0/0 is the NaN we promise


def adaptive_normalize(
    moments: GroupMoments, groups: Groups, scale: Float[Tensor, " K"], blend: float = 1 / 3, clip: float = 5.0
) -> Float[Tensor, "B K"]:
    r"""Stage 1: standardize each objective in its group, by a scale between the group's own and the pooled one.

    $$\sigma_{pk} = \sqrt{\frac{n_{pk} s^2_{pk} + \nu_p S_k^2}{n_{pk} + \nu_p}}, \qquad
    z_{ik} = \mathrm{clip}\left(\frac{d_{ik}}{\sigma_{pk} + 10^{-4} S_k}, \pm c\right), \qquad \nu_p = \beta G_p$$

    with \(S_k\) = `scale`, \(\beta\) = `blend`, \(c\) = `clip` and \(G_p\) the size of the group; 0 where dead or missing. At
    \(\beta = 0\) the scale is the group's standard deviation, at infinity the pooled one. In between, a nearly constant group
    keeps nearly zero scores instead of having its noise blown up. The epsilon is relative to the objective's scale, so
    \(z\) does not change under a positive affine map of a reward; TRL's absolute 1e-4 does not have that property.

    Example:
        >>> mask, groups = torch.ones(2, 1, dtype=torch.bool), group_rows(torch.tensor([0, 0]))
        >>> moments = group_moments(torch.tensor([[1.0], [3.0]], dtype=torch.float64), mask, groups)
        >>> adaptive_normalize(moments, groups, torch.ones(1, dtype=torch.float64), blend=0.0).round().tolist()
        [[-1.0], [1.0]]
    """
    if math.isinf(blend):
        sigma = scale.expand_as(moments.variance)
    else:
        prior = blend * groups.sizes.to(scale.dtype)[:, None]
        total = (moments.count + prior).clamp(min=1e-12)
        sigma = torch.sqrt((moments.count * moments.variance + prior * scale**2) / total)
    denominator = sigma + SMALL_SCALE * scale
    live = ~moments.dead & (denominator > 0)
    factor = torch.where(live, 1.0 / torch.where(live, denominator, 1.0), 0.0)
    return (moments.centred * factor[groups.index]).clamp(-clip, clip)


def share_weights(weights: Float[Tensor, " K"], mask: Bool[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    r"""Each row's weights over the objectives it has; the weights of the missing are shared out.

    $$w_{ik} = \frac{w_k M_{ik}}{\sum_j w_j M_{ij}}$$

    Rows sum to one, or to zero where no weighted objective is there.

    Example:
        >>> share_weights(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([[True, True, False]])).tolist()
        [[0.6666..., 0.3333..., 0.0]]
    """
    masked = weights * mask
    total = masked.sum(1, keepdim=True)
    return masked / torch.where(total > 0, total, 1.0)


def centre_in_group(
    contributions: Float[Tensor, "B K"], present: Bool[Tensor, " B"], groups: Groups
) -> Float[Tensor, "B K"]:
    """Subtract each group's mean over the rows that are present; absent rows become 0."""
    there = present[:, None].to(contributions.dtype)
    means = groups.sum(contributions * there) / groups.sum(there).clamp(min=1.0)
    return (contributions - means[groups.index]) * there


def batch_normalize(
    total: Float[Tensor, " B"], present: Bool[Tensor, " B"], weights: Float[Tensor, " K"], floor: float = 0.5
) -> Float[Tensor, " B"]:
    r"""Stage 2: bring the weighted sum to unit size over the batch, with a floor under the divisor.

    $$\hat A_i = A_i / D, \qquad D = \max(\mathrm{rms}_{batch}(A),\ \kappa \lVert w \rVert_2,\ 10^{-12})$$

    \(A\) = `total` has zero mean in every group, \(\kappa\) = `floor`. The sum of uncorrelated objectives has the size
    \(\lVert w \rVert_2\). If they oppose each other it is smaller, and without a floor we would train on the noise that is left.

    Example:
        >>> total, there = torch.tensor([-2.0, 2.0]), torch.tensor([True, True])
        >>> batch_normalize(total, there, torch.tensor([1.0])).tolist()
        [-1.0, 1.0]
    """
    rms = torch.sqrt((total * total).sum() / present.sum().clamp(min=1))
    divisor = torch.maximum(rms, floor * weights.norm()).clamp(min=1e-12)
    return total / divisor
