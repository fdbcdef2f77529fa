"""A schedule with the kind of stochastic step that is taken on it, and the window of stochastic steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .nouns import Schedule
from .transition import Transition, cps, ddim, flow_euler, flow_sde, log_prob, squared_error_log_prob

TRANSITIONS = ("flow_sde", "cps", "ddim")


@dataclass(frozen=True)
class Sampler:
    """Denoising steps by number: deterministic, or as a Gaussian transition with its log-probability.

    Step numbers and the schedule are on the CPU, so that reading them never waits for an accelerator.

    Args:
        schedule ([`Schedule`]): the grid.
        transition (`str`): "flow_sde", "cps" or "ddim".
        noise_level (`float`): a of Flow-SDE and CPS, eta of DDIM.
    """

    schedule: Schedule
    transition: str
    noise_level: float

    def deterministic(
        self, latents: Float[Tensor, "R C H W"], prediction: Float[Tensor, "R C H W"], steps: Int[Tensor, "R"]
    ) -> Float[Tensor, "R C H W"]:
        """The noise-free step that starts at step number `steps`."""
        now, after = self._grid(steps)
        if self.transition == "ddim":
            return ddim(latents, prediction, now, after, 0.0, self.schedule.v_prediction).mean
        return flow_euler(latents, prediction, now, after)

    def stochastic(
        self, latents: Float[Tensor, "R C H W"], prediction: Float[Tensor, "R C H W"], steps: Int[Tensor, "R"]
    ) -> Transition:
        """The Gaussian over the latents after step number `steps`."""
        now, after = self._grid(steps)
        if self.transition == "flow_sde":
            return flow_sde(latents, prediction, now, after, self.noise_level, float(self.schedule.sigmas[1]))
        if self.transition == "cps":
            return cps(latents, prediction, now, after, self.noise_level)
        return ddim(latents, prediction, now, after, self.noise_level, self.schedule.v_prediction)

    def log_prob(self, sample: Float[Tensor, "R C H W"], transition: Transition) -> Float[Tensor, "R"]:
        """Log-probability of `sample`, averaged over elements, by the transition's own convention."""
        if self.transition == "cps":
            return squared_error_log_prob(sample, transition)
        return log_prob(sample, transition)

    def timesteps(self, steps: Int[Tensor, "R"]) -> Float[Tensor, "R"]:
        """The timesteps of step numbers `steps`, in the denoiser's units."""
        return self.schedule.timesteps[steps]

    def _grid(self, steps: Int[Tensor, "R"]) -> tuple[Tensor, Tensor]:
        return self.schedule.sigmas[steps], self.schedule.sigmas[steps + 1]


def sde_window(
    num_steps: int, size: int | None, window_range: Sequence[int] | None, seed: int, iteration: int
) -> range:
    """The steps that are stochastic, and trained, in one iteration: the same for every rank and group.

    Args:
        num_steps (`int`): T. The last step is always noise-free, since its noise would stay in the image.
        size (`int`, *optional*): steps in the window; None for all but the last.
        window_range (two `int`, *optional*): the first step that a window may hold, and one past the last; by default
            the first half of the steps, or as many as the size needs.
        seed, iteration (`int`): draw the window's start.

    Raises:
        ValueError: if the window does not fit.

    Example:
        ```python
        >>> sde_window(10, None, None, seed=0, iteration=3)
        range(0, 9)
        >>> sde_window(10, 3, (2, 5), seed=0, iteration=3)
        range(2, 5)

        ```
    """
    if num_steps < 2:
        raise ValueError(
            f"`num_inference_steps` must be at least 2, since the last step is noise-free and cannot be trained. Found {num_steps}."
        )
    if size is None:
        return range(num_steps - 1)
    low, high = window_range or (0, min(max(num_steps // 2, size), num_steps - 1))
    if not (0 <= low < high <= num_steps - 1 and 1 <= size <= high - low):
        raise ValueError(
            f"`sde_window_range` must lie in [0, {num_steps - 1}] (the last step is noise-free) and hold "
            f"`sde_window_size` steps. Found size {size} and range ({low}, {high})."
        )
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    start = int(torch.randint(low, high - size + 1, (), generator=generator))
    return range(start, start + size)
