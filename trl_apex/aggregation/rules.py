"""The baseline rules: fixed weights, and weights from the gradients' Gram matrix.

Each static rule returns `(scores, advantages)`: what it sums per objective, and the result. They work in the dtype of
the rewards and in TRL's order of operations, so that `sum_then_normalize` and `normalize_then_sum` give TRL's numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from .normalize import Groups

LARGEST_SQUARED = 1e15  # in float32, the squares of much larger rewards overflow


def wide_enough(rewards: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """The rewards, in float64 where their squares would overflow float32 and every advantage come out as 0.

    Args:
        rewards (`Tensor` of shape `[B, K]`): NaN = missing.

    Returns:
        `Tensor` of shape `[B, K]`: of the same dtype otherwise, so that the rounding is TRL's.

    Example:
        >>> wide_enough(torch.tensor([[1.0]])).dtype, wide_enough(torch.tensor([[1e30]])).dtype
        (torch.float32, torch.float64)
    """
    return rewards.double() if bool((rewards.abs() > LARGEST_SQUARED).any()) else rewards


def group_mean_std(values: Float[Tensor, "B K"], groups: Groups) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K"]]:
    """Mean and sample standard deviation (Bessel's) of each row's group, over its valid values.

    Args:
        values (`Tensor` of shape `[B, K]`): NaN = missing.
        groups ([`Groups`]): the groups of the rows.

    Returns:
        `tuple` of two `Tensor` of shape `[B, K]`; a standard deviation of fewer than two values is NaN, or 0 in a
        group of one row.

    Example:
        >>> from trl_apex.aggregation.normalize import group_rows
        >>> mean, std = group_mean_std(torch.tensor([[1.0], [3.0]]), group_rows(torch.tensor([0, 0])))
        >>> mean.tolist(), std.tolist()
        ([[2.0], [2.0]], [[1.414...], [1.414...]])
    """
    mean, std = torch.empty_like(values), torch.empty_like(values)
    order = torch.argsort(groups.index, stable=True)
    starts = groups.sizes.cumsum(0) - groups.sizes
    for size in groups.sizes.unique().tolist():  # groups of one size form a dense block, so no padding is needed
        first = starts[groups.sizes == size]
        rows = order[first[:, None] + torch.arange(size)]
        block = values[rows]
        middle = torch.nanmean(block, dim=1, keepdim=True)
        mean[rows] = middle.expand_as(block)
        std[rows] = (nanstd(block, 1) if size > 1 else torch.zeros_like(middle)).expand_as(block)
    return mean, std


def nanstd(values: Float[Tensor, " ..."], dim: int = 0) -> Float[Tensor, " ..."]:
    """Sample standard deviation of the valid values along `dim`, which is kept; NaN where there are fewer than two.

    Args:
        values (`Tensor`): NaN = missing.
        dim (`int`): dimension to reduce to size one.

    Returns:
        `Tensor` with size one along `dim`.

    Example:
        >>> nanstd(torch.tensor([1.0, 3.0, float("nan")])).tolist()
        [1.414...]
    """
    deviation = values - torch.nanmean(values, dim=dim, keepdim=True)
    count = (~values.isnan()).sum(dim=dim, keepdim=True)
    variance = torch.nanmean(deviation**2, dim=dim, keepdim=True) * (count / (count - 1))
    return torch.where(count > 1, variance, torch.nan).sqrt()


def weighted_sum(values: Float[Tensor, "B K"], weights: Float[Tensor, " K"]) -> Float[Tensor, " B"]:
    """Weighted sum over the objectives that are there; NaN where none is.

    Args:
        values (`Tensor` of shape `[B, K]`): NaN = missing.
        weights (`Tensor` of shape `[K]`): one per objective.

    Returns:
        `Tensor` of shape `[B]`

    Example:
        >>> weighted_sum(torch.tensor([[1.0, float("nan")]]), torch.tensor([2.0, 3.0])).tolist()
        [2.0]
    """
    return torch.where(values.isnan().all(1), torch.nan, (values * weights).nansum(1))


def sum_then_normalize(
    rewards: Float[Tensor, "B K"],
    weights: Float[Tensor, " K"],
    groups: Groups,
    scale_rewards: str = "group",
    epsilon: float = 1e-4,
) -> tuple[Float[Tensor, "B K"], Float[Tensor, " B"]]:
    r"""Weighted sum of the raw rewards, normalized as one reward.

    $$R_i = \sum_k w_k r_{ik}, \qquad A_i = \frac{R_i - \bar R_{group}}{\mathrm{std}(R) + \epsilon}$$

    Args:
        rewards (`Tensor` of shape `[B, K]`): NaN = missing.
        weights (`Tensor` of shape `[K]`): the user's, not normalized.
        groups ([`Groups`]): the groups of the rows.
        scale_rewards (`str`): standard deviation of the "group" or of the "batch", or "none".
        epsilon (`float`): \(\epsilon\), in reward units.

    Returns:
        `tuple` of the scores of shape `[B, K]` and the advantages of shape `[B]`.

    Example:
        >>> from trl_apex.aggregation.normalize import group_rows
        >>> rewards, one = torch.tensor([[1.0], [3.0]]), torch.tensor([1.0])
        >>> sum_then_normalize(rewards, one, group_rows(torch.tensor([0, 0])), "none")[1].tolist()
        [-1.0, 1.0]

    Note:
        The default of TRL (`trl.GRPOTrainer`) and the rule of Flow-GRPO (arXiv 2505.05470).
    """
    summed = weighted_sum(rewards, weights)
    mean, std = group_mean_std(summed[:, None], groups)
    if scale_rewards == "batch":
        std = nanstd(summed)[:, None].expand_as(mean) if len(summed) > 1 else torch.zeros_like(mean)
    divisor = torch.ones_like(std) if scale_rewards == "none" else std + epsilon
    filled = torch.where(summed.isnan()[:, None], torch.nan, rewards.nan_to_num(nan=0.0))
    scores = (filled - group_mean_std(filled, groups)[0]) / divisor
    advantages = (summed[:, None] - mean) / divisor
    return scores.nan_to_num(nan=0.0), advantages[:, 0].nan_to_num(nan=0.0)


def weighted_advantages(
    rewards: Float[Tensor, "B K"],
    weights: Float[Tensor, " K"],
    groups: Groups,
    scale_rewards: str = "group",
    epsilon: float = 1e-4,
) -> tuple[Float[Tensor, "B K"], Float[Tensor, " B"]]:
    r"""Weighted sum of each objective's own advantage, with no further normalization.

    $$A_i = \sum_k w_k \frac{r_{ik} - \bar r_{group,k}}{\mathrm{std}_k(r) + \epsilon}$$

    Args:
        rewards (`Tensor` of shape `[B, K]`): NaN = missing.
        weights (`Tensor` of shape `[K]`): the user's, not normalized.
        groups ([`Groups`]): the groups of the rows.
        scale_rewards (`str`): standard deviation of the "group" or of the "batch", or "none".
        epsilon (`float`): \(\epsilon\), in reward units.

    Returns:
        `tuple` of the scores of shape `[B, K]` and the advantages of shape `[B]`.

    Example:
        >>> from trl_apex.aggregation.normalize import group_rows
        >>> rewards, one = torch.tensor([[1.0], [3.0]]), torch.tensor([1.0])
        >>> weighted_advantages(rewards, one, group_rows(torch.tensor([0, 0])))[1].tolist()
        [-0.707..., 0.707...]

    Note:
        The rule of MixGRPO and Pref-GRPO.
    """
    mean, std = group_mean_std(rewards, groups)
    if scale_rewards == "batch":
        std = nanstd(rewards).expand_as(rewards) if len(rewards) > 1 else torch.zeros_like(mean)
    scores = (rewards - mean) / (1.0 if scale_rewards == "none" else std + epsilon)
    return scores.nan_to_num(nan=0.0), weighted_sum(scores, weights).nan_to_num(nan=0.0)


def normalize_then_sum(
    rewards: Float[Tensor, "B K"], weights: Float[Tensor, " K"], groups: Groups, epsilon: float = 1e-4
) -> tuple[Float[Tensor, "B K"], Float[Tensor, " B"]]:
    r"""Each objective standardized in its group, then the weighted sum standardized over the batch.

    $$z_{ik} = \frac{r_{ik} - \bar r_{group,k}}{\mathrm{std}_{group,k} + \epsilon}, \qquad
    A_i = \frac{\sum_k w_k z_{ik} - \mathrm{mean}_{batch}}{\mathrm{std}_{batch} + \epsilon}$$

    Args:
        rewards (`Tensor` of shape `[B, K]`): NaN = missing.
        weights (`Tensor` of shape `[K]`): the user's, not normalized.
        groups ([`Groups`]): the groups of the rows.
        epsilon (`float`): \(\epsilon\).

    Returns:
        `tuple` of the scores of shape `[B, K]` and the advantages of shape `[B]`.

    Example:
        >>> from trl_apex.aggregation.normalize import group_rows
        >>> rewards, one = torch.tensor([[1.0], [3.0]]), torch.tensor([1.0])
        >>> normalize_then_sum(rewards, one, group_rows(torch.tensor([0, 0])))[1].tolist()
        [-0.707..., 0.707...]

    Note:
        GDPO (arXiv 2601.05242), TRL's option of the same name.
    """
    mean, std = group_mean_std(rewards, groups)
    scores = (rewards - mean) / (std + epsilon)
    # A row whose rewards are all missing stays out; one that is alone in its group counts as zero, as in TRL.
    summed = torch.where(rewards.isnan().all(1), torch.nan, (scores * weights).nansum(1))
    std_batch = nanstd(summed) if len(summed) > 1 else torch.zeros_like(summed)
    advantages = (summed - torch.nanmean(summed)) / (std_batch + epsilon)
    return scores.nan_to_num(nan=0.0), advantages.nan_to_num(nan=0.0)


def dvao(
    rewards: Float[Tensor, "B K"], weights: Float[Tensor, " K"], groups: Groups, epsilon: float = 1e-4
) -> tuple[Float[Tensor, "B K"], Float[Tensor, " B"]]:
    r"""Weighted sum of centred rewards over the weighted sum of their group standard deviations.

    $$A_i = \frac{\sum_k w_k (r_{ik} - \bar r_{group,k})}{\sum_k w_k\, \mathrm{std}_{group,k} + \epsilon}$$

    Args:
        rewards (`Tensor` of shape `[B, K]`): NaN = missing.
        weights (`Tensor` of shape `[K]`): non-negative.
        groups ([`Groups`]): the groups of the rows.
        epsilon (`float`): \(\epsilon\), in reward units.

    Returns:
        `tuple` of the scores of shape `[B, K]` and the advantages of shape `[B]`.

    Example:
        >>> from trl_apex.aggregation.normalize import group_rows
        >>> rewards, one = torch.tensor([[1.0], [3.0]]), torch.tensor([1.0])
        >>> dvao(rewards, one, group_rows(torch.tensor([0, 0])))[1].tolist()
        [-0.707..., 0.707...]

    Note:
        After arXiv 2605.25604. Inside a group its direction is the plain sum's: a large-scale reward still dominates.
    """
    mean, std = group_mean_std(rewards, groups)
    divisor = (weights * std).nansum(1, keepdim=True) + epsilon
    scores = ((rewards - mean) / divisor).nan_to_num(nan=0.0)
    return scores, (weights * scores).sum(1)
