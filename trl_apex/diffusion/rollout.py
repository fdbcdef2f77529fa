"""From prompt embeddings and noise to images: keyed noise, the guided prediction, the denoising loop."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .families.base import DiffusionPolicy
from .nouns import Embeddings, Rollout, Trajectory
from .schedule import Sampler

# What a random draw is for, the second entry of its key.
INITIAL_NOISE, STEP_NOISE, ROW_ORDER, EVAL_NOISE = range(4)


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
    """Unit normal noise, one independent draw of `shape` a key, float32 on the CPU.

    Args:
        keys (sequence of `tuple[int, ...]`): e.g. `(seed, iteration, sample)`; equal keys give equal noise.
        shape (`tuple[int, ...]`): of one draw.

    Returns:
        `torch.Tensor` of shape `[len(keys), *shape]`

    Note:
        Drawn on the CPU for every device: the same seed gives the same noise on any hardware.
    """
    return torch.stack([torch.randn(shape, generator=keyed_generator(*key)) for key in keys])


def evaluation_noise(seed: int, rows: Sequence[int], shape: tuple[int, ...]) -> Float[Tensor, "B ..."]:
    """The noise that evaluation starts from: a row keeps its own, whatever the batch, the weights or the step.

    Args:
        seed (`int`): of the run.
        rows (sequence of `int`): numbers of rows in the evaluation dataset.
        shape (`tuple[int, ...]`): of one latent.

    Returns:
        `torch.Tensor` of shape `[len(rows), *shape]`
    """
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
        negative (`dict` of tensors `[1, ...]`, *optional*): of the negative prompt; None where no second branch is wanted.
        guidance_scale (`float`): at 1 the second branch has no weight and is not computed.

    Returns:
        `torch.Tensor` of shape `[R, C, H, W]`, float32.

    Note:
        Guidance is part of the policy: the update must differentiate the same guided prediction that sampled. Some
        training scripts sample with guidance and train without; the importance ratio then starts away from 1.
    """
    branches = with_negative(embeddings, negative, guidance_scale)
    return predict_branches(policy, model, latents, timesteps, branches, guidance_scale)


def with_negative(embeddings: Embeddings, negative: Embeddings | None, guidance_scale: float) -> Embeddings:
    """Embeddings `[2R, ...]` of both branches, the unconditional one first; `[R, ...]` where there is only one."""
    if guidance_scale == 1.0 or negative is None:
        return embeddings
    return {k: torch.cat([negative[k].expand(len(v), *v.shape[1:]), v]) for k, v in embeddings.items()}


def predict_branches(
    policy: DiffusionPolicy,
    model: nn.Module,
    latents: Float[Tensor, "R C H W"],
    timesteps: Float[Tensor, "R"],
    branches: Embeddings,
    guidance_scale: float,
) -> Float[Tensor, "R C H W"]:
    """[`guided_prediction`] from the embeddings that [`with_negative`] made: a rollout makes them once for all steps."""
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


@torch.no_grad()
def sample(
    policy: DiffusionPolicy,
    model: nn.Module,
    sampler: Sampler,
    embeddings: Embeddings,
    negative: Embeddings | None,
    guidance_scale: float,
    initial: Float[Tensor, "B C H W"],
    window: range,
    noise: Float[Tensor, "B N C H W"],
    representative: Int[Tensor, " B"] | None = None,
) -> Rollout:
    """Draw one image per row, in evaluation mode, remembering the stochastic steps.

    Args:
        policy ([`DiffusionPolicy`]): knows how to call `model` and decodes.
        model (`nn.Module`): the denoiser, wrapped or not. Its training mode is restored.
        sampler ([`Sampler`]): schedule and steps.
        embeddings (`dict` of tensors `[B, ...]`): of the prompts, on the device of the denoiser.
        negative (`dict` of tensors `[1, ...]`, *optional*): of the negative prompt; None for no second branch.
        guidance_scale (`float`): 1 for none.
        initial (`torch.Tensor` of shape `[B, C, H, W]`): unit noise, on any device.
        window, noise, representative: as in [`denoise`].

    Returns:
        [`Rollout`]
    """
    device = next(iter(embeddings.values())).device
    was_training = model.training
    chosen: Tensor | None = None
    branches: Embeddings = {}

    def predict(latents: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        nonlocal chosen, branches
        if rows is not chosen:  # they change at most once in a rollout, and are large to copy
            chosen = rows
            branches = with_negative({k: v[rows] for k, v in embeddings.items()}, negative, guidance_scale)
        return predict_branches(policy, model, latents, timesteps, branches, guidance_scale)

    initial = policy.scale_initial_noise(initial).to(device)
    model.eval()
    try:
        latents, trajectory = denoise(predict, sampler, initial, window, noise.to(device), representative)
    finally:
        model.train(was_training)
    return Rollout(policy.decode(latents), trajectory, latents.float().square().mean((1, 2, 3)))


def sample_deterministic(
    policy: DiffusionPolicy,
    model: nn.Module,
    sampler: Sampler,
    embeddings: Embeddings,
    negative: Embeddings | None,
    guidance_scale: float,
    initial: Float[Tensor, "B C H W"],
) -> Float[Tensor, "B 3 h w"]:
    """Images `[B, 3, H, W]` in [0, 1] without noise on the way: the same noise and weights give the same image.

    Takes the arguments of [`sample`].
    """
    empty = initial.new_zeros(len(initial), 0, *initial.shape[1:])
    return sample(policy, model, sampler, embeddings, negative, guidance_scale, initial, range(0), empty).images
