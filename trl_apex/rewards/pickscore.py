"""How much people would pick this image for this prompt."""

from typing import Any

import torch

from trl_apex.rewards.image_tower import CLIPTower, shared_tower
from trl_apex.rewards.protocol import Images, Reward


class PickScoreReward(Reward):
    """PickScore: the scaled image-text cosine of a CLIP-H that was tuned on human picks.

    `r = exp(logit_scale) cos(e_text, e_image)`

    Range: raw scale, about 15 to 26 (Stable Diffusion 3.5 medium scores 21.72 on Pick-a-Pic's test prompts), larger
    is better. Weights: `yuvalkirstain/PickScore_v1`, MIT.

    Args:
        model (`str`, *optional*): Hub id or local folder of a `CLIPModel`.
        processor (`str`, *optional*): Hub id or local folder of its processor; None for `model`'s own.
        name (`str`, *optional*, defaults to `"pickscore"`): Name of the objective.
        device (`str` or `torch.device`, *optional*): Defaults to the GPU if there is one.
        dtype (`torch.dtype`, *optional*): Defaults to float32.
        batch_size (`int`, *optional*, defaults to `16`): Samples per forward pass.

    Reference:
        Kirstain et al., Pick-a-Pic, arXiv 2305.01569.

    Note:
        Flow-GRPO trains on the value divided by 26; this is the undivided value, as tables report it. Advantages do
        not change with the scale.
    """

    default_name = "pickscore"
    range = "raw, about 15 to 26, larger is better"
    weights_licence = "MIT"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
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
        cosine = (loaded.encode_prompts(prompts) * loaded.encode_images(images)).sum(-1)
        return (loaded.logit_scale * cosine).tolist()
