"""Denoising steps as Gaussian transitions: mean, standard deviation, log-probability.

All arithmetic is float32. `sigma` and `sigma_next` have shape `[R]`; latents and predictions `[R, C, H, W]`.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

LOG_SQRT_2PI = math.log(math.sqrt(2 * math.pi))


class Transition(NamedTuple):
    """A Gaussian over the next latents: `mean` of shape `[R, C, H, W]`, `std` of shape `[R, 1, 1, 1]`."""

    mean: Float[Tensor, "R C H W"]
    std: Float[Tensor, "R 1 1 1"]


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).reshape(-1, *[1] * (like.dim() - 1))


def flow_euler(
    latents: Float[Tensor, "R C H W"],
    velocity: Float[Tensor, "R C H W"],
    sigma: Float[Tensor, "R"],
    sigma_next: Float[Tensor, "R"],
) -> Float[Tensor, "R C H W"]:
    """The deterministic (probability-flow ODE) step: `x + v (sigma_next - sigma)`."""
    return latents + velocity * _column(sigma_next - sigma, latents)


def flow_sde(
    latents: Float[Tensor, "R C H W"],
    velocity: Float[Tensor, "R C H W"],
    sigma: Float[Tensor, "R"],
    sigma_next: Float[Tensor, "R"],
    noise_level: float,
    sigma_max: float,
) -> Transition:
    """One Euler-Maruyama step of the SDE that has the flow's marginals (Flow-SDE).

    With `dt = sigma_next - sigma < 0` and `s = noise_level * sqrt(sigma / (1 - sigma))`:

    ```
    mean = x (1 + s^2 / (2 sigma) dt) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt
    std  = s sqrt(-dt)
    ```

    Args:
        latents (`torch.Tensor` of shape `[R, C, H, W]`): x.
        velocity (`torch.Tensor` of shape `[R, C, H, W]`): v, noise minus image.
        sigma, sigma_next (`torch.Tensor` of shape `[R]`): noise share before and after.
        noise_level (`float`): a. At 0 the step is [`flow_euler`].
        sigma_max (`float`): stands in for sigma in `1 - sigma` where sigma is 1 (the second sigma of the grid).

    Returns:
        [`Transition`]

    Example:
        ```python
        >>> x, v = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> step = flow_sde(x, v, torch.tensor([0.5]), torch.tensor([0.25]), noise_level=0.0, sigma_max=0.9)
        >>> step.mean.item(), step.std.item()
        (-0.25, 0.0)

        ```

    Reference: Flow-GRPO, arXiv 2505.05470, equation of the sampling SDE.
    """
    sigma, sigma_next = _column(sigma, latents), _column(sigma_next, latents)
    dt = sigma_next - sigma
    guarded = torch.where(sigma >= 1, torch.full_like(sigma, sigma_max), sigma)
    s = noise_level * torch.sqrt(sigma / (1 - guarded))
    mean = latents * (1 + s**2 / (2 * sigma) * dt) + velocity * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    return Transition(mean, s * torch.sqrt(-dt))


def cps(
    latents: Float[Tensor, "R C H W"],
    velocity: Float[Tensor, "R C H W"],
    sigma: Float[Tensor, "R"],
    sigma_next: Float[Tensor, "R"],
    noise_level: float,
) -> Transition:
    """One coefficient-preserving step: signal and noise keep the shares that the schedule gives them.

    ```
    std  = sigma_next sin(noise_level pi / 2)
    mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - std^2) x1     x0 = x - sigma v, x1 = x + (1 - sigma) v
    ```

    Args:
        latents, velocity, sigma, sigma_next: as in [`flow_sde`].
        noise_level (`float` in [0, 1]): 0 is [`flow_euler`], 1 replaces all noise.

    Returns:
        [`Transition`]

    Reference: the CPS sampler of Flow-GRPO's code base (coefficients-preserving sampling).
    """
    sigma, sigma_next = _column(sigma, latents), _column(sigma_next, latents)
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    image, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
    mean = image * (1 - sigma_next) + noise * torch.sqrt((sigma_next**2 - std**2).clamp_min(0))
    return Transition(mean, std)


def ddim(
    latents: Float[Tensor, "R C H W"],
    noise_prediction: Float[Tensor, "R C H W"],
    alpha: Float[Tensor, "R"],
    alpha_next: Float[Tensor, "R"],
    eta: float,
) -> Transition:
    """One DDIM step of a variance-preserving model (Stable Diffusion 1.5, SDXL).

    ```
    std  = eta sqrt((1 - alpha_next) / (1 - alpha)) sqrt(1 - alpha / alpha_next)
    mean = sqrt(alpha_next) x0 + sqrt(1 - alpha_next - std^2) eps     x0 = (x - sqrt(1 - alpha) eps) / sqrt(alpha)
    ```

    Args:
        latents (`torch.Tensor` of shape `[R, C, H, W]`): x.
        noise_prediction (`torch.Tensor` of shape `[R, C, H, W]`): eps.
        alpha, alpha_next (`torch.Tensor` of shape `[R]`): cumulative signal share (`alphas_cumprod`) before and after.
        eta (`float` in [0, 1]): 0 is deterministic, 1 is DDPM's variance.

    Returns:
        [`Transition`]

    Reference: Song et al., arXiv 2010.02502, equations 12 and 16.
    """
    alpha, alpha_next = _column(alpha, latents), _column(alpha_next, latents)
    image = (latents - torch.sqrt(1 - alpha) * noise_prediction) / torch.sqrt(alpha)
    std = eta * torch.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next).clamp_min(0))
    mean = torch.sqrt(alpha_next) * image + torch.sqrt((1 - alpha_next - std**2).clamp_min(0)) * noise_prediction
    return Transition(mean, std)


def log_prob(sample: Float[Tensor, "R C H W"], transition: Transition) -> Float[Tensor, "R"]:
    """Gaussian log-density of `sample`, averaged (not summed) over the latent's elements.

    Note:
        The mean, as in Flow-GRPO: it makes the importance ratio move little, which is why clip ranges of 1e-5 to 1e-3
        are usual. Code that sums over elements has to scale its clip range by their number.

    Example:
        ```python
        >>> step = Transition(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 1))
        >>> round(log_prob(torch.zeros(1, 1, 2, 2), step).item(), 4)
        -0.9189

        ```
    """
    mean, std = transition
    density = -((sample - mean) ** 2) / (2 * std**2) - torch.log(std) - LOG_SQRT_2PI
    return density.flatten(1).mean(1)


def squared_error_log_prob(sample: Float[Tensor, "R C H W"], transition: Transition) -> Float[Tensor, "R"]:
    """CPS's score, `-(sample - mean)^2` averaged over elements: the log-density without its `1 / (2 std^2)`."""
    return -((sample - transition.mean) ** 2).flatten(1).mean(1)
