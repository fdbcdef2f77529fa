"""What an update minimizes: the clipped ratio of denoising steps, its guards and KL divergence, and three flow-matching losses.

A row is one pair of (image, trained step); its numbers are means over latent elements, in float32. AWM, DiffusionNFT and the
flow-matching ratio need a rollout's final latents alone. Their row is one image x0 at one noise level t, with fresh noise eps:
`x_t = (1 - t) x0 + t eps`, and the velocity that the model v should predict is `u = eps - x0`. The rollout may be deterministic.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .nouns import Latents, PerRow

GUARDS = ("kl_mask", "grpo_guard")
"""What may take the place of the plain clipped ratio of denoising steps."""
WEIGHTINGS = ("ghuber", "huber", "uniform", "t", "t2")
"""How AWM turns a squared error at noise level t into a likelihood."""
SHIFTED = ("uniform", "logit_normal")
TIMESTEP_SAMPLING = ("grid", "stratified", *SHIFTED)
"""Where the noise levels of the rows come from; `timestep_shift` moves those of `SHIFTED`."""
TINY = 1e-10
NFT_CLIP = 5.0
"""Where DiffusionNFT clips advantages."""


class Surrogate(NamedTuple):
    """`low` and `high` say where the ratio fell below or rose above its limit and the row has no gradient."""

    loss: PerRow
    ratio: PerRow
    low: Bool[Tensor, "R"]
    high: Bool[Tensor, "R"]


def clipped_surrogate(
    log_prob: PerRow,
    old_log_prob: PerRow,
    advantage: PerRow,
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
) -> Surrogate:
    """The pessimistic bound on the policy's improvement, to be minimized.

        loss = -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)         r = exp(log_prob - old_log_prob)

    Args:
        old_log_prob: under the policy that sampled.
        advantage: A, positive for images better than their group.
        delta: upper bound of the unclipped ratio (two-sided clipping, as TRL's `delta`).

    Example:
        >>> old, new = torch.tensor([0.0]), torch.tensor([0.1])
        >>> result = clipped_surrogate(new, old, torch.tensor([2.0]), 0.05, 0.05)
        >>> round(result.loss.item(), 4), bool(result.high)
        (-2.1, True)

    Source: Schulman et al., arXiv 1707.06347, equation 7.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    loss = -torch.minimum(bounded * advantage, clipped * advantage)
    low, high = (ratio < 1 - epsilon) & (advantage < 0), (ratio > 1 + epsilon_high) & (advantage > 0)
    return Surrogate(loss, ratio.detach(), low, high)


def gaussian_kl(mean: Latents, reference_mean: Latents, std: Float[Tensor, "R 1 1 1"]) -> PerRow:
    """KL divergence of two Gaussians with equal variance, averaged over the latent's elements.

        KL = mean((mean - reference_mean)^2) / (2 std^2)

    Args:
        std: of the transition, with its factor `sqrt(-dt)`. Flow-GRPO's code leaves the factor out, so that its KL is
            smaller by `-dt`: multiply a `beta` from there by about that (0.1 for ten steps).
    """
    return ((mean - reference_mean) ** 2).flatten(1).mean(1) / (2 * std.flatten() ** 2)


def kl_masked_surrogate(
    log_prob: PerRow, old_log_prob: PerRow, advantage: PerRow, kl: PerRow, threshold: float = 1e-5
) -> Surrogate:
    """Flow-DPPO: the ratio without a clip; a row is dropped where the step has moved too far and would move further.

        loss = -r A,  and 0 where KL > threshold and (r - 1) A > 0         r = exp(log_prob - old_log_prob)

    with [`gaussian_kl`] of the trained policy's step to that of the policy that sampled.

    Example:
        >>> new, far = torch.tensor([0.1, 0.1]), torch.tensor([1.0, 1.0])
        >>> kl_masked_surrogate(new, 0 * new, torch.tensor([2.0, -2.0]), far).loss.tolist()
        [0.0, 2.2103...]

    Source: Flow-DPPO, arXiv 2606.11025, equation 18.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    far = kl > threshold
    low, high = far & (ratio < 1) & (advantage < 0), far & (ratio > 1) & (advantage > 0)
    return Surrogate(torch.where(low | high, 0.0, -ratio * advantage), ratio.detach(), low, high)


def grpo_guard_surrogate(
    mean: Latents,
    old_mean: Latents,
    sample: Latents,
    std: Float[Tensor, "R 1 1 1"],
    step_length: PerRow,
    advantage: PerRow,
    epsilon: float = 2e-6,
    epsilon_high: float = 2e-6,
    delta: float | None = None,
) -> Surrogate:
    """GRPO-Guard: ratios of Flow-SDE steps with one center and one scale at every noise level, and gradients of one size.

        loss  = clipped_surrogate(log r, 0, A) / step_length
        log r = std (log_prob - old_log_prob + KL) = mean((mean - old_mean) (sample - old_mean)) / std

    The plain log-ratio has the mean -KL and a spread that grows with 1 / std. Few good images then reach the clip.

    Args:
        mean, old_mean, std: of the step under the trained policy and under the one that sampled.
        sample: the latents that the rollout drew.
        step_length: `sigma - sigma_next`.
        advantage, epsilon, epsilon_high, delta: as in [`clipped_surrogate`].

    Source: GRPO-Guard, arXiv 2510.22319, equations 8 and 12; epsilon of its code for text and GenEval (PickScore: 4e-6).
    """
    log_ratio = ((mean - old_mean) * (sample - old_mean)).flatten(1).mean(1) / std.flatten()
    clipped = clipped_surrogate(log_ratio, torch.zeros_like(log_ratio), advantage, epsilon, epsilon_high, delta)
    return clipped._replace(loss=clipped.loss / step_length)


def add_noise(clean: Latents, noise: Latents, sigmas: PerRow) -> Latents:
    """Latents at noise level t = `sigmas`: `x_t = (1 - t) x0 + t eps`."""
    t = sigmas.view(-1, 1, 1, 1)
    return (1 - t) * clean + t * noise


def squared_error(prediction: Latents, target: Latents) -> PerRow:
    """Mean over latent elements of `(prediction - target)^2`."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def awm_log_likelihood(velocity: Latents, target: Latents, sigmas: PerRow, weighting: str = "ghuber") -> PerRow:
    """Advantage Weighted Matching's surrogate of an image's log-likelihood; 0 where the prediction is perfect.

        m = mean (v - u)^2
        ghuber   L = -(t / p) ((m + 1e-10)^p - (1e-10)^p)      p = 1/4
        huber    L = -t (sqrt(m + 1e-10) - 1e-5)
        uniform  L = -m         t  L = -t m         t2  L = -t^2 m

    Args:
        target: u.
        sigmas: the noise level t of each row, in [0, 1].
        weighting: one of `WEIGHTINGS`.

    Source: Advantage Weighted Matching, arXiv 2509.25050.
    """
    error, t = squared_error(velocity, target), sigmas.float()
    if weighting == "ghuber":
        return -(t / 0.25) * ((error + TINY) ** 0.25 - TINY**0.25)
    if weighting == "huber":
        return -t * ((error + TINY).sqrt() - math.sqrt(TINY))
    return -error * {"uniform": torch.ones_like(t), "t": t, "t2": t * t}[weighting]


def fpo_log_likelihood(velocity: Latents, target: Latents, scale: float = 10.0) -> PerRow:
    """The flow-matching loss as a log-likelihood `-scale mean (v - u)^2`, so that `exp(new - old)` is a ratio to clip.

    Source: Flow Matching Policy Gradients, arXiv 2507.21053.
    """
    return -scale * squared_error(velocity, target)


def nft_share(advantage: Tensor) -> Tensor:
    """DiffusionNFT's share r of the good branch, in [0, 1]: `clip(A, +-c) / (2 c) + 1/2`, with c = `NFT_CLIP`."""
    return advantage.float().clamp(-NFT_CLIP, NFT_CLIP) / (2 * NFT_CLIP) + 0.5


def nft_loss(
    velocity: Latents,
    old_velocity: Latents,
    noisy: Latents,
    clean: Latents,
    sigmas: PerRow,
    advantage: PerRow,
    beta: float = 1.0,
) -> PerRow:
    """DiffusionNFT: pull a good image's velocity towards the model, push a bad one's away, around the old policy.

        r  = clip(A, +-c) / (2 c) + 1/2                                   c = 5
        v+ = beta v + (1 - beta) v_old        v- = (1 + beta) v_old - beta v
        l± = mean (x±  - x0)^2 / max(mean |x± - x0|, 1e-5)                x± = x_t - t v±, the divisor without gradient
        loss = c (r l+ + (1 - r) l-) / beta

    The loss is affine in r. Where v = v_old its value does not depend on r; its gradient does, with the factor `2 r - 1`.

    Args:
        old_velocity: of the policy that sampled: in the paper a copy of the weights that follows slowly.
        noisy, clean, sigmas: x_t, x0 and t.
        beta: how far the two branches lie from the old policy; the paper's 1, and .1 for text and for several rewards.

    Source: DiffusionNFT, arXiv 2509.16117.
    """
    share = nft_share(advantage)
    new, old, start = velocity.float(), old_velocity.float(), clean.float()
    t = sigmas.float().view(-1, 1, 1, 1)

    def branch(v: Tensor) -> Tensor:
        error = (noisy.float() - t * v - start).flatten(1)
        return (error.square() / error.detach().abs().mean(1, keepdim=True).clamp(min=1e-5)).mean(1)

    positive = branch(beta * new + (1 - beta) * old)
    negative = branch((1 + beta) * old - beta * new)
    return NFT_CLIP * (share * positive + (1 - share) * negative) / beta


def training_sigmas(
    strategy: str,
    grid: Float[Tensor, "T1"],
    shape: tuple[int, int],
    generator: torch.Generator,
    shift: float = 3.0,
    low: float = 0.0,
    high: float = 1.0,
) -> Float[Tensor, "B N"]:
    """Noise levels to train on, N for each of B images, above 0.

    | strategy | levels |
    |---|---|
    | grid | N different ones of the rollout's own levels that lie in `[low, high]`, in random order |
    | stratified | one from each of N equal parts of those levels, in random order |
    | uniform | uniform in `[low, high]`, then shifted |
    | logit_normal | sigmoid of a normal draw, shifted, clamped to `[low, high]` |

    Args:
        grid: the rollout's noise levels, falling to 0, at least N of them in the bounds.
        shape: B, N.
        generator: on the CPU.
        shift: s of the continuous strategies, `t <- s t / (1 + (s - 1) t)`; 1 for none.

    Example:
        >>> levels = training_sigmas("grid", torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), (2, 4), torch.Generator())
        >>> levels.sort(1).values.tolist()
        [[0.25, 0.5, 0.75, 1.0], [0.25, 0.5, 0.75, 1.0]]
    """
    images, count = shape
    uniform = partial(torch.rand, generator=generator, dtype=torch.float32)
    if strategy in ("grid", "stratified"):
        levels = grid[:-1].float()
        levels = levels[(levels >= low) & (levels <= high)]
        if len(levels) < count:
            raise ValueError(
                f"`timesteps_per_image` must be at most {len(levels)}, the rollout's noise levels in [{low}, {high}] "
                f"(`timestep_range`). Found {count}. Lower it, raise `num_inference_steps`, or set "
                "timestep_sampling='uniform'."
            )
        order = uniform(images, len(levels)).argsort(1)[:, :count]
        if strategy == "stratified":
            edges = torch.arange(count + 1) * len(levels) // count
            offset = uniform(images, count) * (edges[1:] - edges[:-1])
            order = edges[:-1] + offset.long()
            order = order.gather(1, uniform(images, count).argsort(1))
        return levels[order]
    if strategy == "uniform":
        drawn = low + (high - low) * uniform(images, count)
    else:
        drawn = torch.sigmoid(torch.randn(images, count, generator=generator, dtype=torch.float32))
    shifted = shift * drawn / (1 + (shift - 1) * drawn)
    return shifted.clamp(max(low, 1e-3), high)


# Weights that follow slowly


class Decay(NamedTuple):
    """A decay that is 0 for the first `flat` updates, then rises by `rise` an update up to `most`.

    Example:
        >>> [NFT_DECAY.at(step) for step in (0, 100, 1000)]
        [0.0, 0.1, 0.5]
    """

    flat: int
    rise: float
    most: float

    def at(self, step: int) -> float:
        """d after update number `step`, for `copy <- d copy + (1 - d) weights`; 0 makes the copy equal to the weights."""
        return min(max(step - self.flat, 0) * self.rise, self.most)


NFT_DECAY = Decay(0, 0.001, 0.5)
"""Of DiffusionNFT's old policy, which samples and which its two branches start from (arXiv 2509.16117)."""
NFT_TEXT_DECAY = Decay(75, 0.0075, 0.999)
"""The same for text rendering, as in DiffusionNFT's code."""
AWM_DECAY = Decay(0, 0.001, 0.3)
"""Of the copy that AWM's trust region `ema_beta mean (v - v_copy)^2` is around (arXiv 2509.25050)."""
