"""Progress need: who is behind, against the other objectives or against a target."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def relative_need(
    mean: Float[Tensor, " K"],
    first_mean: Float[Tensor, " K"],
    unit: Float[Tensor, " K"],
    weighted: Bool[Tensor, " K"],
    temperature: float = 0.5,
) -> Float[Tensor, " K"]:
    r"""Need of the objectives that gained less than the others, in units of their spread.

    $$u_k = \frac{f_k - R^0_k}{S_k}, \qquad N_k = \mathrm{sigmoid}\left(\frac{\bar u - u_k}{T}\right)$$

    Args:
        mean (`Tensor` of shape `[K]`): \(f\), fast average of the mean reward.
        first_mean (`Tensor` of shape `[K]`): \(R^0\), its value at the end of the warm-up; NaN where not yet known.
        unit (`Tensor` of shape `[K]`): \(S\), within-group standard deviation, at the end of the warm-up or the largest.
        weighted (`Tensor` of shape `[K]`): true where the user's weight is positive; only these count in \(\bar u\).
        temperature (`float`): \(T\), in units of \(S\).

    Returns:
        `Tensor` of shape `[K]`, in (0, 1); 0.5 where there is no baseline yet.

    Example:
        >>> gains, zero, one = torch.tensor([2.0, 0.0]), torch.zeros(2), torch.ones(2)
        >>> relative_need(gains, zero, one, torch.tensor([True, True])).tolist()
        [0.119..., 0.880...]

    Note:
        Reconstructed from the abstract of arXiv 2601.06574.
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

    Args:
        mean (`Tensor` of shape `[K]`): \(f\), fast average of the mean reward.
        first_mean (`Tensor` of shape `[K]`): \(R^0\), its value at the end of the warm-up; NaN where not yet known.
        first_scale (`Tensor` of shape `[K]`): initial spread; the unit where the target was met from the start.
        targets (`Tensor` of shape `[K]`): \(R^*\), in reward units; NaN where there is none.
        cap (`float`): \(c\), the need of an objective that fell behind its start.

    Returns:
        `Tensor` of shape `[K]`, in [0, c]; NaN where there is no target, 1 where there is no baseline yet.

    Example:
        >>> now, start, target = torch.tensor([0.75]), torch.tensor([0.5]), torch.tensor([1.0])
        >>> target_need(now, start, torch.ones(1), target).tolist()
        [0.5]

    Note:
        Reconstructed from the abstract of arXiv 2601.06574.
    """
    way = targets - first_mean
    need = ((targets - mean) / torch.where(way > 0, way, first_scale)).clamp(0.0, cap)
    return torch.where(targets.isnan(), targets, torch.nan_to_num(need, nan=1.0))
