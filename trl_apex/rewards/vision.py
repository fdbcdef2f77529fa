"""Rewards that need no prompt: how safe an image is, how much it keeps of its source, its size as a JPEG file."""

import io
from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image
from torch.nn.functional import cosine_similarity

from trl_apex.rewards.base import Images, Reward, RewardLoadError, to_pil
from trl_apex.rewards.clip import SourceReward, load_network


class SafetyReward(Reward):
    """How safe a classifier finds an image: `r` = the sum of its probabilities of the labels `safe`, 0 to 1.

    Args:
        model (`str`, *optional*): Hub id or local folder of a model that `AutoModelForImageClassification` loads.
        safe (`Sequence[str]`, *optional*, defaults to `["normal"]`): The model's labels of safe images.
        options: Those of [`Reward`].
    """

    default_name = "safety"
    range = "0 to 1, larger is better"
    weights_licence = "Apache-2.0"

    def __init__(
        self, model: str = "Falconsai/nsfw_image_detection", safe: Sequence[str] = ("normal",), **options: Any
    ) -> None:
        super().__init__(**options)
        self.model, self.safe = model, [safe] if isinstance(safe, str) else list(safe)

    def _load(self) -> tuple[Any, Any, list[int]]:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        model = load_network(AutoModelForImageClassification, self.model)
        labels: dict[str, int] = model.config.label2id
        if unknown := sorted(set(self.safe).difference(labels)):
            raise RewardLoadError(f"`safe` must name labels of {self.model}: {sorted(labels)}. Found {unknown}.")
        model.to(self.device, self.dtype).eval().requires_grad_(False)
        return model, AutoImageProcessor.from_pretrained(self.model, backend="pil"), [labels[key] for key in self.safe]

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        model, processor, safe = loaded
        pixels = processor(to_pil(images), return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
        return model(pixel_values=pixels).logits.float().softmax(-1)[:, safe].sum(-1).tolist()


class DINOSourceReward(SourceReward):
    """How much an edited image keeps of its source, by DINO: `r = cos(f_image, f_source)` of the class token, -1 to 1.

    CLIP asks whether the same kinds of things are there, DINO whether they are the same things.

    Args:
        model (`str`, *optional*): Hub id or local folder of a DINO, DINOv2 or other ViT that `AutoModel` loads.
        patches (`bool`, *optional*): Take the mean of the patches' cosines instead, which counts where things are too.
        options: Those of [`Reward`]. The column is that of [`SourceReward`].

    Reference:
        DINO's measure in Ruiz et al., DreamBooth, arXiv 2208.12242.
    """

    default_name = "dino_source"
    weights_licence = "Apache-2.0"

    def __init__(self, model: str = "facebook/dino-vits16", patches: bool = False, **options: Any) -> None:
        super().__init__(model, **options)
        self.patches = patches

    def _load(self) -> Any:
        from transformers import AutoImageProcessor, AutoModel

        model = load_network(AutoModel, self.model).to(self.device, self.dtype).eval().requires_grad_(False)
        return model, AutoImageProcessor.from_pretrained(self.model, backend="pil")

    def _likeness(self, loaded: Any, pair: list[Image.Image]) -> float:
        model, processor = loaded
        pixels = processor(pair, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
        image, source = model(pixel_values=pixels).last_hidden_state.float()
        likeness = cosine_similarity(image, source, dim=-1)
        extra = 1 + getattr(model.config, "num_register_tokens", 0)  # tokens that are no patch
        return (likeness[extra:].mean() if self.patches else likeness[0]).item()


class JPEGCompressibilityReward(Reward):
    """Rewards images that compress well: minus the kilobytes of the JPEG file, `r = -kB`, 1 kB = 1,000 bytes.

    Args:
        quality (`int`, *optional*, defaults to `95`): JPEG quality, 1 to 95.

    Example:
        >>> JPEGCompressibilityReward()(prompts=["x"], completions=[Image.new("RGB", (8, 8))])[0] < 0
        True

    Reference:
        Black et al., DDPO, arXiv 2305.13301: quality 95 and kB of 1,000 bytes, as here.
    """

    default_name = "jpeg_compressibility"
    range = "kB, below 0, larger is better"
    weights_licence = "no weights"
    sign: ClassVar[int] = -1

    def __init__(self, quality: int = 95, name: str | None = None) -> None:
        if not 1 <= quality <= 95:
            raise ValueError(f"`quality` must be between 1 and 95. Found {quality}. Pass 95 for DDPO's reward.")
        super().__init__(name=name, device="cpu", batch_size=64)
        self.quality = quality

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        kilobytes = []
        for image in to_pil(images):
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=self.quality)
            kilobytes.append(self.sign * len(buffer.getbuffer()) / 1000)
        return kilobytes


class JPEGIncompressibilityReward(JPEGCompressibilityReward):
    """Rewards images that compress badly: the kilobytes of the JPEG file; see [`JPEGCompressibilityReward`]."""

    default_name = "jpeg_incompressibility"
    range = "kB, above 0, larger is better"
    sign = 1
