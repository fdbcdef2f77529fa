"""Networks that people's choices between generated images taught to score them: ImageReward (BLIP), HPSv3 (Qwen2-VL)."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trl_apex.rewards.base import (
    Images,
    Reward,
    RewardLoadError,
    check_tensors,
    load_strictly,
    read_weights,
    renamed,
    to_pil,
)
from trl_apex.rewards.clip import AestheticHead

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
        options: See [`Reward`]. The `dtype` is BLIP's; the MLP is always float32.

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
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.weights, self.tokenizer = weights, tokenizer

    def _load(self) -> tuple["ImageRewardModel", Any, Any]:
        from transformers import AutoTokenizer, CLIPImageProcessorPil

        model = ImageRewardModel.from_state(read_weights(self.weights, "weights"), self.weights)
        model.vision_model.to(self.dtype)
        model.text_encoder.to(self.dtype)
        side = model.vision_model.config.image_size
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
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
        """A model with the sizes of the authors' tensors, filled with them; `source` is where they were read."""
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        parts = ("text_encoder.", "vision_model.", "mlp.")  # what scoring uses
        state = {key: value for name, value in state.items() if (key := renamed(name, NAMES)).startswith(parts)}

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


PIXELS = 256 * 28 * 28  # to which every image is scaled
IMAGE_TOKEN, REWARD_TOKEN = "<|image_pad|>", "<|Reward|>"


class HPSv3Reward(Reward):
    """HPSv3: the mean of people's preference, for which a head on Qwen2-VL predicts a Gaussian.

    `r = mu`, `(mu, log sigma) = W_3 relu(W_2 relu(W_1 h))` with biases, `h` = the last hidden state at the token
    `<|Reward|>` of the instruction. Models average about 0 to 11 in the article. Every token, also of the image, is a position.

    Args:
        weights (`str`, *optional*): A safetensors file in the authors' layout, local or `"owner/repo:FILE"` on the hub.
        base (`str`, *optional*): Hub id or local folder with Qwen2-VL's configuration, tokenizer and image processor.
        instruction (`str`, *optional*): Text with `{text_prompt}` and `<|Reward|>`. Defaults to that of the authors'
            package, which is read and not run: `pip install --no-deps hpsv3`.
        options: See [`Reward`]. The `dtype` is Qwen2-VL's; the head is always float32.

    Reference:
        Ma et al., HPSv3, arXiv 2508.03789.
    """

    default_name = "hpsv3"
    range = "raw, models average 0 to 11, larger is better"
    weights_licence = "MIT, on Qwen2-VL-7B, Apache-2.0"
    accelerator_dtype = torch.bfloat16

    def __init__(
        self,
        weights: str = "MizzenAI/HPSv3:HPSv3.safetensors",
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        instruction: str | None = None,
        batch_size: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        self.weights, self.base, self.instruction = weights, base, instruction

    def _load(self) -> tuple[Any, nn.Module, Any, str]:
        from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration
        from transformers import Qwen2VLImageProcessorPil as ImageProcessor  # resizes by Pillow, as the authors do

        if not self.weights.endswith(".safetensors"):
            raise RewardLoadError(f"HPSv3's weights must be a safetensors file. Found {self.weights}. Pass that.")
        instruction = self.instruction or published_instruction()
        tokenizer = AutoTokenizer.from_pretrained(self.base, padding_side="right")
        tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        processor = ImageProcessor.from_pretrained(self.base, min_pixels=PIXELS, max_pixels=PIXELS)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

        state = read_weights(self.weights, "weights", dtype=None)
        head_state = {
            key.removeprefix("rm_head."): state.pop(key) for key in list(state) if key.startswith("rm_head.")
        }
        config: Any = AutoConfig.from_pretrained(self.base)
        config.text_config.vocab_size = len(tokenizer)
        model, found = Qwen2VLForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=state, dtype=self.dtype, output_loading_info=True
        )
        check_tensors(found["missing_keys"], found["unexpected_keys"], self.weights, "Qwen2-VL")
        head = nn.Sequential(
            nn.Linear(config.text_config.hidden_size, 1024),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(1024, 16),
            nn.ReLU(),
            nn.Linear(16, 2),
        )
        load_strictly(head, head_state, self.weights)
        body = model.model.to(self.device).eval().requires_grad_(False)
        return body, head.to(self.device).eval().requires_grad_(False), (processor, tokenizer), text

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        return self._gaussians(loaded, images, prompts)[:, 0].tolist()

    def _gaussians(self, loaded: Any, images: Images, prompts: list[str]) -> Float[Tensor, "B 2"]:
        """`mu` and `log sigma` of each image."""
        model, head, (processor, tokenizer), text = loaded
        seen = processor(to_pil(images), return_tensors="pt").to(self.device)
        patches = (seen["image_grid_thw"].prod(-1) // processor.merge_size**2).tolist()
        texts = [text.replace(IMAGE_TOKEN, IMAGE_TOKEN * size) for size in patches]
        texts = [own.replace("{text_prompt}", prompt) for own, prompt in zip(texts, prompts, strict=True)]
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        ids = tokens["input_ids"]
        hidden = model(
            input_ids=ids,
            attention_mask=tokens["attention_mask"],
            position_ids=torch.arange(ids.shape[1], device=self.device).expand(3, *ids.shape),
            pixel_values=seen["pixel_values"].to(self.dtype),
            image_grid_thw=seen["image_grid_thw"],
            use_cache=False,
        ).last_hidden_state
        last = (ids == tokenizer.convert_tokens_to_ids(REWARD_TOKEN)).cumsum(-1).argmax(-1)
        return head(hidden[torch.arange(len(ids), device=self.device), last].float())


def published_instruction() -> str:
    """The text that HPSv3 was trained with, read out of the authors' package without running it."""
    package = find_spec("hpsv3")
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "HPSv3 needs the instruction that it was trained with. Found no package that has it. Run "
            "`pip install --no-deps hpsv3`, or pass the text as `instruction`."
        )
    source = Path(package.submodule_search_locations[0], "dataset", "data_collator_qwen.py").read_text(
        encoding="utf-8"
    )
    lines = [line for line in ast.parse(source).body if isinstance(line, ast.Assign)]
    texts = {ast.unparse(line.targets[0]): line.value for line in lines}
    return "".join(ast.literal_eval(texts[name]) for name in ("INSTRUCTION", "prompt_with_special_token"))
