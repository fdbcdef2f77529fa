"""Learning potential: how much an objective can still teach the policy."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def trend_noise(error: Float[Tensor, " K"], fast_ema: float, slow_ema: float) -> Float[Tensor, " K"]:
    r"""Standard deviation of the gap between a fast and a slow moving average when nothing moves.

    $$\bar e_k \sqrt{\frac{1-\beta_f}{1+\beta_f} + \frac{1-\beta_s}{1+\beta_s}}$$

    Args:
        error (`Tensor` of shape `[K]`): \(\bar e\), standard error of one batch's mean reward, in reward units.
        fast_ema (`float`): \(\beta_f\).
        slow_ema (`float`): \(\beta_s\).

    Returns:
        `Tensor` of shape `[K]`, in reward units.

    Example:
        >>> trend_noise(torch.ones(1), fast_ema=0.0, slow_ema=1.0).tolist()
        [1.0]

    Note:
        The two averages share their batches, so this is an upper bound of the gap's noise.
    """
    return error * math.sqrt((1 - fast_ema) / (1 + fast_ema) + (1 - slow_ema) / (1 + slow_ema))


def learning_potential(
    scale: Float[Tensor, " K"],
    first_scale: Float[Tensor, " K"],
    gap: Float[Tensor, " K"],
    noise: Float[Tensor, " K"],
    dead_fraction: Float[Tensor, " K"],
) -> Float[Tensor, " K"]:
    r"""How much there is left to learn: spread that is left, and movement beyond noise.

    $$L_k = (1 - \mathrm{dead}_k)\left(\tfrac12 \mathrm{clip}(S_k / S^0_k, 0, 1)
    + \tfrac12 \tanh\frac{|f_k - q_k|}{2\,\mathrm{noise}_k}\right)$$

    Args:
        scale (`Tensor` of shape `[K]`): \(S\), pooled within-group standard deviation now, in reward units.
        first_scale (`Tensor` of shape `[K]`): \(S^0\), the same at the end of the warm-up; NaN where not yet known.
        gap (`Tensor` of shape `[K]`): \(|f - q|\), fast minus slow average of the mean reward.
        noise (`Tensor` of shape `[K]`): what [`trend_noise`] gives.
        dead_fraction (`Tensor` of shape `[K]`): share of the groups that are dead for the objective.

    Returns:
        `Tensor` of shape `[K]`, in [0, 1].

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> learning_potential(0.5 * one, one, gap=zero, noise=one, dead_fraction=zero).tolist()
        [0.25]

    Note:
        Reconstructed from the abstract of arXiv 2601.06574.
    """
    spread = torch.nan_to_num(scale / first_scale, nan=1.0, posinf=1.0).clamp(0.0, 1.0)
    ratio = gap.abs() / (2 * torch.where(noise > 0, noise, 1.0))
    moving = torch.where(noise > 0, torch.tanh(ratio), (gap != 0).to(ratio.dtype))
    return (1 - dead_fraction) * 0.5 * (spread + torch.nan_to_num(moving, nan=0.0))
