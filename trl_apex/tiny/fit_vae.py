"""Pretrains the tiny autoencoder."""

import logging
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from trl_apex.tiny.render import as_float
from trl_apex.tiny.schedule import warm_then_decay

logger = logging.getLogger(__name__)


def fit_vae(vae: Any, pixels: UInt8[Tensor, "N 3 32 32"], *, steps: int, batch_size: int = 64, seed: int = 0) -> None:
    """Trains the autoencoder in place, then sets its latent scale and shift.

    `loss = mean |x^ - x| + mean (x^ - x)^2 + 1e-4 mean KL(q(z|x) || N(0, 1))`

    Args:
        vae (`AutoencoderKL`): Changed in place.
        pixels (`torch.Tensor`): Images of shape `[N, 3, 32, 32]`, uint8.
        steps (`int`): Optimizer steps.
        batch_size (`int`, *optional*, defaults to 64): Images per step.
        seed (`int`, *optional*, defaults to 0): Seed of the batches.

    Note:
        The scale and the shift make latents zero-mean with unit variance, as Stable Diffusion 3's pipeline undoes
        them: `latents / scaling_factor + shift_factor`.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = warm_then_decay(optimizer, steps, warm_up=50)
    vae.train()
    for step in range(steps):
        index = torch.randint(len(pixels), (batch_size,), generator=generator)
        images = as_float(pixels[index]) * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        error = decoded - images
        loss = error.abs().mean() + error.square().mean() + 1e-4 * posterior.kl().mean() / images[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            logger.info("vae %d/%d loss %.4f", step, steps, loss.item())
    vae.eval().requires_grad_(False)
    sample = torch.cat([vae.encode(as_float(part) * 2 - 1).latent_dist.mean for part in pixels[:2048].split(256)])
    vae.register_to_config(scaling_factor=1.0 / sample.std().item(), shift_factor=sample.mean().item())


@torch.no_grad()
def encode_latents(vae: Any, pixels: UInt8[Tensor, "N 3 32 32"]) -> Float[Tensor, "N 16 8 8"]:
    """Encodes images as scaled latents of shape `[N, 16, 8, 8]`: `(mean - shift_factor) * scaling_factor`."""
    means = torch.cat([vae.encode(as_float(part) * 2 - 1).latent_dist.mean for part in pixels.split(256)])
    return (means - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def reconstruct(vae: Any, pixels: UInt8[Tensor, "N 3 32 32"]) -> UInt8[Tensor, "N 3 32 32"]:
    """Encodes and decodes images, of shape `[N, 3, 32, 32]`, uint8."""
    parts = [vae.decode(vae.encode(as_float(part) * 2 - 1).latent_dist.mean).sample for part in pixels.split(256)]
    return ((torch.cat(parts) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def reconstruction_psnr(vae: Any, pixels: UInt8[Tensor, "N 3 32 32"]) -> float:
    """Peak signal-to-noise ratio of reconstructions, in decibels: `-10 log10(mean (x^ - x)^2)`, images in [0, 1]."""
    error = as_float(reconstruct(vae, pixels)) - as_float(pixels)
    return -10.0 * torch.log10(error.square().mean()).item()
