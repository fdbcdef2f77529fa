"""From prompt embeddings and noise to images, in the order of events: noise, guided prediction, denoising, images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .families.base import DiffusionPolicy
from .nouns import Embeddings, Rollout, Trajectory
from .schedule import Sampler

# What a random draw is for, the second entry of its key.
INITIAL_NOISE, STEP_NOISE, ROW_ORDER, EVAL_NOISE, ROW_NOISE, ROW_LEVEL = range(6)


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator whose seed is a hash of `key`.

    Example:
        ```python
        >>> a, b = keyed_generator(0, 1, 2), keyed_generator(0, 1, 2)
        >>> bool((torch.randn(3, generator=a) == torch.randn(3, generator=b)).all())
        True

        ```
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


def keyed_noise(keys: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> Float[Tensor, "B ..."]:
    """Unit normal noise of shape `[len(keys), *shape]`, float32; equal keys give equal noise.

    A key is e.g. `(seed, INITIAL_NOISE, iteration, sample)`. The draw is on the CPU, so that a seed gives the same noise
    on any hardware.
    """
    return torch.stack([torch.randn(shape, generator=keyed_generator(*key)) for key in keys])


def evaluation_noise(seed: int, rows: Sequence[int], shape: tuple[int, ...]) -> Float[Tensor, "B ..."]:
    """Initial noise of some rows of an evaluation dataset: the same for a row in any batch, at any step."""
    return keyed_noise([(seed, EVAL_NOISE, row) for row in rows], shape)


def guided_prediction(
    policy: DiffusionPolicy,
    model: nn.Module,
    latents: Float[Tensor, "R C H W"],
    timesteps: Float[Tensor, "R"],
    embeddings: Embeddings,
    negative: Embeddings | None,
    guidance_scale: float,
) -> Float[Tensor, "R C H W"]:
    """Predict the velocity with classifier-free guidance, both branches in one forward.

    ```
    v = v_negative + guidance_scale (v_prompt - v_negative)
    ```

    Args:
        policy ([`DiffusionPolicy`]): knows how to call `model`.
        model (`nn.Module`): the denoiser, wrapped or not.
        latents (`torch.Tensor` of shape `[R, C, H, W]`): float32.
        timesteps (`torch.Tensor` of shape `[R]`): in the model's units.
        embeddings (`dict` of tensors `[R, ...]`): of the prompts.
        negative (`dict` of tensors `[1, ...]`, *optional*): of the negative prompt; None for no second branch.
        guidance_scale (`float`): at 1 the second branch has no weight and is not computed.

    Returns:
        `torch.Tensor` of shape `[R, C, H, W]`, float32.

    Note:
        Guidance is part of the policy: the update must differentiate the same guided prediction that sampled. Some
        training scripts sample with guidance and train without; the importance ratio then starts away from 1.
    """
    return _predict(policy, model, latents, timesteps, _branches(embeddings, negative, guidance_scale), guidance_scale)


def _branches(embeddings: Embeddings, negative: Embeddings | None, guidance_scale: float) -> Embeddings:
    """Embeddings `[2R, ...]` of both branches, the unconditional one first; `[R, ...]` where there is only one."""
    if guidance_scale == 1.0 or negative is None:
        return embeddings
    return {k: torch.cat([negative[k].expand(len(v), *v.shape[1:]), v]) for k, v in embeddings.items()}


def _predict(policy, model, latents: Tensor, timesteps: Tensor, branches: Embeddings, guidance_scale: float) -> Tensor:
    """[`guided_prediction`] from the embeddings of its branches."""
    if len(next(iter(branches.values()))) == len(latents):
        return policy.predict(model, latents, timesteps, branches, guidance_scale).float()
    prediction = policy.predict(model, latents.repeat(2, 1, 1, 1), timesteps.repeat(2), branches, guidance_scale)
    without, with_prompt = prediction.float().chunk(2)
    return without + guidance_scale * (with_prompt - without)


Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(latents [R, C, H, W], timesteps [R], samples [R]) -> prediction [R, C, H, W]`; `samples` says whose rows these are."""


