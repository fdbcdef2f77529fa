"""How close image and prompt are for a plain CLIP."""

from typing import Any

import torch

from trl_apex.rewards.image_tower import CLIPTower, shared_tower
from trl_apex.rewards.protocol import Images, Reward


class CLIPScoreReward(Reward):
    """CLIPScore: the image-text cosine of CLIP, in hundredths.

    `r = 100 cos(e_text, e_image)`

    Range: -100 to 100, in practice 10 to 40, larger is better. Weights: `openai/clip-vit-large-patch14`, MIT. The
    default model is the one of [`AestheticReward`], and the two share one copy of it and of each image's embedding.

    Args:
        model (`str`, *optional*): Hub id or local folder of a `CLIPModel`.
        processor (`str`, *optional*): Hub id or local folder of its processor. Defaults to `model`.
        name (`str`, *optional*, defaults to `"clip_score"`): Name of the objective.
        device (`str` or `torch.device`, *optional*): Defaults to the GPU if there is one.
        dtype (`torch.dtype`, *optional*): Defaults to float32.
        batch_size (`int`, *optional*, defaults to `16`): Samples per forward pass.

    Reference:
        Hessel et al., CLIPScore, arXiv 2104.08718.

    Note:
        The article's own score is `2.5 max(cos, 0)` with ViT-B/32. A negative cosine is not clipped here, so that the
        reward keeps a slope everywhere.
    """

    default_name = "clip_score"
    range = "-100 to 100, in practice 10 to 40, larger is better"
    weights_licence = "MIT"

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        name: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 16,
    ) -> None:
        super().__init__(name=name, device=device, dtype=dtype, batch_size=batch_size)
        self.model, self.processor = model, processor

    def _load(self) -> CLIPTower:
        return shared_tower(self.model, self.processor, self.device, self.dtype)

    def _score(self, loaded: CLIPTower, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        return (100 * (loaded.encode_prompts(prompts) * loaded.encode_images(images)).sum(-1)).tolist()
