"""Qwen-Image: packed latents as FLUX.1's, prompts of their own length under a mask, guidance of constant norm."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from ..nouns import Embeddings, Latents
from .flux import FluxPolicy, patched, unpatched


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
        patches, tokens = patched(latents.to(self.dtype), embeddings.get("source"))
        prediction = model(
            hidden_states=tokens,
            timestep=timesteps / 1000,
            encoder_hidden_states=embeddings["encoder_hidden_states"].to(self.dtype),
            encoder_hidden_states_mask=embeddings["encoder_hidden_states_mask"],
            img_shapes=[[(1, *part.shape[2:]) for part in patches]] * len(latents),
            return_dict=False,
        )[0]
        return unpatched(prediction, patches[0])

    def guide(self, without: Latents, with_prompt: Latents, guidance_scale: float) -> Latents:
        """The guided prediction, each 2 x 2 patch at the norm it has with the prompt alone."""
        guided, given = (
            pixel_unshuffle(prediction, 2)
            for prediction in (super().guide(without, with_prompt, guidance_scale), with_prompt)
        )
        return pixel_shuffle(guided * (given.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True)), 2)

    def decode_by_vae(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = self._statistics(latents.device)
        frames = (latents * std + mean).unsqueeze(2).to(vae.dtype)  # a video of one
        return vae.decode(frames, return_dict=False)[0].squeeze(2)

    def _statistics(self, device: torch.device) -> list[Tensor]:
        """Mean and standard deviation `[C, 1, 1]` of the VAE's latents."""
        config = self.pipeline.vae.config
        statistics = torch.tensor([config.latents_mean, config.latents_std], dtype=torch.float32, device=device)
        return list(statistics.view(2, -1, 1, 1))


class QwenImageEditPlusPolicy(QwenImagePolicy):
    """`QwenImageEditPlusPipeline` with one source image: the language model sees it too, beside either instruction."""

    edits = True

    @torch.no_grad()
    def encode(self, prompts: list[str], max_sequence_length: int) -> Embeddings:
        edits: list[Any] = list(prompts)
        images = [edit.image for edit in edits]
        found = self._encode_texts([edit.prompt for edit in edits], images, max_sequence_length)
        if edits[0].negative is not None:
            negative = self._encode_texts([edit.negative for edit in edits], images, max_sequence_length)
            found |= {f"negative_{name}": value for name, value in negative.items()}
        return found | {"source": torch.cat([self.encode_by_vae(image) for image in images])}

    def _encode_texts(self, texts: list[str], images: list[Any], max_sequence_length: int) -> Embeddings:
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as published

        resize, device, rows = self.pipeline.image_processor.resize, self.pipeline.text_encoder.device, []
        for text, image in zip(texts, images, strict=True):  # the pipeline takes them one at a time
            width, height = published.calculate_dimensions(published.CONDITION_IMAGE_SIZE, image.width / image.height)
            embeds, _ = self.pipeline.encode_prompt(text, [resize(image, height, width)], device)
            if embeds.shape[1] > max_sequence_length:
                raise ValueError(
                    f"`max_sequence_length` must hold an instruction and its image. Found {embeds.shape[1]} tokens for "
                    f"{text!r} and {max_sequence_length}. Raise it."
                )
            rows.append(embeds[0])
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return {
            "encoder_hidden_states": torch.stack(
                [pad(row, (0, 0, 0, max_sequence_length - len(row))) for row in rows]
            ),
            "encoder_hidden_states_mask": torch.arange(max_sequence_length, device=device) < lengths[:, None],
        }

    def encode_by_vae(self, image: Any) -> Tensor:
        """Latents `[1, C, H, W]` of an image."""
        vae = self.pipeline.vae
        frames = self.pipeline.image_processor.preprocess(image).unsqueeze(2).to(vae.device, vae.dtype)
        mean, std = self._statistics(frames.device)
        return ((vae.encode(frames).latent_dist.mode().squeeze(2) - mean) / std).to(vae.dtype)
