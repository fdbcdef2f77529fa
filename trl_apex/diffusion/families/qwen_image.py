"""Qwen-Image: packed latents as FLUX.1's, prompts of their own length under a mask, guidance of constant norm."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from ..nouns import Embeddings, Latents
from .flux import FluxPolicy


class QwenImagePolicy(FluxPolicy):
    """`QwenImagePipeline`: Qwen2.5-VL, rectified flow. Its `guidance_scale` is the pipeline's `true_cfg_scale`."""

    encoder_names = ("text_encoder",)
    # Not the text's own queries and outputs: those of the last block reach no image, so they would get no gradient.
    lora_targets = tuple(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"))
    batched_guidance = True

    @torch.no_grad()
    def encode(self, prompts: list[str], max_sequence_length: int) -> Embeddings:
        embeds, mask = self.pipeline.encode_prompt(
            prompts, device=self.pipeline.text_encoder.device, max_sequence_length=max_sequence_length
        )
        if mask is None:  # no prompt is shorter than another
            mask = embeds.new_ones(embeds.shape[:2])
        room = max_sequence_length - embeds.shape[1]
        return {
            "encoder_hidden_states": pad(embeds, (0, 0, 0, room)),
            "encoder_hidden_states_mask": pad(mask, (0, room)).bool(),
        }

    def predict(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, embeddings: Embeddings, guidance_scale: float
    ) -> Tensor:
        patches = pixel_unshuffle(latents, 2)  # [R, 4 C, H / 2, W / 2]
        prediction = model(
            hidden_states=patches.flatten(2).transpose(1, 2).to(self.dtype),
            timestep=timesteps / 1000,
            encoder_hidden_states=embeddings["encoder_hidden_states"].to(self.dtype),
            encoder_hidden_states_mask=embeddings["encoder_hidden_states_mask"],
            img_shapes=[[(1, *patches.shape[2:])]] * len(latents),
            return_dict=False,
        )[0]
        return pixel_shuffle(prediction.transpose(1, 2).reshape(patches.shape), 2)

    def guide(self, without: Latents, with_prompt: Latents, guidance_scale: float) -> Latents:
        """The guided prediction, each 2 x 2 patch at the norm it has with the prompt alone."""
        guided, given = (
            pixel_unshuffle(prediction, 2)
            for prediction in (super().guide(without, with_prompt, guidance_scale), with_prompt)
        )
        return pixel_shuffle(guided * (given.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True)), 2)

    def decode_by_vae(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(statistics, device=latents.device).view(-1, 1, 1)
            for statistics in (vae.config.latents_mean, vae.config.latents_std)
        )
        frames = (latents * std + mean).unsqueeze(2).to(vae.dtype)  # a video of one
        return vae.decode(frames, return_dict=False)[0].squeeze(2)
