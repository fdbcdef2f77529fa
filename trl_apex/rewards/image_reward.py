"""ImageReward: a BLIP that people's rankings of generated images taught to score them."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trl_apex.rewards.base import Images, Reward, RewardLoadError, load_strictly, read_weights, renamed, to_pil
from trl_apex.rewards.clip import AestheticHead, pillow_image_processor

MEAN, STD = 0.16717362830052426, 1.0333394966054072
PROMPT_TOKENS = 35
HEAD_WIDTH = 64  # of every attention head in BLIP's image and text encoders


class ImageReward(Reward):
    """ImageReward: an MLP on the first token of BLIP's image-grounded text encoder, standardized.

    `r = (mlp(h_0) - 0.167) / 1.033`, `h` = the text encoder's last hidden state over the prompt, with cross-attention
    to the image. About -2.5 to 2, mean 0 and deviation 1 on the authors' data.

    Args:
        weights (`str`, *optional*): A local file in the authors' layout, or `"owner/repo:FILE"` on the hub.
        tokenizer (`str`, *optional*): Hub id or local folder of BERT's uncased tokenizer.
        dtype (`torch.dtype`, *optional*): Precision of BLIP, float32 by default; the MLP is always float32.
        name, device, batch_size: See [`Reward`].

    Reference:
        Xu et al., ImageReward, arXiv 2304.05977.
    """

    default_name = "image_reward"
    range = "raw, about -2.5 to 2, larger is better"
    weights_licence = "Apache-2.0"

    def __init__(
        self,
        weights: str = "THUDM/ImageReward:ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(name, device, dtype, batch_size)
        self.weights, self.tokenizer = weights, tokenizer

    def _load(self) -> tuple["ImageRewardModel", Any, Any]:
        from transformers import AutoTokenizer

        model = ImageRewardModel.from_state(from_authors_layout(read_weights(self.weights, "weights")), self.weights)
        model.vision_model.to(self.dtype)
        model.text_encoder.to(self.dtype)
        side = model.vision_model.config.image_size
        processor = pillow_image_processor()(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        return model.to(self.device), processor, AutoTokenizer.from_pretrained(self.tokenizer)

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        model, processor, tokenizer = loaded
        pixels = processor(to_pil(images), return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
        tokens = tokenizer(
            prompts, padding="max_length", truncation=True, max_length=PROMPT_TOKENS, return_tensors="pt"
        ).to(self.device)
        return model(pixels, tokens["input_ids"], tokens["attention_mask"]).tolist()


class ImageRewardModel(nn.Module):
    """BLIP's image encoder and image-grounded text encoder, with an MLP on top that is built as the aesthetic head."""

    def __init__(self, vision_model: Any, text_encoder: Any, mlp: AestheticHead) -> None:
        super().__init__()
        self.vision_model, self.text_encoder, self.mlp = vision_model, text_encoder, mlp

    def forward(
        self,
        pixels: Float[Tensor, "B 3 H W"],
        input_ids: Int[Tensor, "B S"],
        attention_mask: Int[Tensor, "B S"],
    ) -> Float[Tensor, "B"]:
        """Score images, normalized as CLIP's, against the tokens of prompts."""
        seen = self.vision_model(pixel_values=pixels).last_hidden_state
        hidden = self.text_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            is_decoder=False,
        ).last_hidden_state
        return (self.mlp(hidden[:, 0].float()) - MEAN) / STD

    @classmethod
    def from_state(cls, state: dict[str, Tensor], source: str) -> "ImageRewardModel":
        """A model with the sizes of the tensors, filled with them; `source` is where they were read.

        Raises:
            RewardLoadError: If tensors are missing or left over.
        """
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        def shape(key: str) -> torch.Size:
            if key not in state:
                raise RewardLoadError(
                    f"{source} must hold ImageReward's tensors. Found none called {key}. Pass the authors' checkpoint."
                )
            return state[key].shape

        def count(layers: str) -> int:
            return len({key.removeprefix(layers).split(".")[0] for key in state if key.startswith(layers)})

        seen, read = "vision_model.encoder.layers.", "text_encoder.encoder.layer."
        width, _, _, patch = shape("vision_model.embeddings.patch_embedding.weight")
        words, text_width = shape("text_encoder.embeddings.word_embeddings.weight")
        patches = shape("vision_model.embeddings.position_embedding")[1] - 1
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=shape(f"{seen}0.mlp.fc1.weight")[0],
            num_hidden_layers=count(seen),
            num_attention_heads=width // HEAD_WIDTH,
            patch_size=patch,
            image_size=round(patches**0.5) * patch,
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=words,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=shape(f"{read}0.intermediate.dense.weight")[0],
            num_hidden_layers=count(read),
            num_attention_heads=text_width // HEAD_WIDTH,
            max_position_embeddings=shape("text_encoder.embeddings.position_embeddings.weight")[0],
            layer_norm_eps=1e-12,
            is_decoder=True,  # makes the cross-attention layers; the forward pass itself is not causal
        )
        layers = [shape(f"mlp.layers.{i}.weight") for i in (0, 2, 4, 6, 7)]
        mlp = AestheticHead(layers[0][1], tuple(outputs for outputs, _ in layers))
        model = cls(BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False), mlp)
        load_strictly(model, state, source)
        return model.eval().requires_grad_(False)


NAMES = (
    (r"^blip\.text_encoder\.", "text_encoder."),
    (r"^blip\.visual_encoder\.", "vision_model."),
    (r"^vision_model\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^vision_model\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^vision_model\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^vision_model\.norm\.", "vision_model.post_layernorm."),
    (r"^vision_model\.blocks\.(\d+)\.norm(\d)\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^vision_model\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^vision_model\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^vision_model\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)


def from_authors_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' tensors to those of [`ImageRewardModel`], and leave out what scoring does not use."""
    converted = {renamed(key, NAMES): value for key, value in state.items()}
    parts = ("text_encoder.", "vision_model.", "mlp.")
    return {key: value for key, value in converted.items() if key.startswith(parts)}
