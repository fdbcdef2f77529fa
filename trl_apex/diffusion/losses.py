"""What an update minimizes: the clipped surrogate, and the distance to the reference policy."""

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


def gaussian_kl(
    mean: Float[Tensor, "R C H W"], reference_mean: Float[Tensor, "R C H W"], std: Float[Tensor, "R 1 1 1"]
) -> Float[Tensor, "R"]:
    """KL divergence of two Gaussians with equal variance, averaged over the latent's elements.

    ```
    KL = mean((mean - reference_mean)^2) / (2 std^2)
    ```

    Args:
        mean (`torch.Tensor` of shape `[R, C, H, W]`): of the trained policy; the gradient flows through it.
        reference_mean (`torch.Tensor` of shape `[R, C, H, W]`): of the reference policy.
        std (`torch.Tensor` of shape `[R, 1, 1, 1]`): of both.

    Returns:
        `torch.Tensor` of shape `[R]`

    Example:
        ```python
        >>> import torch
        >>> one = torch.ones(1, 1, 2, 2)
        >>> gaussian_kl(one, 0 * one, torch.full((1, 1, 1, 1), 0.5)).item()
        2.0

        ```

    Note:
        `std` is the transition's whole standard deviation, with its factor `sqrt(-dt)`. Flow-GRPO's code leaves that
        factor out, which makes its KL smaller by `-dt`; a `beta` taken from there has to be multiplied by about that
        (0.1 for ten steps).
    """
    return ((mean - reference_mean) ** 2).flatten(1).mean(1) / (2 * std.flatten() ** 2)