@torch.no_grad()
def denoise(
    predict: Predict,
    sampler: Sampler,
    initial: Float[Tensor, "B C H W"],
    window: range = range(0),
    noise: Float[Tensor, "B N C H W"] | None = None,
    representative: Int[Tensor, "B"] | None = None,
) -> tuple[Float[Tensor, "B C H W"], Trajectory]:
    """Walk the schedule: stochastic inside `window`, deterministic elsewhere.

    Samples of one prompt that start from one noise are equal until the window, so one of them is computed for all:

    ```
    step         0    1    2    3    4    5         window = range(2, 4)
    computed     a c  a c  abcd abcd abcd abcd      representative = [0, 0, 2, 2] of the samples a b c d
    ```

    Args:
        predict: the guided prediction of the policy.
        sampler ([`Sampler`]): the schedule and its steps.
        initial (`torch.Tensor` of shape `[B, C, H, W]`): float32 noise.
        window (`range`): the stochastic steps; empty for a deterministic run.
        noise (`torch.Tensor` of shape `[B, len(window), C, H, W]`): unit normal, one draw a stochastic step.
        representative (`torch.Tensor` of shape `[B]`, *optional*): for each sample, the index of one with the same prompt
            and the same initial noise.

    Returns:
        final latents of shape `[B, C, H, W]`, and the [`Trajectory`] of the window.
    """
    everyone = rows = copies = torch.arange(len(initial), device=initial.device)
    if representative is not None:
        rows, copies = torch.unique(representative, return_inverse=True)
    latents = initial[rows]
    kept, log_probs = [], []
    for step in range(sampler.schedule.num_steps):
        if step == window.start and len(rows) < len(initial):
            latents, rows = latents[copies], everyone
        steps = torch.full((len(latents),), step)
        prediction = predict(latents, sampler.timesteps(steps).to(initial.device), rows)
        if step not in window:
            latents = sampler.deterministic(latents, prediction, steps)
            continue
        assert noise is not None, "a stochastic step needs noise"
        if step == window.start:
            kept.append(latents)
        transition = sampler.stochastic(latents, prediction, steps)
        latents = transition.mean + transition.std * noise[:, step - window.start]
        log_probs.append(sampler.log_prob(latents, transition))
        kept.append(latents)
    if not kept:
        return latents, Trajectory(initial[:, None], initial.new_zeros(len(initial), 0), window)
    return latents, Trajectory(torch.stack(kept, 1), torch.stack(log_probs, 1), window)


@torch.no_grad()
def sample(
    policy: DiffusionPolicy,
    model: nn.Module,
    sampler: Sampler,
    embeddings: Embeddings,
    negative: Embeddings | None,
    guidance_scale: float,
    initial: Float[Tensor, "B C H W"],
    window: range = range(0),
    noise: Float[Tensor, "B N C H W"] | None = None,
    representative: Int[Tensor, " B"] | None = None,
) -> Rollout:
    """Draw one image per row, in evaluation mode, and keep the stochastic steps.

    Args:
        policy ([`DiffusionPolicy`]): knows how to call `model` and decodes.
        model (`nn.Module`): the denoiser, wrapped or not. Its training mode is restored.
        sampler ([`Sampler`]): schedule and steps.
        embeddings (`dict` of tensors `[B, ...]`): of the prompts, on the device of the denoiser.
        negative (`dict` of tensors `[1, ...]`, *optional*): of the negative prompt; None for no second branch.
        guidance_scale (`float`): 1 for none.
        initial (`torch.Tensor` of shape `[B, C, H, W]`): unit noise, on any device.
        window, noise, representative: as in [`denoise`]. Without them the images depend on `initial` alone.

    Returns:
        [`Rollout`]
    """
    device = next(iter(embeddings.values())).device
    chosen: Tensor | None = None
    branches: Embeddings = {}

    def predict(latents: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        nonlocal chosen, branches
        if rows is not chosen:  # they change at most once in a rollout, and are large to copy
            chosen = rows
            branches = _branches({k: v[rows] for k, v in embeddings.items()}, negative, guidance_scale)
        return _predict(policy, model, latents, timesteps, branches, guidance_scale)

    initial = policy.scale_initial_noise(initial).to(device)
    noise = None if noise is None else noise.to(device)
    was_training = model.training
    model.eval()
    try:
        latents, trajectory = denoise(predict, sampler, initial, window, noise, representative)
    finally:
        model.train(was_training)
    return Rollout(policy.decode(latents), trajectory, latents)
