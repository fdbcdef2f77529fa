"""What an update minimizes: the clipped ratio of denoising steps and its KL divergence, and three flow-matching losses.

AWM, DiffusionNFT and the flow-matching ratio need a rollout's final latents alone. A row is one image x0 at one noise level t:
`x_t = (1 - t) x0 + t eps` with fresh noise eps and target velocity `u = eps - x0`. No log-probability and no trajectory is
stored, so the rollout may be deterministic. Numbers of a row are means over latent elements, in float32.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

WEIGHTINGS = ("ghuber", "huber", "uniform", "t", "t2")
"""How AWM turns a squared error at noise level t into a likelihood."""
TIMESTEP_SAMPLING = ("grid", "stratified", "uniform", "logit_normal")
"""Where the noise levels of the rows come from."""
TINY = 1e-10


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


def add_noise(
    clean: Float[Tensor, "R C H W"], noise: Float[Tensor, "R C H W"], sigmas: Float[Tensor, "R"]
) -> Float[Tensor, "R C H W"]:
    """Latents at noise level `sigmas`: `x_t = (1 - t) x0 + t eps`.

    Example:
        ```python
        >>> one = torch.ones(1, 1, 1, 1)
        >>> add_noise(one, 3 * one, torch.tensor([0.25])).item()
        1.5

        ```
    """
    t = sigmas.view(-1, 1, 1, 1)
    return (1 - t) * clean + t * noise


def squared_error(prediction: Float[Tensor, "R C H W"], target: Float[Tensor, "R C H W"]) -> Float[Tensor, "R"]:
    """Mean over latent elements of `(prediction - target)^2`."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def awm_log_likelihood(
    velocity: Float[Tensor, "R C H W"],
    target: Float[Tensor, "R C H W"],
    sigmas: Float[Tensor, "R"],
    weighting: str = "ghuber",
    power: float = 0.25,
) -> Float[Tensor, "R"]:
    """Advantage Weighted Matching's surrogate of the log-likelihood of an image at one noise level.

    ```
    m = mean (v - u)^2
    ghuber   L = -(t / p) ((m + 1e-10)^p - (1e-10)^p)      p = power
    huber    L = -t (sqrt(m + 1e-10) - 1e-5)
    uniform  L = -m         t  L = -t m         t2  L = -t^2 m
    ```

    Args:
        velocity (`torch.Tensor` of shape `[R, C, H, W]`): the model's prediction.
        target (`torch.Tensor` of shape `[R, C, H, W]`): `noise - image`.
        sigmas (`torch.Tensor` of shape `[R]`): noise level t of each row, in [0, 1].
        weighting (`str`): one of `WEIGHTINGS`.
        power (`float`): p of "ghuber".

    Returns:
        `torch.Tensor` of shape `[R]`, 0 where the prediction is perfect.

    Example:
        ```python
        >>> zero, t = torch.zeros(1, 1, 2, 2), torch.tensor([0.5])
        >>> round(awm_log_likelihood(zero + 2, zero, t, "t2").item(), 6)
        -1.0

        ```

    Reference: Advantage Weighted Matching, arXiv 2509.25050.
    """
    error, t = squared_error(velocity, target), sigmas.float()
    if weighting == "ghuber":
        return -(t / power) * ((error + TINY) ** power - TINY**power)
    if weighting == "huber":
        return -t * ((error + TINY).sqrt() - math.sqrt(TINY))
    return -error * {"uniform": torch.ones_like(t), "t": t, "t2": t * t}[weighting]


def fpo_log_likelihood(
    velocity: Float[Tensor, "R C H W"], target: Float[Tensor, "R C H W"], scale: float = 10.0
) -> Float[Tensor, "R"]:
    """The flow-matching loss as a log-likelihood, so that `exp(new - old)` is a ratio to clip.

    ```
    L = -b mean (v - u)^2,   ratio = exp(b (l_old - l_new))
    ```

    Args:
        velocity (`torch.Tensor` of shape `[R, C, H, W]`): the model's prediction.
        target (`torch.Tensor` of shape `[R, C, H, W]`): `noise - image`.
        scale (`float`): b, how much a change of the loss changes the ratio.

    Returns:
        `torch.Tensor` of shape `[R]`

    Reference: Flow Matching Policy Gradients, arXiv 2507.21053.
    """
    return -scale * squared_error(velocity, target)


