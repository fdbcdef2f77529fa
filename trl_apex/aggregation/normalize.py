"""Dual-stage normalization: each objective inside its group, then the weighted sum over the batch.

B rows are in P groups (one per prompt) and have K objectives. `mask` and `valid` are true for rewards that count, `present` for
rows with a weighted objective. Everything is computed on the device and in the dtype of the inputs. The equations are
reconstructed from the abstract of arXiv 2601.06574.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Rows = Float[Tensor, "B K"]
Vector = Float[Tensor, " K"]
Matrix = Float[Tensor, "K K"]
Valid = Bool[Tensor, "B K"]
Flags = Bool[Tensor, " K"]

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


def implausible(rewards: Rows, valid: Valid, centre: Vector, unit: Vector, limit: float) -> Valid:
    """Find rewards more than `limit` spreads (`unit`) away from their objective's mean so far (`centre`).

    One reward of 1e30 among values near 1 would own the moving averages for more than a thousand iterations. If `centre` is
    NaN or `unit` 0, the batch's median is used, and as unit the lower quartile of the distances from it that are not zero.
    """
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


def group_moments(rewards: Rows, mask: Valid, groups: Groups, tolerance: float = 1e-6) -> GroupMoments:
    """Mean, variance and liveness of each objective in each group, over the valid rewards.

    A group is dead if it has fewer than two valid rewards, if they all lie within `tolerance` times the mean of each other
    (rounding noise of a constant), or if their variance is exactly zero.
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


def pooled_variance(moments: GroupMoments) -> Vector:
    r"""Variance within the live groups, \(\sum_p n_{pk} s^2_{pk} / \sum_p n_{pk}\); NaN where an objective has none."""
    live = torch.where(moments.dead, 0.0, moments.count)
    return (live * moments.variance).sum(0) / live.sum(0)  # 0/0 is the NaN we promise


def adaptive_normalize(
    moments: GroupMoments, groups: Groups, scale: Vector, blend: float = 1 / 3, clip: float = 5.0
) -> Rows:
    r"""Stage 1: standardize each objective in its group, by a scale between the group's own and the pooled one.

    $$\sigma_{pk} = \sqrt{\frac{n_{pk} s^2_{pk} + \nu_p S_k^2}{n_{pk} + \nu_p}}, \qquad
    z_{ik} = \mathrm{clip}\left(\frac{d_{ik}}{\sigma_{pk} + 10^{-4} S_k}, \pm c\right), \qquad \nu_p = \beta G_p$$

    with \(S_k\) = `scale`, \(\beta\) = `blend`, \(c\) = `clip` and \(G_p\) the size of the group; 0 where dead or missing. At
    \(\beta = 0\) the scale is the group's standard deviation, at infinity the pooled one. In between, a nearly constant group
    keeps nearly zero scores instead of having its noise blown up. A positive affine map of a reward does not change \(z\).
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


def share_weights(weights: Vector, mask: Valid) -> Rows:
    r"""Each row's weights over the objectives it has, \(w_k M_{ik} / \sum_j w_j M_{ij}\); 0 if it has no weighted one.

    Example:
        >>> share_weights(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([[True, True, False]])).tolist()
        [[0.6666..., 0.3333..., 0.0]]
    """
    masked = weights * mask
    total = masked.sum(1, keepdim=True)
    return masked / torch.where(total > 0, total, 1.0)


def centre_in_group(contributions: Rows, present: Bool[Tensor, " B"], groups: Groups) -> Rows:
    """Subtract each group's mean over the rows that are present; absent rows become 0."""
    there = present[:, None].to(contributions.dtype)
    means = groups.sum(contributions * there) / groups.sum(there).clamp(min=1.0)
    return (contributions - means[groups.index]) * there


def batch_normalize(
    total: Float[Tensor, " B"], present: Bool[Tensor, " B"], weights: Vector, floor: float = 0.5
) -> Float[Tensor, " B"]:
    r"""Stage 2: bring the weighted sum to unit size over the batch, with a floor under the divisor.

    $$\hat A_i = A_i / D, \qquad D = \max(\mathrm{rms}_{batch}(A),\ \kappa \lVert w \rVert_2,\ 10^{-12})$$

    \(A\) = `total` has zero mean in every group, \(\kappa\) = `floor`. The sum of uncorrelated objectives has the size
    \(\lVert w \rVert_2\). If they oppose each other it is smaller, and without a floor we would train on the noise that is left.
    """
    rms = torch.sqrt((total * total).sum() / present.sum().clamp(min=1))
    divisor = torch.maximum(rms, floor * weights.norm()).clamp(min=1e-12)
    return total / divisor
