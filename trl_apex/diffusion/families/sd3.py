"""Stable Diffusion 3 and 3.5 (medium and large)."""

import torch
from torch import Tensor, nn

from ..nouns import Embeddings, Schedule
from .base import DiffusionPolicy


class SD3Policy(DiffusionPolicy):
    """`StableDiffusion3Pipeline`: two CLIP encoders and T5, rectified flow, MM-DiT."""

    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    training_size = 512

    def size_multiple(self) -> int:
        return self.vae_scale_factor * self.denoiser.config.patch_size

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
        scheduler = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        kwargs = {}
        if scheduler.config.use_dynamic_shifting:
            from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

            _, rows, columns = self.latent_shape(height, width)
            tokens = rows * columns // self.denoiser.config.patch_size**2
            config = scheduler.config
            kwargs["mu"] = calculate_shift(
                tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
            )
        scheduler.set_timesteps(num_steps, device="cpu", **kwargs)
        return Schedule(scheduler.sigmas.float(), scheduler.timesteps.float())

    def predict(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, embeddings: Embeddings, guidance_scale: float
    ) -> Tensor:
        embeddings = {name: value.to(self.dtype) for name, value in embeddings.items()}
        return model(hidden_states=latents.to(self.dtype), timestep=timesteps, return_dict=False, **embeddings)[0]
