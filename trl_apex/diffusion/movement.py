"""How far an iteration moves the policy, the learning rate that holds it near a target, and weights that follow slowly."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from .losses import squared_error
from .nouns import Latents


def movement(velocity: Latents, old_velocity: Latents) -> Float[Tensor, ""]:
    """Mean squared change of the velocity against an earlier policy: `mean (v - v_old)^2` over rows and elements."""
    return squared_error(velocity, old_velocity).mean()


def next_rate_factor(factor: float, moved: float, target: float) -> float:
    """The factor on the learning rate for the next iteration, after one that moved the policy by `moved`.

        factor <- clip(factor clip(sqrt(target / moved), 1 / 1.5, 1.5), .1, 10)

    A [`movement`] grows with the square of the rate, hence the root. An iteration that moved nothing (all advantages 0),
    or was not finite, says nothing about the rate and leaves it.

    Args:
        factor: of the iteration that is over; 1 at the start. It is all the state that there is.
        moved, target: in the same unit, a movement or a KL divergence; equal on all ranks.

    Example:
        >>> next_rate_factor(1.0, moved=0.04, target=0.05)
        1.118...
        >>> next_rate_factor(1.0, moved=9.0, target=0.05)
        0.666...

    Source: the adaptive KL penalty of PPO, arXiv 1707.06347, section 4, turned into a rule for the rate.
    """
    if not 0 < moved < float("inf"):
        return factor
    step = min(max((target / moved) ** 0.5, 1 / 1.5), 1.5)
    return min(max(factor * step, 0.1), 10.0)


def overshoots(moved: float, target: float) -> bool:
    """Whether the rest of a pass is left out: the policy has moved more than 1.5 times the target."""
    return moved > 1.5 * target


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
