"""Rewards on a CLIP tower, such as PickScore, HPSv2 and the aesthetic score. Rewards that use the same weights share them."""

import hashlib
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from trl_apex.rewards.base import (
    Images,
    Reward,
    RewardLoadError,
    load_strictly,
    read_weights,
    renamed,
    to_arrays,
    to_pil,
)

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class CLIPScoreReward(Reward):
    """CLIPScore: the image-text cosine of CLIP, in hundredths.

    `r = 100 cos(e_text, e_image)`, -100 to 100, in practice 10 to 40. The article's own score is `2.5 max(cos, 0)` with
    ViT-B/32; a negative cosine is not clipped here, so that the reward keeps a slope everywhere.

    Args:
        model (`str`, *optional*): Hub id or local folder of a `CLIPModel`. [`AestheticReward`] has the same one.
        processor (`str`, *optional*): Hub id or local folder of its processor. Defaults to `model`.
        options: See [`Reward`].

    Reference:
        Hessel et al., CLIPScore, arXiv 2104.08718.
    """

    default_name = "clip_score"
    range = "-100 to 100, in practice 10 to 40, larger is better"
    weights_licence = "MIT"

    def __init__(self, model: str = CLIP_L, processor: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.model, self.processor = model, processor

    def _load(self) -> "CLIPTower":
        return shared_tower(self.model, self.processor, self.device, self.dtype)

    def _score(self, loaded: "CLIPTower", images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        return (100 * loaded.cosines(prompts, images)).tolist()


class SourceReward(CLIPScoreReward):
    """How much an edited image keeps of its source: `r = cos(e_image, e_source)` of CLIP's image embeddings, -1 to 1.

    The column `source_image`, or another that `reward.column` names, holds PIL images or paths of files. A sample without a
    source has no reward. The arguments are those of [`CLIPScoreReward`].

    Reference:
        CLIP-I of Ruiz et al., DreamBooth, arXiv 2208.12242.
    """

    default_name = "source"
    range = "-1 to 1, larger is better"
    column = "source_image"

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        rewards: list[float | None] = []
        for picture, source in zip(to_pil(images), columns.get(self.column) or [None] * len(prompts), strict=True):
            source = Image.open(source) if isinstance(source, str | Path) else source
            rewards.append(None if source is None else self._likeness(loaded, [picture, *to_pil([source])]))
        return rewards

    def _likeness(self, loaded: Any, pair: list[Image.Image]) -> float:
        return loaded.encode_images(pair).prod(0).sum().item()


class PickScoreReward(CLIPScoreReward):
    """PickScore: the scaled image-text cosine of a CLIP-H that was tuned on human picks.

    `r = exp(logit_scale) cos(e_text, e_image)`, about 15 to 26 (Stable Diffusion 3.5 medium scores 21.72 on Pick-a-Pic's
    test prompts). Flow-GRPO trains on the value divided by 26, which gives the same advantages.

    Args:
        model (`str`, *optional*): Hub id or local folder of a `CLIPModel`.
        processor (`str`, *optional*): Hub id or local folder of its processor; None for `model`'s own.
        options: See [`Reward`].

    Reference:
        Kirstain et al., Pick-a-Pic, arXiv 2305.01569.
    """

    default_name = "pickscore"
    range = "raw, about 15 to 26, larger is better"

    def __init__(
        self, model: str = "yuvalkirstain/PickScore_v1", processor: str | None = CLIP_H, **options: Any
    ) -> None:
        super().__init__(model, processor, **options)

    def _score(self, loaded: "CLIPTower", images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        return (loaded.logit_scale * loaded.cosines(prompts, images)).tolist()


class HPSv2Reward(Reward):
    """HPSv2: the image-text cosine of a CLIP-H that was tuned on human choices.

    `r = cos(e_text, e_image)`, about 0.15 to 0.35; tables often show it times 100. An image that is not square is fitted
    into a black square, as the authors' code does; other CLIP rewards cut its centre out.

    Args:
        weights (`str`, *optional*): A local file in open_clip's layout, or `"owner/repo:FILE"` on the hub.
        clip (`str`, *optional*): Hub id or local folder with the configuration and processor of the same CLIP.
        options: See [`Reward`].

    Reference:
        Wu et al., Human Preference Score v2, arXiv 2306.09341.
    """

    default_name = "hpsv2"
    range = "raw cosine, about 0.15 to 0.35, larger is better"
    weights_licence = "Apache-2.0"

    def __init__(self, weights: str = "xswu/HPSv2:HPS_v2.1_compressed.pt", clip: str = CLIP_H, **options: Any) -> None:
        super().__init__(**options)
        self.weights, self.clip = weights, clip

    def _load(self) -> "CLIPTower":
        return shared_tower(self.weights, self.clip, self.device, self.dtype, load=self._load_original)

    def _load_original(self, weights: str) -> Any:
        """A `CLIPModel` with the weights of open_clip's layout."""
        from transformers import CLIPConfig, CLIPModel

        model = CLIPModel(CLIPConfig.from_pretrained(self.clip))
        load_strictly(model, from_open_clip(read_weights(weights, "weights")), weights)
        return model

    def _score(self, loaded: "CLIPTower", images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        side = loaded.model.config.vision_config.image_size
        return loaded.cosines(prompts, [fit_square(image, side) for image in to_pil(images)]).tolist()


class AestheticReward(Reward):
    """LAION's aesthetic predictor: a linear head on the normalized CLIP-L image embedding.

    `r = head(e / ||e||)`, about 1 to 10 (Stable Diffusion 3.5 medium: about 5.4).

    Args:
        clip (`str`, *optional*): Hub id or local folder of a `CLIPModel`.
        head (`str`, *optional*): The head's weights: a local file, `"owner/repo:FILE"` or `"owner/repo"` on the hub.
        processor (`str`, *optional*): Hub id or local folder of CLIP's processor. Defaults to `clip`.
        options: See [`Reward`]. The `dtype` is CLIP's; the head is always float32.

    Reference:
        LAION's improved aesthetic predictor, on the SAC, Logos and AVA ratings.
    """

    default_name = "aesthetic"
    range = "raw, about 1 to 10, larger is better"
    weights_licence = "MIT (CLIP), Apache-2.0 (head)"

    def __init__(
        self,
        clip: str = CLIP_L,
        head: str = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",
        processor: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.clip, self.head, self.processor = clip, head, processor

    def _load(self) -> tuple["CLIPTower", "AestheticHead"]:
        tower = shared_tower(self.clip, self.processor, self.device, self.dtype)
        state = read_weights(self.head, "head")
        shapes = [state[key].shape for key in sorted(state) if re.fullmatch(r"layers\.\d\.weight", key)]
        if not shapes:
            raise RewardLoadError(
                f"{self.head} must hold `layers.N.weight`. Found {sorted(state)}. Pass the head's file."
            )
        head = AestheticHead(shapes[0][1], tuple(outputs for outputs, _ in shapes))
        load_strictly(head, state, self.head)
        return tower, head.to(self.device).eval().requires_grad_(False)

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        tower, head = loaded
        return head(tower.encode_images(images)).tolist()


class CLIPTower:
    """A `CLIPModel` with its processor; embeddings come out L2-normalized, in float32, on the model's device."""

    def __init__(self, model: Any, processor: str) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessorPil  # resizes by Pillow, as the published scores do

        self.model = model.eval().requires_grad_(False)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(processor)
        self.image_processor: Any = CLIPImageProcessorPil.from_pretrained(processor)
        self.image_embeddings = EmbeddingCache(1024)
        self.text_embeddings = EmbeddingCache(65536)
        self._lock = threading.RLock()

    @property
    def logit_scale(self) -> float:
        """The learned temperature, `exp` already taken."""
        return self.model.logit_scale.detach().float().exp().item()

    def cosines(self, prompts: list[str], images: Images) -> Float[Tensor, "B"]:
        """`cos(e_text, e_image)` of each prompt with its image."""
        return (self.encode_prompts(prompts) * self.encode_images(images)).sum(-1)

    def encode_images(self, images: Images) -> Float[Tensor, "B D"]:
        """Normalized image embeddings."""
        arrays = to_arrays(images)
        keys = [(array.shape, hashlib.blake2b(array.tobytes(), digest_size=16).digest()) for array in arrays]

        def embed(missing: list[int]) -> Tensor:
            new = [arrays[i] for i in missing]
            inputs = self.image_processor(new, return_tensors="pt", input_data_format="channels_last")
            pixels = inputs["pixel_values"].to(self.model.device, self.model.dtype)
            return normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float())

        with self._lock, torch.inference_mode():
            return self.image_embeddings.get(keys, embed)

    def encode_prompts(self, prompts: list[str]) -> Float[Tensor, "B D"]:
        """Normalized text embeddings; prompts beyond the model's length are cut."""

        def embed(missing: list[int]) -> Tensor:
            tokens = self.tokenizer(
                [prompts[i] for i in missing],
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.model.device)
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
            return normalize(self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output.float())

        with self._lock, torch.inference_mode():
            return self.text_embeddings.get(prompts, embed)


class EmbeddingCache:
    """The `size` embeddings that were used last, by a key of their content."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: OrderedDict[Any, Tensor] = OrderedDict()

    def get(self, keys: list, embed: Callable[[list[int]], Tensor]) -> Float[Tensor, "B D"]:
        """The embedding of each key; `embed` computes those of the positions in `keys` that are new."""
        missing = [i for i, key in enumerate(keys) if key not in self._kept and keys.index(key) == i]
        if missing:
            # A clone per row, so that a kept row does not hold the whole batch in memory.
            self._kept |= {keys[i]: row.clone() for i, row in zip(missing, embed(missing), strict=True)}
        for key in keys:
            self._kept.move_to_end(key)
        rows = torch.stack([self._kept[key] for key in keys])
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return rows


_towers: "weakref.WeakValueDictionary[tuple, CLIPTower]" = weakref.WeakValueDictionary()


def shared_tower(
    model: str,
    processor: str | None,
    device: torch.device,
    dtype: torch.dtype,
    load: Callable[[str], Any] | None = None,
) -> CLIPTower:
    """The one tower of this process for a model, device and precision; it goes when its last user unloads.

    `load` makes a `CLIPModel` of `model`; without it, `model` is a hub id or a local folder.
    """
    model, processor = str(model), str(processor or model)
    key = (model, processor, str(device), dtype, load is None)
    tower = _towers.get(key)  # one thread at a time comes here, from `Reward.load`
    if tower is None:
        from transformers import CLIPModel

        network = load(model) if load else load_network(CLIPModel, model)
        tower = _towers[key] = CLIPTower(network.to(device, dtype), processor)
    return tower


def load_network(kind: Any, model: str) -> Any:
    """A network of a class of `transformers` from the hub, or from a local folder that holds safetensors."""
    if Path(model).is_dir() and not list(Path(model).glob("*.safetensors")):
        raise RewardLoadError(
            f"A local model folder must hold safetensors weights. Found none in {model}. "
            "Save the model again with `save_pretrained`."
        )
    return kind.from_pretrained(model)  # pickled weights of the hub are read with `weights_only`


def fit_square(image: Image.Image, side: int) -> Image.Image:
    """Fit an RGB image into a black square of `side` pixels; a square image passes unchanged.

    Example:
        >>> fitted = fit_square(Image.new("RGB", (8, 4), "white"), side=4)
        >>> fitted.size, fitted.getpixel((0, 0)), fitted.getpixel((0, 1))
        ((4, 4), (0, 0, 0), (255, 255, 255))
    """
    if image.width == image.height:
        return image
    scale = side / max(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    square = Image.new("RGB", (side, side))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square


HIDDEN = (1024, 128, 64, 16, 1)
DROPOUT = {0: 0.2, 1: 0.2, 2: 0.1}


class AestheticHead(nn.Module):
    """Five linear layers with dropout between them and no activations: `r = W_5 W_4 W_3 W_2 W_1 e` with biases.

    The names of the tensors are those of the published weights, `layers.0.weight` to `layers.7.bias`.
    """

    def __init__(self, width: int = 768, hidden: tuple[int, ...] = HIDDEN) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(pairwise((width, *hidden))):
            layers.append(nn.Linear(inputs, outputs))
            if i in DROPOUT:
                layers.append(nn.Dropout(DROPOUT[i]))
        self.layers = nn.Sequential(*layers)

    def forward(self, embeddings: Float[Tensor, "B D"]) -> Float[Tensor, "B"]:
        """Score normalized image embeddings."""
        return self.layers(embeddings).squeeze(-1)


OPEN_CLIP_NAMES = (
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.", "vision_model."),
    (r"^(token_embedding|positional_embedding|transformer|ln_final)\b", r"text_model.\1"),
    (r"\.(token|class)_embedding\b", r".embeddings.\1_embedding"),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
    (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.ln_pre\.", ".pre_layrnorm."),  # transformers' own spelling
    (r"\.ln_post\.", ".post_layernorm."),
    (r"\.ln_final\.", ".final_layer_norm."),
    (r"\.transformer\.resblocks\.", ".encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of open_clip's `CLIP` to those of transformers' `CLIPModel`.

    Example:
        >>> sorted(from_open_clip({"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(6)}))[0]
        'text_model.encoder.layers.0.self_attn.k_proj.bias'
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        key = renamed(key, OPEN_CLIP_NAMES)
        if key.endswith("_projection.weight"):
            converted[key] = value.T.contiguous()
        elif ".in_proj_" in key:
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                converted[key.replace("in_proj_", f"{part}_proj.")] = tensor.clone()
        elif key != "attn_mask":
            converted[key] = value
    return converted
