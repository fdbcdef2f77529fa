"""Stable Diffusion 1.x, 2.x and XL, sampled with DDIM: the setting of DDPO."""

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..nouns import Embeddings, Schedule
from .base import DiffusionPolicy


class StableDiffusionPolicy(DiffusionPolicy):
    """`StableDiffusionPipeline`: one CLIP encoder, a UNet that predicts the noise (or v)."""

    denoiser_name = "unet"
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    transitions = ("ddim",)

    def size_multiple(self) -> int:
        return self.vae_scale_factor * 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, prompts: list[str], max_sequence_length: int) -> Embeddings:
        encoder = self.pipeline.text_encoder
        embeds, _ = self.pipeline.encode_prompt(prompts, encoder.device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds}

    def check_scheduler(self, scheduler: Any) -> None:
        """Any scheduler with the betas of a noise or v prediction: steps are DDIM's on its betas."""
        from diffusers import DDIMScheduler

        config = getattr(scheduler, "config", {})
        kind = config.get("prediction_type")
        betas = "beta_start" in inspect.signature(type(scheduler)).parameters  # a config may hold another class's
        if not betas or kind not in ("epsilon", "v_prediction") or config.get("use_flow_sigmas"):
            raise ValueError(
                f"The scheduler of a {type(self.pipeline).__name__} must have betas and the `prediction_type` 'epsilon' or "
                f"'v_prediction', without flow sigmas. Found {type(scheduler).__name__} with {kind!r}. Load the model's own "
                "with `DDIMScheduler.from_pretrained(model, subfolder='scheduler')`."
            )
        wrong = [f"{option}=True" for option in ("clip_sample", "thresholding") if config.get(option)]
        if isinstance(scheduler, DDIMScheduler) and config.get("timestep_spacing") == "linspace":
            wrong.append("timestep_spacing='linspace'")  # its steps do not end where the next begins
        if wrong:
            raise ValueError(
                "The scheduler's steps must be DDIM's own from one timestep of its grid to the next. Found "
                f"{type(scheduler).__name__} with {', '.join(wrong)}. Use `DDIMScheduler.from_config(pipeline.scheduler."
                "config, clip_sample=False, thresholding=False, timestep_spacing='leading')`."
            )

    def schedule(self, num_steps: int, height: int, width: int) -> Schedule:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(num_steps)
        timesteps, v_prediction = scheduler.timesteps, scheduler.config.prediction_type == "v_prediction"
        before = scheduler.alphas_cumprod[timesteps]
        if before[0] == 0 and not v_prediction:
            raise ValueError(
                "A schedule that starts without signal (`rescale_betas_zero_snr`) needs a model that predicts v. Found "
                "`prediction_type` 'epsilon'. Set rescale_betas_zero_snr=False."
            )
        last = timesteps[-1] - scheduler.config.num_train_timesteps // num_steps
        final = scheduler.alphas_cumprod[last] if last >= 0 else scheduler.final_alpha_cumprod
        return Schedule(torch.cat([before, final.reshape(1)]).float(), timesteps.float(), v_prediction)

    def predict(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, embeddings: Embeddings, guidance_scale: float
    ) -> Tensor:
        embeddings = {name: value.to(self.dtype) for name, value in embeddings.items()}
        conditions = self._conditions(latents, embeddings)
        return model(sample=latents.to(self.dtype), timestep=timesteps, return_dict=False, **conditions)[0]

    def _conditions(self, latents: Tensor, embeddings: Embeddings) -> dict:
        return embeddings


class StableDiffusionXLPolicy(StableDiffusionPolicy):
    """`StableDiffusionXLPipeline`: a second encoder's pooled embedding and the image size as conditions."""

    encoder_names = ("text_encoder", "text_encoder_2")

    @torch.no_grad()
    def encode(self, prompts: list[str], max_sequence_length: int) -> Embeddings:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.pipeline.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeds, "text_embeds": pooled}

    def encode_negative(self, prompt: str, max_sequence_length: int) -> Embeddings:
        embeddings = super().encode_negative(prompt, max_sequence_length)
        if prompt == "" and self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(value) for name, value in embeddings.items()}
        return embeddings

    def _conditions(self, latents: Tensor, embeddings: Embeddings) -> dict:
        height, width = (size * self.vae_scale_factor for size in latents.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]], device=latents.device)
        added = {
            "text_embeds": embeddings["text_embeds"],
            "time_ids": sizes.expand(len(latents), -1).to(self.dtype),
        }
        return {"encoder_hidden_states": embeddings["encoder_hidden_states"], "added_cond_kwargs": added}
