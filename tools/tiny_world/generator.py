"""Pretrain what draws the pictures: the tiny autoencoder, then the transformer and the text encoders together."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tools.tiny_world.shared import descend
from trl_apex.tiny.pipeline import MAX_LENGTH
from trl_apex.tiny.render import as_float


def fit_vae(vae: Any, pixels: UInt8[Tensor, "N 3 32 32"], *, steps: int, batch_size: int = 64, seed: int = 0) -> None:
    """Train the autoencoder in place, then set its latent scale and shift.

    `loss = mean |x^ - x| + mean (x^ - x)^2 + 1e-4 mean KL(q(z|x) || N(0, 1))`

    The scale and the shift make latents zero-mean with unit variance, as Stable Diffusion 3's pipeline undoes them:
    `latents / scaling_factor + shift_factor`.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss_of_step() -> Tensor:
        index = torch.randint(len(pixels), (batch_size,), generator=generator)
        images = as_float(pixels[index]) * 2 - 1
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - images
        return error.abs().mean() + error.square().mean() + 1e-4 * posterior.kl().mean() / images[0].numel()

    descend("vae", vae.train().parameters(), loss_of_step, steps=steps, learning_rate=2e-3, warm_up=50)
    vae.eval().requires_grad_(False)
    sample = _latent_means(vae, pixels[:2048])
    vae.register_to_config(scaling_factor=1.0 / sample.std().item(), shift_factor=sample.mean().item())


def encode_latents(vae: Any, pixels: UInt8[Tensor, "N 3 32 32"]) -> Float[Tensor, "N 16 8 8"]:
    """Encode images as scaled latents of shape `[N, 16, 8, 8]`: `(mean - shift_factor) * scaling_factor`."""
    return (_latent_means(vae, pixels) - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def reconstruct(vae: Any, pixels: UInt8[Tensor, "N 3 32 32"]) -> UInt8[Tensor, "N 3 32 32"]:
    """Encode and decode images, of shape `[N, 3, 32, 32]`, uint8."""
    images = torch.cat([vae.decode(_latent_means(vae, part)).sample for part in pixels.split(256)])
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def reconstruction_psnr(vae: Any, pixels: UInt8[Tensor, "N 3 32 32"]) -> float:
    """Peak signal-to-noise ratio of reconstructions, in decibels: `-10 log10(mean (x^ - x)^2)`, images in [0, 1]."""
    error = as_float(reconstruct(vae, pixels)) - as_float(pixels)
    return -10.0 * torch.log10(error.square().mean()).item()


@torch.no_grad()
def _latent_means(vae: Any, pixels: UInt8[Tensor, "N 3 32 32"]) -> Float[Tensor, "N 16 8 8"]:
    return torch.cat([vae.encode(as_float(part) * 2 - 1).latent_dist.mean for part in pixels.split(256)])


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
    """Train transformer and text encoders in place, for one cycle of the learning rate, and leave their averaged weights.

    `loss = mean (v(x_s, s, caption) - (eps - x_0))^2` with `x_s = (1 - s) x_0 + s eps` and `logit s ~ N(0, 1)`

    Latents are scaled; a share `caption_drop` of the captions is empty, for classifier-free guidance.
    """
    generator = torch.Generator().manual_seed(seed)
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    trained = torch.nn.ModuleList([pipeline.transformer, *encoders]).train().requires_grad_(True)
    parameters = list(trained.parameters())
    average = [parameter.detach().clone() for parameter in parameters]

    def loss_of_step() -> Tensor:
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
        return (velocity - (noise - image)).square().mean()

    def update_average(step: int) -> None:
        decay = min(ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in parameters], 1 - decay)

    descend("flow", parameters, loss_of_step, steps=steps, learning_rate=2e-3, after_step=update_average)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    trained.eval().requires_grad_(False)