def nft_loss(
    velocity: Float[Tensor, "R C H W"],
    old_velocity: Float[Tensor, "R C H W"],
    noisy: Float[Tensor, "R C H W"],
    clean: Float[Tensor, "R C H W"],
    sigmas: Float[Tensor, "R"],
    advantage: Float[Tensor, "R"],
    beta: float = 1.0,
    advantage_clip: float = 5.0,
) -> Float[Tensor, "R"]:
    r"""DiffusionNFT: pull a good image's velocity towards the model, push a bad one's away, around the old policy.

    ```
    r  = clip(A, +-c) / (2 c) + 1/2                                   c = advantage_clip
    v+ = beta v + (1 - beta) v_old        v- = (1 + beta) v_old - beta v
    l± = mean (x±  - x0)^2 / max(mean |x± - x0|, 1e-5)                x± = x_t - t v±, the divisor without gradient
    loss = c (r l+ + (1 - r) l-) / beta
    ```

    Args:
        velocity (`torch.Tensor` of shape `[R, C, H, W]`): the trained model's prediction; the gradient flows through it.
        old_velocity (`torch.Tensor` of shape `[R, C, H, W]`): that of the policy that sampled.
        noisy, clean (`torch.Tensor` of shape `[R, C, H, W]`): \(x_t\) and \(x_0\).
        sigmas (`torch.Tensor` of shape `[R]`): t.
        advantage (`torch.Tensor` of shape `[R]`)
        beta (`float`): how far the two branches lie from the old policy. The paper uses 1, and .1 for text and for
            several rewards.
        advantage_clip (`float`): c.

    Returns:
        `torch.Tensor` of shape `[R]`. Where the model equals the old policy its value does not depend on the
        advantage; its gradient does, with the factor `2 r - 1`.

    Reference: DiffusionNFT, arXiv 2509.16117.
    """
    share = advantage.float().clamp(-advantage_clip, advantage_clip) / (2 * advantage_clip) + 0.5
    new, old, start = velocity.float(), old_velocity.float(), clean.float()
    t = sigmas.float().view(-1, 1, 1, 1)

    def branch(v: Tensor) -> Tensor:
        error = (noisy.float() - t * v - start).flatten(1)
        return (error.square() / error.detach().abs().mean(1, keepdim=True).clamp(min=1e-5)).mean(1)

    positive = branch(beta * new + (1 - beta) * old)
    negative = branch((1 + beta) * old - beta * new)
    return advantage_clip * (share * positive + (1 - share) * negative) / beta


def training_sigmas(
    strategy: str,
    grid: Float[Tensor, "T1"],
    shape: tuple[int, int],
    generator: torch.Generator,
    shift: float = 3.0,
    low: float = 0.0,
    high: float = 1.0,
) -> Float[Tensor, "B N"]:
    """Noise levels to train on, N for each of B images.

    | strategy | levels |
    |---|---|
    | grid | N different ones of the rollout's own levels that lie in `[low, high]`, in random order |
    | stratified | one from each of N equal parts of those levels, in random order |
    | uniform | uniform in `[low, high]`, then shifted |
    | logit_normal | sigmoid of a normal draw, shifted, clamped to `[low, high]` |

    The shift is `t <- s t / (1 + (s - 1) t)`.

    Args:
        strategy (`str`): one of `TIMESTEP_SAMPLING`.
        grid (`torch.Tensor` of shape `[T + 1]`): the rollout's noise levels, falling to 0.
        shape (`tuple[int, int]`): images B, levels an image N.
        generator (`torch.Generator`): on the CPU.
        shift (`float`): s of the continuous strategies; 1 for none.
        low, high (`float`): bounds on the level.

    Returns:
        `torch.Tensor` of shape `[B, N]`, float32, above 0.

    Raises:
        ValueError: if the grid has fewer than N levels in the bounds.

    Example:
        ```python
        >>> levels = training_sigmas("grid", torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), (2, 4), torch.Generator())
        >>> levels.sort(1).values.tolist()
        [[0.25, 0.5, 0.75, 1.0], [0.25, 0.5, 0.75, 1.0]]

        ```
    """
    images, count = shape
    if strategy in ("grid", "stratified"):
        levels = grid[:-1].float()
        levels = levels[(levels >= low) & (levels <= high)]
        if len(levels) < count:
            raise ValueError(
                f"`timesteps_per_image` must be at most {len(levels)}, the rollout's noise levels in [{low}, {high}] "
                f"(`timestep_range`). Found {count}. Lower it, raise `num_inference_steps`, or set "
                "timestep_sampling='uniform'."
            )
        order = torch.rand(images, len(levels), generator=generator).argsort(1)[:, :count]
        if strategy == "stratified":
            edges = torch.arange(count + 1) * len(levels) // count
            offset = torch.rand(images, count, generator=generator) * (edges[1:] - edges[:-1])
            order = edges[:-1] + offset.long()
            order = order.gather(1, torch.rand(images, count, generator=generator).argsort(1))
        return levels[order]
    if strategy == "uniform":
        drawn = low + (high - low) * torch.rand(images, count, generator=generator)
    else:
        drawn = torch.sigmoid(torch.randn(images, count, generator=generator))
    shifted = shift * drawn / (1 + (shift - 1) * drawn)
    return shifted.clamp(max(low, 1e-3), high)
