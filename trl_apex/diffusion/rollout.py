"""From prompt embeddings and noise to images, in the order of events: noise, guided prediction, denoising, images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .families.base import DiffusionPolicy
from .nouns import Embeddings, Latents, PerRow, Rollout, Trajectory
from .schedule import Sampler

# What a random draw is for, the second entry of its key.
INITIAL_NOISE, STEP_NOISE, ROW_ORDER, EVAL_NOISE, ROW_NOISE, ROW_LEVEL = range(6)


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator whose seed is a hash of `key`."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


def keyed_noise(keys: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> Float[Tensor, "B ..."]:
    """Unit normal noise of shape `[len(keys), *shape]`, float32; equal keys give equal noise.

    A key is e.g. `(seed, INITIAL_NOISE, iteration, sample)`. The draw is on the CPU, the same on any hardware.
    """
    return torch.stack([torch.randn(shape, generator=keyed_generator(*key), dtype=torch.float32) for key in keys])


def evaluation_noise(seed: int, rows: Sequence[int], shape: tuple[int, ...]) -> Float[Tensor, "B ..."]:
    """Initial noise of some rows of an evaluation dataset: the same for a row in any batch, at any step."""
    return keyed_noise([(seed, EVAL_NOISE, row) for row in rows], shape)


def guided_prediction(
    policy: DiffusionPolicy,
    model: nn.Module,
    latents: Latents,
    timesteps: PerRow,
    embeddings: Embeddings,
    negative: Embeddings | None,
    guidance_scale: float,
) -> Latents:
    """Predict the velocity with classifier-free guidance, both branches in one forward; float32.

        v = v_negative + guidance_scale (v_prompt - v_negative)        (a family may rescale it: `DiffusionPolicy.guide`)

    The update must differentiate the same guided prediction that sampled. A script that samples with guidance and trains
    without has importance ratios that start away from 1.

    Args:
        model: the denoiser, wrapped or not. `timesteps` are in its units.
        embeddings, negative: of the prompts, `[R, ...]`, and of the negative prompt, `[1, ...]`; None for no second branch.
        guidance_scale: at 1 the second branch has no weight and is not computed.
    """
    return _predict(policy, model, latents, timesteps, _branches(embeddings, negative, guidance_scale), guidance_scale)


def _branches(embeddings: Embeddings, negative: Embeddings | None, guidance_scale: float) -> Embeddings:
    """Embeddings `[2R, ...]` of both branches, the unconditional one first; `[R, ...]` where there is only one.

    An entry without a value for the unconditional branch, such as a source image, is the same in both.
    """
    own = {k.removeprefix("negative_"): v for k, v in embeddings.items() if k.startswith("negative_")}
    embeddings = {k: v for k, v in embeddings.items() if not k.startswith("negative_")}
    negative = own or negative
    if guidance_scale == 1.0 or negative is None:
        return embeddings
    return {k: torch.cat([negative.get(k, v).expand(len(v), *v.shape[1:]), v]) for k, v in embeddings.items()}


def _predict(policy, model, latents: Tensor, timesteps: Tensor, branches: Embeddings, guidance_scale: float) -> Tensor:
    """[`guided_prediction`] from the embeddings of its branches."""
    if len(next(iter(branches.values()))) == len(latents):
        return policy.predict(model, latents, timesteps, branches, guidance_scale).float()
    prediction = policy.predict(model, latents.repeat(2, 1, 1, 1), timesteps.repeat(2), branches, guidance_scale)
    without, with_prompt = prediction.float().chunk(2)
    return policy.guide(without, with_prompt, guidance_scale)


@torch.no_grad()
def denoise(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    sampler: Sampler,
    initial: Float[Tensor, "B C H W"],
    window: range = range(0),
    noise: Float[Tensor, "B N C H W"] | None = None,
    representative: Int[Tensor, "B"] | None = None,
    keep_means: bool = False,
) -> tuple[Float[Tensor, "B C H W"], Trajectory]:
    """Walk the schedule to the final latents: stochastic inside `window`, deterministic elsewhere.

    Samples of one prompt that start from one noise are equal until the window, so one of them is computed for all:

        step         0    1    2    3    4    5         window = range(2, 4)
        computed     a c  a c  abcd abcd abcd abcd      representative = [0, 0, 2, 2] of the samples a b c d

    Args:
        predict: `(latents [R, C, H, W], timesteps [R], samples [R]) -> prediction [R, C, H, W]`, guided, for rows of `samples`.
        initial: noise as the schedule starts from, float32.
        window: empty for a deterministic run.
        noise: unit normal, one draw a stochastic step.
        representative: for each sample, the index of one with the same prompt and the same initial noise.
        keep_means: keep the means of the stochastic steps in the trajectory.
    """
    everyone = rows = copies = torch.arange(len(initial), device=initial.device)
    if representative is not None:
        rows, copies = torch.unique(representative, return_inverse=True)

    def predict_at(latents: Tensor, step: int) -> Tensor:
        timesteps = sampler.timesteps(torch.full((len(latents),), step)).to(initial.device)
        return predict(latents, timesteps, rows)

    latents, image = initial[rows], None
    kept, log_probs, means = [], [], []
    for step in range(sampler.schedule.num_steps):
        if step == window.start and len(rows) < len(initial):
            latents, rows = latents[copies], everyone
        prediction = predict_at(latents, step)
        if step not in window:
            latents, image = sampler.deterministic(latents, prediction, step, predict_at, image)
            continue
        assert noise is not None, "a stochastic step needs noise"
        if step == window.start:
            kept.append(latents)
        transition = sampler.stochastic(latents, prediction, torch.full((len(latents),), step))
        latents, image = transition.mean + transition.std * noise[:, step - window.start], None
        log_probs.append(sampler.log_prob(latents, transition))
        kept.append(latents)
        if keep_means:
            means.append(transition.mean)
    if not kept:
        return latents, Trajectory(initial[:, None], initial.new_zeros(len(initial), 0), window)
    old_means = torch.stack(means, 1) if keep_means else None
    return latents, Trajectory(torch.stack(kept, 1), torch.stack(log_probs, 1), window, old_means)


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
    keep_means: bool = False,
) -> Rollout:
    """Draw one image per row, in evaluation mode (the model's own mode is restored), and keep the stochastic steps.

    Args:
        policy, model, negative, guidance_scale: as in [`guided_prediction`].
        embeddings: of the prompts, `[B, ...]`, on the device of the denoiser.
        initial: unit noise, on any device.
        window, noise, representative, keep_means: as in [`denoise`]. Without them the images depend on `initial` alone.
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
        latents, trajectory = denoise(predict, sampler, initial, window, noise, representative, keep_means)
    finally:
        model.train(was_training)
    return Rollout(policy.decode(latents), trajectory, latents)
