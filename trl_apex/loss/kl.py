"""How far a denoising step has moved from the reference model's."""

from jaxtyping import Float
from torch import Tensor


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
