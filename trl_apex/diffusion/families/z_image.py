"""Z-Image: lists instead of batches, time from noise to image, and a velocity of the other sign."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..nouns import Embeddings
from .base import DiffusionPolicy


class ZImagePolicy(DiffusionPolicy):
    """`ZImagePipeline`: Qwen3, rectified flow, one stream. Its `guidance_scale` is the pipeline's plus 1.

    The pipeline computes `v_prompt + s (v_prompt - v_negative)`, so its 0 is no guidance, as 1 is here.
    """

    encoder_names = ("text_encoder",)
    lora_targets = tuple(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
    training_size = 512

    def native_size(self) -> int:
        return 128 * self.vae_scale_factor  # 1024 pixels, the pipeline's default

    def size_multiple(self) -> int:
        return 2 * self.vae_scale_factor

    @torch.no_grad()
    def encode(self, prompts: list[str], max_sequence_length: int) -> Embeddings:
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts),  # which the pipeline overwrites
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return {
            "cap_feats": torch.stack([pad(text, (0, 0, 0, max_sequence_length - len(text))) for text in embeds]),
            "lengths": torch.tensor([len(text) for text in embeds], device=embeds[0].device),
        }

    def predict(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, embeddings: Embeddings, guidance_scale: float
    ) -> Tensor:
        texts = zip(embeddings["cap_feats"].to(self.dtype), embeddings["lengths"].tolist(), strict=True)
        frames = latents.to(self.dtype).unsqueeze(2)  # a video of one
        predictions = model(
            list(frames), (1000 - timesteps) / 1000, [text[:length] for text, length in texts], return_dict=False
        )[0]
        return -torch.stack(list(predictions)).squeeze(2)
