"""Denoising steps: Gaussian transitions with their log-probability, and deterministic steps.

Latents x and predictions have shape `[R, C, H, W]`; the noise levels before and after a step (`sigma` and `sigma_next`, or
`alpha` and `alpha_next`) have shape `[R]`. Everything is computed on the device and in the dtype of the latents, float32.
A velocity v is noise minus image. In formulas, dt = sigma_next - sigma < 0, x0 = x - sigma v and x1 = x + (1 - sigma) v.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .nouns import Latents, PerRow

LOG_SQRT_2PI = math.log(math.sqrt(2 * math.pi))


class Transition(NamedTuple):
    """A Gaussian over the next latents."""

    mean: Latents
    std: Float[Tensor, "R 1 1 1"]


def flow_euler(latents: Latents, velocity: Latents, sigma: PerRow, sigma_next: PerRow) -> Latents:
    """The deterministic (probability-flow ODE) step: `x + v dt`."""
    return latents + velocity * _column(sigma_next - sigma, latents)


def flow_heun(
    latents: Latents, velocity: Latents, velocity_ahead: Latents, sigma: PerRow, sigma_next: PerRow
) -> Latents:
    """Heun's deterministic step, of second order: `x + (v + v_ahead) / 2 dt`, v_ahead predicted where [`flow_euler`] arrives."""
    return flow_euler(latents, (velocity + velocity_ahead) / 2, sigma, sigma_next)


def flow_dpmpp_2m(
    latents: Latents, velocity: Latents, image_before: Latents, sigma_before: PerRow, sigma: PerRow, sigma_next: PerRow
) -> Latents:
    """A deterministic step towards an image extrapolated from the last two predictions (DPM-Solver++ 2M), of second order.

        x sigma_next / sigma + D (1 - sigma_next / sigma)
        D = x0 + (x0 - x0_before) h / (2 h_before)                   h = logit(sigma) - logit(sigma_next)

    Args:
        image_before: x0 as predicted one step earlier, at `sigma_before`. From pure noise (1) the step is [`flow_euler`].
        sigma_next: above 0.

    Source: Lu et al., arXiv 2211.01095, algorithm 2.
    """
    change = _column((sigma.logit() - sigma_next.logit()) / (sigma_before.logit() - sigma.logit()) / 2, latents)
    level = _column(sigma, latents)
    extrapolated = velocity - (latents - level * velocity - image_before) * change / level
    return flow_euler(latents, extrapolated, sigma, sigma_next)


def flow_sde(
    latents: Latents, velocity: Latents, sigma: PerRow, sigma_next: PerRow, noise_level: float, sigma_max: float
) -> Transition:
    """One Euler-Maruyama step of the SDE that has the flow's marginals (Flow-SDE).

        mean = x (1 + s^2 / (2 sigma) dt) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt
        std  = s sqrt(-dt)                                           s = noise_level sqrt(sigma / (1 - sigma))

    Args:
        noise_level: at 0 the step is [`flow_euler`].
        sigma_max: the second sigma of the grid. The first one is 1 or nearly so, where s grows without bound: in
            `1 - sigma`, a sigma above `sigma_max` counts as `sigma_max`.

    Example:
        >>> x, v = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> step = flow_sde(x, v, torch.tensor([0.5]), torch.tensor([0.25]), noise_level=0.0, sigma_max=0.9)
        >>> step.mean.item(), step.std.item()
        (-0.25, 0.0)

    Source: Flow-GRPO, arXiv 2505.05470, equation of the sampling SDE.
    """
    sigma, sigma_next = _column(sigma, latents), _column(sigma_next, latents)
    dt = sigma_next - sigma
    s = noise_level * torch.sqrt(sigma / (1 - sigma.clamp(max=sigma_max)))
    mean = latents * (1 + s**2 / (2 * sigma) * dt) + velocity * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    return Transition(mean, s * torch.sqrt(-dt))


def cps(latents: Latents, velocity: Latents, sigma: PerRow, sigma_next: PerRow, noise_level: float) -> Transition:
    """One coefficient-preserving step: signal and noise keep the shares that the schedule gives them.

        mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - std^2) x1
        std  = sigma_next sin(noise_level pi / 2)

    At `noise_level` 0 this is [`flow_euler`]; 1 replaces all noise.

    Source: Coefficients-Preserving Sampling, arXiv 2509.05952.
    """
    sigma, sigma_next = _column(sigma, latents), _column(sigma_next, latents)
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    image, noise = latents - sigma * velocity, latents + (1 - sigma) * velocity
    mean = image * (1 - sigma_next) + noise * torch.sqrt((sigma_next**2 - std**2).clamp_min(0))
    return Transition(mean, std)


def ddim(
    latents: Latents, prediction: Latents, alpha: PerRow, alpha_next: PerRow, eta: float, v_prediction: bool = False
) -> Transition:
    """One DDIM step of a variance-preserving model (Stable Diffusion 1.5, SDXL).

        mean = sqrt(alpha_next) x0 + sqrt(1 - alpha_next - std^2) eps     x0 = (x - sqrt(1 - alpha) eps) / sqrt(alpha)
        std  = eta sqrt((1 - alpha_next) / (1 - alpha)) sqrt(1 - alpha / alpha_next)

    Args:
        prediction: eps, or v if `v_prediction`: `x0 = sqrt(alpha) x - sqrt(1 - alpha) v` and
            `eps = sqrt(alpha) v + sqrt(1 - alpha) x`, which hold at alpha 0 too (a schedule that starts from pure noise).
        alpha, alpha_next: cumulative signal share (`alphas_cumprod`) before and after.
        eta: 0 is deterministic, 1 is DDPM's variance.

    Source: Song et al., arXiv 2010.02502, equations 12 and 16.
    """
    alpha, alpha_next = _column(alpha, latents), _column(alpha_next, latents)
    signal, noise = torch.sqrt(alpha), torch.sqrt(1 - alpha)
    if v_prediction:
        image, noise_prediction = signal * latents - noise * prediction, signal * prediction + noise * latents
    else:
        image, noise_prediction = (latents - noise * prediction) / signal, prediction
    std = eta * torch.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next).clamp_min(0))
    mean = torch.sqrt(alpha_next) * image + torch.sqrt((1 - alpha_next - std**2).clamp_min(0)) * noise_prediction
    return Transition(mean, std)


def log_prob(sample: Latents, transition: Transition) -> PerRow:
    """Gaussian log-density of `sample`, averaged (not summed) over the latent's elements, as in Flow-GRPO.

    The mean makes the importance ratio move little, which is why clip ranges of 1e-5 to 1e-3 are usual.

    Example:
        >>> step = Transition(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 1))
        >>> round(log_prob(torch.zeros(1, 1, 2, 2), step).item(), 4)
        -0.9189
    """
    mean, std = transition
    density = -((sample - mean) ** 2) / (2 * std**2) - torch.log(std) - LOG_SQRT_2PI
    return density.flatten(1).mean(1)


def squared_error_log_prob(sample: Latents, transition: Transition) -> PerRow:
    """CPS's score, `-(sample - mean)^2` averaged over elements: the log-density without its `1 / (2 std^2)`."""
    return -((sample - transition.mean) ** 2).flatten(1).mean(1)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).reshape(-1, *[1] * (like.dim() - 1))
