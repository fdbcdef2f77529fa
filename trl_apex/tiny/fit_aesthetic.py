"""Fits the aesthetic head on the frozen image embeddings of the tiny CLIP model."""

import logging
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from trl_apex.rewards.aesthetic import AestheticHead
from trl_apex.rewards.image_tower import normalize, pooled
from trl_apex.tiny.fit_clip import clip_pixels
from trl_apex.tiny.schedule import warm_then_decay

logger = logging.getLogger(__name__)


@torch.no_grad()
def embed_images(clip: Any, pixels: UInt8[Tensor, "N 3 32 32"]) -> Float[Tensor, "N D"]:
    """Image embeddings of unit length, of shape `[N, D]`."""
    parts = [pooled(clip.get_image_features(pixel_values=clip_pixels(part))) for part in pixels.split(512)]
    return normalize(torch.cat(parts))


def fit_aesthetic(
    clip: Any,
    pixels: UInt8[Tensor, "N 3 32 32"],
    beauties: Float[Tensor, "N"],
    *,
    steps: int,
    batch_size: int = 512,
    seed: int = 0,
) -> AestheticHead:
    """Regresses beauty from image embeddings with the production head: five linear layers, 1024 wide.

    Args:
        clip (`CLIPModel`): Frozen.
        pixels (`torch.Tensor`): Images of shape `[N, 3, 32, 32]`, uint8.
        beauties (`torch.Tensor`): Their beauty, 1 to 10, of shape `[N]`.
        steps (`int`): Optimizer steps.
        batch_size (`int`, *optional*, defaults to 512): Images per step.
        seed (`int`, *optional*, defaults to 0): Seed of weights and batches.

    Returns:
        `AestheticHead`: In evaluation mode.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    embeddings = embed_images(clip, pixels)
    head = AestheticHead(embeddings.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = warm_then_decay(optimizer, steps, warm_up=20)
    centre = beauties.mean()
    head.train()
    for step in range(steps):
        index = torch.randint(len(pixels), (batch_size,), generator=generator)
        loss = functional.mse_loss(head(embeddings[index]), beauties[index] - centre)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            logger.info("aesthetic %d/%d loss %.3f", step, steps, loss.item())
    with torch.no_grad():
        last: Any = head.layers[-1]
        last.bias += centre
    return head.eval().requires_grad_(False)
