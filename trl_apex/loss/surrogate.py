"""PPO's clipped objective on (sample, step) rows."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Surrogate(NamedTuple):
    """`loss` and `ratio` of shape `[R]`; `low` and `high` say where the ratio was clipped."""

    loss: Float[Tensor, "R"]
    ratio: Float[Tensor, "R"]
    low: Bool[Tensor, "R"]
    high: Bool[Tensor, "R"]


def clipped_surrogate(
    log_prob: Float[Tensor, "R"],
    old_log_prob: Float[Tensor, "R"],
    advantage: Float[Tensor, "R"],
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
) -> Surrogate:
    """The pessimistic bound on the policy's improvement, to be minimized.

    ```
    loss = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)     r = exp(log_prob - old_log_prob)
    ```

    Args:
        log_prob (`torch.Tensor` of shape `[R]`): under the policy that is trained.
        old_log_prob (`torch.Tensor` of shape `[R]`): recorded at rollout.
        advantage (`torch.Tensor` of shape `[R]`): positive for samples better than their group.
        epsilon, epsilon_high (`float`): clip range.
        delta (`float`, *optional*): upper bound of the unclipped ratio (two-sided clipping, as TRL's `delta`).

    Returns:
        [`Surrogate`]

    Example:
        ```python
        >>> old, new = torch.tensor([0.0]), torch.tensor([0.1])
        >>> result = clipped_surrogate(new, old, torch.tensor([2.0]), 0.05, 0.05)
        >>> round(result.loss.item(), 4), bool(result.high)
        (-2.1, True)

        ```

    Reference: Schulman et al., arXiv 1707.06347, equation 7.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    loss = -torch.minimum(bounded * advantage, clipped * advantage)
    return Surrogate(
        loss, ratio.detach(), (ratio < 1 - epsilon) & (advantage < 0), (ratio > 1 + epsilon_high) & (advantage > 0)
    )
