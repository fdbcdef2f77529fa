"""FLUX.1 (dev and schnell): packed latents, guidance told to the model."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from ..nouns import Embeddings
from .base import JOINT_ATTENTION, DiffusionPolicy


class FluxPolicy(DiffusionPolicy):
    """`FluxPipeline`: CLIP and T5, rectified flow. Trajectories hold unpacked latents `[C, H, W]`."""

    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    lora_targets = JOINT_ATTENTION
    training_size = 512
    batched_guidance = False

    def native_size(self) -> int:
        return self.pipeline.default_sample_size * self.vae_scale_factor

    def size_multiple(self) -> int:
        return 2 * self.vae_scale_factor

    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels // 4

    @torch.no_grad()
    def encode(self, prompts: list[str], max_sequence_length: int) -> Embeddings:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            max_sequence_length=max_sequence_length,
            device=self.pipeline.text_encoder.device,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def predict(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, embeddings: Embeddings, guidance_scale: float
    ) -> Tensor:
        patches = pixel_unshuffle(latents, 2)  # [R, 4 C, H / 2, W / 2]
        packed = patches.flatten(2).transpose(1, 2)
        places = torch.cartesian_prod(*map(torch.arange, patches.shape[2:]))
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((len(latents),), guidance_scale, device=latents.device)
        embeddings = {name: value.to(self.dtype) for name, value in embeddings.items()}
        prediction = model(
            hidden_states=packed.to(self.dtype),
            timestep=timesteps / 1000,
            guidance=guidance,
            txt_ids=torch.zeros(embeddings["encoder_hidden_states"].shape[1], 3, device=latents.device),
            img_ids=pad(places, (1, 0)).float().to(latents.device),
            return_dict=False,
            **embeddings,
        )[0]
        return pixel_shuffle(prediction.transpose(1, 2).reshape(patches.shape), 2)
