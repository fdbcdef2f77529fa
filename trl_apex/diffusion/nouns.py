"""The nouns that travel between the stages, and the legend of their shapes.

| letter | meaning |
|---|---|
| B | samples on this rank: prompts x group size (gathered over ranks where a docstring says so) |
| P | prompts (groups) of one iteration |
| G | group size, `num_generations` |
| K | objectives |
| T | denoising steps |
| N | trained (stochastic) steps, a contiguous window of the T |
| R | rows of one forward pass: pairs of (sample, trained step) |
| C H W | latent channels, height, width |
| S E | text tokens, text embedding width |

Sigma is the share of noise: 1 is pure noise, 0 the image. A denoising step goes from `sigma` to a smaller `sigma_next`.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "R C H W"]
"""Latents, velocities and other predictions of the rows of one forward pass."""
PerRow = Float[Tensor, "R"]
"""One number for each row."""
Embeddings = dict[str, Tensor]
"""Prompt embeddings by the denoiser's argument name, each of shape `[B, ...]`."""


@dataclass(frozen=True)
class Schedule:
    """The grid of noise levels a sampler walks, as plain tensors.

    Args:
        sigmas: noise share before each step, and 0 at the end. For DDIM, the cumulative signal share (`alphas_cumprod`)
            of each step instead, rising to its final value.
        timesteps: in the denoiser's units (1000 sigma for flows).
        v_prediction: for DDIM, whether the denoiser predicts v instead of the noise.
    """

    sigmas: Float[Tensor, "T1"]
    timesteps: Float[Tensor, "T"]
    v_prediction: bool = False

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class Trajectory:
    """What the update needs of one rollout: the stochastic steps, and nothing else.

    Args:
        latents: before each trained step, and after the last.
        log_prob: of each trained step under the policy that sampled.
        steps: which denoising steps these are, N of them.
        means: of each trained step under the policy that sampled, where a guard of the ratio needs them.
    """

    latents: Float[Tensor, "B N1 C H W"]
    log_prob: Float[Tensor, "B N"]
    steps: range
    means: Float[Tensor, "B N C H W"] | None = None


@dataclass(frozen=True)
class Rollout:
    """Images in [0, 1] of one rollout, with the stochastic steps that made them and the final latents, before decoding."""

    images: Float[Tensor, "B 3 H W"]
    trajectory: Trajectory
    latents: Float[Tensor, "B C h w"]
