"""From prompt embeddings and noise to images: what training, evaluation during training and the evaluate run share."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..policy.base import DiffusionPolicy
from ..policy.sampler import Sampler
from ..policy.velocity import predict_branches, with_negative
from ..types import Embeddings, Rollout
from .denoise import denoise


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
