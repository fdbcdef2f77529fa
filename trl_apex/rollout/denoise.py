"""The denoising loop."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..policy.sampler import Sampler
from ..types import Trajectory

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(latents [R, C, H, W], timesteps [R], samples [R]) -> prediction [R, C, H, W]`; `samples` says whose rows these are."""


@torch.no_grad()
def denoise(
    predict: Predict,
    sampler: Sampler,
    initial: Float[Tensor, "B C H W"],
    window: range,
    noise: Float[Tensor, "B N C H W"],
    representative: Int[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "B C H W"], Trajectory]:
    """Walk the schedule: stochastic inside `window`, deterministic elsewhere.

    Args:
        predict: the guided prediction of the policy.
        sampler ([`Sampler`]): the schedule and its steps.
        initial (`torch.Tensor` of shape `[B, C, H, W]`): float32 noise.
        window (`range`): the stochastic steps; empty for a fully deterministic run.
        noise (`torch.Tensor` of shape `[B, len(window), C, H, W]`): unit normal, one draw a stochastic step.
        representative (`torch.Tensor` of shape `[B]`, *optional*): for each sample, the index of a sample of the same
            prompt and the same initial noise. Up to the window such samples are equal, so only representatives are
            computed, and copied.

    Returns:
        final latents of shape `[B, C, H, W]`, and the [`Trajectory`] of the window.
    """
    device = initial.device
    rows = torch.arange(len(initial), device=device)
    if representative is not None and window.start > 0:
        rows, copies = torch.unique(representative, return_inverse=True)
    else:
        copies = None
    latents = initial[rows]
    kept, log_probs = [], []
    for step in range(sampler.schedule.num_steps):
        if copies is not None and step == window.start:
            latents, rows, copies = latents[copies], torch.arange(len(initial), device=device), None
        steps = torch.full((len(latents),), step)
        prediction = predict(latents, sampler.timesteps(steps).to(device), rows)
        if step not in window:
            latents = sampler.deterministic(latents, prediction, steps)
            continue
        transition = sampler.stochastic(latents, prediction, steps)
        if step == window.start:
            kept.append(latents)
        latents = transition.mean + transition.std * noise[:, step - window.start]
        log_probs.append(sampler.log_prob(latents, transition))
        kept.append(latents)
    if not kept:
        empty = initial.new_zeros(len(initial), 0)
        return latents, Trajectory(initial[:, None], empty, window)
    return latents, Trajectory(torch.stack(kept, 1), torch.stack(log_probs, 1), window)
