"""FLUX.1 (dev and schnell): packed latents, guidance told to the model."""

import numpy as np
import torch
from torch import Tensor, nn

from ..nouns import Embeddings, Schedule
from .base import JOINT_ATTENTION, DiffusionPolicy, flow_schedule


class FluxPolicy(DiffusionPolicy):
    """`FluxPipeline`: CLIP and T5, rectified flow. Trajectories hold unpacked latents `[C, H, W]`."""

    encoder_names = ("text_encoder", "text_encoder_2")
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

    def schedule(self, num_steps: int, height: int, width: int) -> Schedule:
        _, rows, columns = self.latent_shape(height, width)
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        return flow_schedule(self.pipeline.scheduler, num_steps, rows * columns // 4, sigmas)

    def predict(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, embeddings: Embeddings, guidance_scale: float
    ) -> Tensor:
        rows, channels, height, width = latents.shape
        packed = latents.reshape(rows, channels, height // 2, 2, width // 2, 2)
        packed = packed.permute(0, 2, 4, 1, 3, 5).reshape(rows, height * width // 4, channels * 4)
        grid = torch.zeros(height // 2, width // 2, 3)
        grid[..., 1], grid[..., 2] = torch.arange(height // 2)[:, None], torch.arange(width // 2)[None, :]
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((rows,), guidance_scale, device=latents.device)
        embeddings = {name: value.to(self.dtype) for name, value in embeddings.items()}
        prediction = model(
            hidden_states=packed.to(self.dtype),
            timestep=timesteps / 1000,
            guidance=guidance,
            txt_ids=torch.zeros(embeddings["encoder_hidden_states"].shape[1], 3, device=latents.device),
            img_ids=grid.reshape(-1, 3).to(latents.device),
            return_dict=False,
            **embeddings,
        )[0]
        unpacked = prediction.reshape(rows, height // 2, width // 2, channels, 2, 2)
        return unpacked.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels, height, width)
