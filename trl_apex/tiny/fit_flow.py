"""Pretrains the tiny text encoders and transformer together, with the rectified-flow loss."""

import logging
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trl_apex.tiny.schedule import warm_then_decay
from trl_apex.tiny.tokenizer import MAX_LENGTH

logger = logging.getLogger(__name__)


def fit_flow(
    pipeline: Any,
    latents: Float[Tensor, "N 16 8 8"],
    captions: list[str],
    *,
    steps: int,
    batch_size: int = 64,
    caption_drop: float = 0.1,
    ema_decay: float = 0.998,
    seed: int = 0,
) -> None:
    """Trains transformer and text encoders in place, for one cycle of the learning rate, and leaves their averaged weights.

    `loss = mean (v(x_s, s, caption) - (eps - x_0))^2` with `x_s = (1 - s) x_0 + s eps` and `logit s ~ N(0, 1)`

    Args:
        pipeline (`StableDiffusion3Pipeline`): Its transformer and three text encoders are trained together.
        latents (`torch.Tensor`): Scaled latents of shape `[N, 16, 8, 8]`.
        captions (`list[str]`): Their captions.
        steps (`int`): Optimizer steps.
        batch_size (`int`, *optional*, defaults to 64): Images per step.
        caption_drop (`float`, *optional*, defaults to 0.1): Share of empty captions, for classifier-free guidance.
        ema_decay (`float`, *optional*, defaults to 0.998): Decay of the averaged weights.
        seed (`int`, *optional*, defaults to 0): Seed of batches, noise and times.
    """
    generator = torch.Generator().manual_seed(seed)
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    trained = torch.nn.ModuleList([pipeline.transformer, *encoders]).train().requires_grad_(True)
    parameters = list(trained.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = warm_then_decay(optimizer, steps)
    for step in range(steps):
        index = torch.randint(len(latents), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < caption_drop
        prompts = ["" if drop else captions[i] for i, drop in zip(index.tolist(), dropped.tolist(), strict=True)]
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=MAX_LENGTH
        )
        image, noise = latents[index], torch.randn(latents[index].shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(batch_size, generator=generator))
        noisy = torch.lerp(image, noise, sigma[:, None, None, None])
        velocity = pipeline.transformer(noisy, embeds, pooled, 1000 * sigma, return_dict=False)[0]
        loss = (velocity - (noise - image)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)
        if step % 50 == 0 or step == steps - 1:
            logger.info("flow %d/%d loss %.4f", step, steps, loss.item())
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    trained.eval().requires_grad_(False)
