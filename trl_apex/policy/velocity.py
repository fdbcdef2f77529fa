"""The one guided forward that rollout and update share."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..types import Embeddings
from .base import DiffusionPolicy


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
