"""Stable Diffusion 3 and 3.5 (medium and large)."""

import torch
from torch import Tensor, nn

from ..nouns import Embeddings, Schedule
from .base import JOINT_ATTENTION, DiffusionPolicy, flow_schedule


class SD3Policy(DiffusionPolicy):
    """`StableDiffusion3Pipeline`: two CLIP encoders and T5, rectified flow, MM-DiT."""

    lora_targets = JOINT_ATTENTION
    optional_encoders = ("text_encoder_3",)
    training_size = 512

    def size_multiple(self) -> int:
        return self.vae_scale_factor * self.denoiser.config.patch_size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        shape = super().latent_shape(height, width)
        largest = self.size_multiple() * (self.denoiser.config.pos_embed_max_size or height + width)
        if max(height, width) > largest:
            raise ValueError(
                f"`height` and `width` must be at most {largest} pixels: the model has no positions beyond "
                f"(`pos_embed_max_size`). Found {height} x {width}. Use a smaller size."
            )
        return shape

    @torch.no_grad()
    def encode(self, prompts: list[str], max_sequence_length: int) -> Embeddings:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
            device=self.pipeline.text_encoder.device,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def schedule(self, num_steps: int, height: int, width: int) -> Schedule:
        _, rows, columns = self.latent_shape(height, width)
        return flow_schedule(self.pipeline.scheduler, num_steps, rows * columns // self.denoiser.config.patch_size**2)

    def predict(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, embeddings: Embeddings, guidance_scale: float
    ) -> Tensor:
        embeddings = {name: value.to(self.dtype) for name, value in embeddings.items()}
        return model(hidden_states=latents.to(self.dtype), timestep=timesteps, return_dict=False, **embeddings)[0]
