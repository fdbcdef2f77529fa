"""A schedule with the steps that are taken on it, and the window of stochastic steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from .nouns import Latents, PerRow, Schedule
from .transition import (
    Transition,
    cps,
    ddim,
    flow_dpmpp_2m,
    flow_euler,
    flow_heun,
    flow_sde,
    log_prob,
    squared_error_log_prob,
)

TRANSITIONS = ("flow_sde", "cps", "ddim")
SOLVERS = ("euler", "heun", "dpmpp_2m")
"""How the steps without noise are taken: T, 2 T - 1 and T calls of the denoiser an image. The last step is always Euler's."""

Predict = Callable[[Tensor, int], Tensor]
"""`(latents, step) -> prediction`."""


@dataclass(frozen=True)
class Sampler:
    """Denoising steps by number: deterministic, or as a Gaussian transition with its log-probability.

    Step numbers and the schedule are on the CPU, so that reading them never waits for an accelerator.

    Args:
        transition: one of `TRANSITIONS`.
        noise_level: a of Flow-SDE and CPS, eta of DDIM.
        solver: one of `SOLVERS`; with "ddim", "euler" means DDIM's own step and the others raise a ValueError.
    """

    schedule: Schedule
    transition: str
    noise_level: float
    solver: str = "euler"

    def __post_init__(self) -> None:
        if self.transition == "ddim" and self.solver != "euler":
            raise ValueError(
                "`rollout_solver` must be 'euler' for a model that predicts noise: its rollout takes DDIM steps. "
                f"Found {self.solver!r}. Leave it out."
            )

    def deterministic(
        self, latents: Latents, prediction: Latents, step: int, predict: Predict, image_before: Latents | None
    ) -> tuple[Latents, Latents | None]:
        """The noise-free step number `step` of all rows, and the image that a flow predicts before it.

        Args:
            predict: asked once more by "heun".
            image_before: returned by the step before; None where there is none. "dpmpp_2m" needs it for its second order.
        """
        now, after = self._grid(torch.full((len(latents),), step))
        if self.transition == "ddim":
            return ddim(latents, prediction, now, after, 0.0, self.schedule.v_prediction).mean, None
        image, last = flow_euler(latents, prediction, now, 0 * now), step + 1 == self.schedule.num_steps
        if self.solver == "heun" and not last:
            ahead = predict(flow_euler(latents, prediction, now, after), step + 1)
            return flow_heun(latents, prediction, ahead, now, after), image
        if self.solver == "dpmpp_2m" and image_before is not None and not last:
            before = self.schedule.sigmas[step - 1].expand_as(now)
            return flow_dpmpp_2m(latents, prediction, image_before, before, now, after), image
        return flow_euler(latents, prediction, now, after), image

    def stochastic(self, latents: Latents, prediction: Latents, steps: Int[Tensor, "R"]) -> Transition:
        """The Gaussian over the latents after step number `steps`."""
        now, after = self._grid(steps)
        if self.transition == "flow_sde":
            return flow_sde(latents, prediction, now, after, self.noise_level, float(self.schedule.sigmas[1]))
        if self.transition == "cps":
            return cps(latents, prediction, now, after, self.noise_level)
        return ddim(latents, prediction, now, after, self.noise_level, self.schedule.v_prediction)

    def log_prob(self, sample: Latents, transition: Transition) -> PerRow:
        """Log-probability of `sample`, averaged over elements, by the transition's own convention."""
        if self.transition == "cps":
            return squared_error_log_prob(sample, transition)
        return log_prob(sample, transition)

    def timesteps(self, steps: Int[Tensor, "R"]) -> PerRow:
        """The timesteps of step numbers `steps`, in the denoiser's units."""
        return self.schedule.timesteps[steps]

    def step_lengths(self, steps: Int[Tensor, "R"]) -> PerRow:
        """`sigma - sigma_next` of a flow's step numbers `steps`."""
        return -self.schedule.sigmas.diff()[steps]

    def _grid(self, steps: Int[Tensor, "R"]) -> tuple[Tensor, Tensor]:
        return self.schedule.sigmas[steps], self.schedule.sigmas[steps + 1]


def sde_window(
    num_steps: int, size: int | None, window_range: Sequence[int] | None, seed: int, iteration: int
) -> range:
    """The steps that are stochastic, and trained, in one iteration: the same for every rank and group.

    Args:
        num_steps: T. The last step is always noise-free, since its noise would stay in the image.
        size: steps in the window; None for all but the last.
        window_range: the first step that a window may hold, and one past the last; by default the first half of the
            steps, or as many as the size needs. The start is drawn by `seed` and `iteration`.

    Example:
        >>> sde_window(10, None, None, seed=0, iteration=3)
        range(0, 9)
        >>> sde_window(10, 3, (2, 5), seed=0, iteration=3)
        range(2, 5)
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
