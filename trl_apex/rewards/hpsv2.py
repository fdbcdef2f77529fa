"""Human preference score v2: a CLIP-H tuned on people's choices between generated images."""

import re
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from trl_apex.rewards.image_tower import CLIPTower, shared_tower
from trl_apex.rewards.images import to_pil
from trl_apex.rewards.protocol import Images, Reward
from trl_apex.rewards.weights import find_weights, load_strictly, read_weights


class HPSv2Reward(Reward):
    """HPSv2: the image-text cosine of a CLIP-H that was tuned on human choices.

    `r = cos(e_text, e_image)`

    Range: raw cosine, about 0.15 to 0.35, larger is better; tables often show it times 100. Weights:
    `xswu/HPSv2`, Apache-2.0. They are in open_clip's layout and are converted to transformers' `CLIPModel` when they
    load, so open_clip is not needed.

    Args:
        weights (`str`, *optional*): A local file in open_clip's layout, or `"owner/repo:FILE"` on the hub.
        clip (`str`, *optional*): Hub id or local folder with the configuration and processor of the same CLIP.
        name (`str`, *optional*, defaults to `"hpsv2"`): Name of the objective.
        device (`str` or `torch.device`, *optional*): Defaults to the GPU if there is one.
        dtype (`torch.dtype`, *optional*): Defaults to float32.
        batch_size (`int`, *optional*, defaults to `16`): Samples per forward pass.

    Reference:
        Wu et al., Human Preference Score v2, arXiv 2306.09341.

    Note:
        An image that is not square is fitted into a black square, as the authors' code does; other CLIP rewards cut
        its centre out.
    """

    default_name = "hpsv2"
    range = "raw cosine, about 0.15 to 0.35, larger is better"
    weights_licence = "Apache-2.0"

    def __init__(
        self,
        weights: str = "xswu/HPSv2:HPS_v2.1_compressed.pt",
        clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(name=name, device=device, dtype=dtype, batch_size=batch_size)
        self.weights, self.clip = weights, clip

    def _load(self) -> CLIPTower:
        return shared_tower(self.weights, self.clip, self.device, self.dtype, load=self._load_clip)

    def _load_clip(self, weights: str) -> Any:
        from transformers import CLIPConfig, CLIPModel

        path = find_weights(weights, "weights")
        model = CLIPModel(CLIPConfig.from_pretrained(self.clip))
        load_strictly(model, from_open_clip(read_weights(path)), path.name)
        return model

    def _score(self, loaded: CLIPTower, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        pictures = [fit_square(image, loaded.model.config.vision_config.image_size) for image in to_pil(images)]
        return (loaded.encode_prompts(prompts) * loaded.encode_images(pictures)).sum(-1).tolist()


def fit_square(image: Image.Image, side: int) -> Image.Image:
    """Fit an image into a black square; a square image passes unchanged.

    Args:
        image (`PIL.Image.Image`): An RGB image.
        side (`int`): Side of the square, in pixels.

    Returns:
        `PIL.Image.Image`.

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_apex.rewards.hpsv2 import fit_square
    >>> fitted = fit_square(Image.new("RGB", (8, 4), "white"), side=4)
    >>> fitted.size, fitted.getpixel((0, 0)), fitted.getpixel((0, 1))
    ((4, 4), (0, 0, 0), (255, 255, 255))

    ```
    """
    if image.width == image.height:
        return image
    scale = side / max(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    square = Image.new("RGB", (side, side))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square


TOWER_NAMES = (
    (r"transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
TEXT_NAMES = (
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    *TOWER_NAMES,
)
VISION_NAMES = (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),  # transformers' own spelling
    (r"^ln_post\.", "post_layernorm."),
    *TOWER_NAMES,
)


def from_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of open_clip's `CLIP` to those of transformers' `CLIPModel`.

    Args:
        state (`dict[str, Tensor]`): open_clip's state dict.

    Returns:
        `dict[str, Tensor]`.

    Example:

    ```python
    >>> import torch
    >>> from trl_apex.rewards.hpsv2 import from_open_clip
    >>> sorted(from_open_clip({"transformer.resblocks.0.attn.in_proj_bias": torch.zeros(6)}))[0]
    'text_model.encoder.layers.0.self_attn.k_proj.bias'

    ```
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "logit_scale":
            renamed[key] = value
        elif key in ("visual.proj", "text_projection"):
            target = "visual_projection" if key == "visual.proj" else "text_projection"
            renamed[f"{target}.weight"] = value.T.contiguous()
        elif key.startswith("visual."):
            renamed |= _rename(key.removeprefix("visual."), value, VISION_NAMES, "vision_model.")
        elif key != "attn_mask":
            renamed |= _rename(key, value, TEXT_NAMES, "text_model.")
    return renamed


def _rename(key: str, value: Tensor, names: tuple[tuple[str, str], ...], prefix: str) -> dict[str, Tensor]:
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    joined = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", key)
    if joined is None:
        return {prefix + key: value}
    parts = zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True)
    return {f"{prefix}{joined[1]}.self_attn.{part}.{joined[2]}": tensor.clone() for part, tensor in parts}
