"""Rewards that cannot be right: finite, but further off than any spread explains."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .state import AggregatorState


def implausible(
    rewards: Float[Tensor, "B K"], valid: Bool[Tensor, "B K"], state: AggregatorState, limit: float
) -> Bool[Tensor, "B K"]:
    r"""Where a reward lies more than `limit` spreads away from what its objective has been like.

    $$|r_{ik} - q_k| > L\, S_k$$

    \(q_k\) = slow mean, \(S_k\) = the largest pooled standard deviation known, \(L\) = `limit`. Before either is known, the
    batch's median stands in for \(q_k\), and the lower quartile of the distances from it that are not zero for \(S_k\).

    A single such value would own the moving averages of variance and mean for hundreds of iterations: at 1e30 among
    values near 1, and a decay of 0.9 an iteration, for more than a thousand.

    Args:
        rewards (`Tensor` of shape `[B, K]`): anything where not valid.
        valid (`Tensor` of shape `[B, K]`): where there is a finite reward.
        state ([`AggregatorState`]): before the batch.
        limit (`float`): \(L\); infinite to keep everything.

    Returns:
        `Tensor` of shape `[B, K]`

    Example:
        >>> state = AggregatorState.initial(torch.ones(1, dtype=torch.float64), 0.05)
        >>> rewards = torch.tensor([[1.0], [2.0], [3.0], [1e30]], dtype=torch.float64)
        >>> implausible(rewards, rewards.isfinite(), state, 1e9).flatten().tolist()
        [False, False, False, True]
    """
    if limit == torch.inf:
        return torch.zeros_like(valid)
    known = torch.where(valid, rewards, torch.nan)
    centre = state.slow.value
    unit = torch.stack([state.scale, state.first_scale, state.largest_scale]).nan_to_num(nan=0.0).amax(0)
    remembered = (unit > 0) & centre.isfinite()
    if not bool(remembered.all()):
        middle = known.nanmedian(0).values
        centre = torch.where(remembered, centre, middle)
        unit = torch.where(remembered, unit, _lower_quartile((known - middle).abs()))
    return (known - centre).abs() > limit * unit


def _lower_quartile(distance: Float[Tensor, "B K"]) -> Float[Tensor, " K"]:
    """Of the distances that are not zero; NaN where there are none."""
    ordered = torch.where(distance > 0, distance, torch.nan).sort(0).values  # NaN last
    count = ordered.isfinite().sum(0)
    return ordered.gather(0, ((count - 1).clamp(min=0) // 4)[None])[0]
