"""FLUX.1 (dev, schnell and Kontext): packed latents, guidance told to the model."""

from typing import Any, ClassVar

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
        embeddings = {name: value.to(self.dtype) for name, value in embeddings.items()}
        patches, tokens = patched(latents.to(self.dtype), embeddings.pop("source", None))
        places = [torch.cartesian_prod(*map(torch.arange, part.shape[2:])) for part in patches]
        # The first of three ids: 0 for what is drawn, 1 for the source.
        ids = [pad(place, (1, 0), value=number) for number, place in enumerate(places)]
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((len(latents),), guidance_scale, dtype=torch.float32, device=latents.device)
        prediction = model(
            hidden_states=tokens,
            timestep=timesteps / 1000,
            guidance=guidance,
            txt_ids=torch.zeros(embeddings["encoder_hidden_states"].shape[1], 3, device=latents.device),
            img_ids=torch.cat(ids).float().to(latents.device),
            return_dict=False,
            **embeddings,
        )[0]
        return unpatched(prediction, patches[0])


def patched(latents: Tensor, source: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Patches of 2 x 2 `[R, 4 C, H / 2, W / 2]` of the latents and, if there is one, of the source; all as tokens `[R, S, 4 C]`."""
    patches = [pixel_unshuffle(part.to(latents), 2) for part in (latents, source) if part is not None]
    return patches, torch.cat([part.flatten(2).transpose(1, 2) for part in patches], 1)


def unpatched(tokens: Tensor, patches: Tensor) -> Tensor:
    """The latents of the first tokens, as many as there are `patches`."""
    own = tokens[:, : patches.shape[2] * patches.shape[3]]
    return pixel_shuffle(own.transpose(1, 2).reshape(patches.shape), 2)


class FluxKontextPolicy(FluxPolicy):
    """`FluxKontextPipeline`: the latents of a source image join the sequence."""

    edits = True

    @torch.no_grad()
    def encode(self, prompts: list[str], max_sequence_length: int) -> Embeddings:
        edits: list[Any] = list(prompts)
        found = super().encode([edit.prompt for edit in edits], max_sequence_length)
        return found | {"source": torch.cat([self.encode_by_vae(edit.image) for edit in edits])}

    def encode_by_vae(self, image: Any) -> Tensor:
        """Latents `[1, C, H, W]` of an image."""
        vae = self.pipeline.vae
        pixels = self.pipeline.image_processor.preprocess(image).to(vae.device, vae.dtype)
        return (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
