"""FLUX.2 (dev, and klein with its base models): patches normalized as the VAE's batch norm says, positions of four axes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle

from ..nouns import Embeddings, Schedule
from .base import JOINT_ATTENTION, DiffusionPolicy, flow_schedule


class Flux2Policy(DiffusionPolicy):
    """`Flux2Pipeline`: Mistral, guidance told to the model. Trajectories hold the patches that it denoises, `[4 C, H / 2, W / 2]`.

    Prompts are padded to `max_sequence_length` and the padding is attended to, as in the pipeline: sample with the same one.
    """

    encoder_names = ("text_encoder",)
    lora_targets = (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj")
    training_size = 512
    batched_guidance = False

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a patch."""
        return 2 * self.pipeline.vae_scale_factor

    def native_size(self) -> int:
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    @torch.no_grad()
    def encode(self, prompts: list[str], max_sequence_length: int) -> Embeddings:
        embeds, _ = self.pipeline.encode_prompt(
            prompts, device=self.pipeline.text_encoder.device, max_sequence_length=max_sequence_length
        )
        return {"encoder_hidden_states": embeds}

    def schedule(self, num_steps: int, height: int, width: int) -> Schedule:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        _, rows, columns = self.latent_shape(height, width)
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        shift = compute_empirical_mu(rows * columns, num_steps)
        return flow_schedule(self.pipeline.scheduler, num_steps, rows * columns, sigmas, shift)

    def predict(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, embeddings: Embeddings, guidance_scale: float
    ) -> Tensor:
        text = embeddings["encoder_hidden_states"].to(self.dtype)

        def places(*sizes: int) -> Tensor:  # of time, row, column and token
            return torch.cartesian_prod(*map(torch.arange, sizes)).to(latents.device)

        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((len(latents),), guidance_scale, dtype=torch.float32, device=latents.device)
        prediction = model(
            hidden_states=latents.flatten(2).transpose(1, 2).to(self.dtype),
            timestep=timesteps / 1000,
            guidance=guidance,
            encoder_hidden_states=text,
            txt_ids=places(1, 1, 1, text.shape[1]),
            img_ids=places(1, *latents.shape[2:], 1),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2).reshape(latents.shape)

    def decode_by_vae(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, variance = (value.view(-1, 1, 1).float() for value in (vae.bn.running_mean, vae.bn.running_var))
        patches = latents * (variance + vae.config.batch_norm_eps).sqrt() + mean
        return vae.decode(pixel_shuffle(patches, 2).to(vae.dtype), return_dict=False)[0]


class Flux2KleinPolicy(Flux2Policy):
    """`Flux2KleinPipeline`: Qwen3; classifier-free guidance, which the distilled models do without."""

    def __init__(self, pipeline: Any):
        super().__init__(pipeline)
        self.batched_guidance = not self.distilled

    @property
    def distilled(self) -> bool:
        return bool(self.pipeline.config.is_distilled)
