"""How small or large the image is as a JPEG file."""

import io
from typing import Any, ClassVar

from PIL import Image

from trl_apex.rewards.base import Images, Reward, to_pil

QUALITY = 95


class JPEGCompressibilityReward(Reward):
    """Rewards images that compress well: minus the kilobytes of the JPEG file, `r = -kB`, 1 kB = 1,000 bytes.

    Args:
        quality (`int`, *optional*, defaults to `95`): JPEG quality, 1 to 95.
        name (`str`, *optional*, defaults to `"jpeg_compressibility"`): Name of the objective.

    Example:
        >>> from trl_apex.rewards import JPEGCompressibilityReward
        >>> JPEGCompressibilityReward()(prompts=["x"], completions=[Image.new("RGB", (8, 8))])[0] < 0
        True

    Reference:
        Black et al., DDPO, arXiv 2305.13301: quality 95 and kB of 1,000 bytes, as here.
    """

    default_name = "jpeg_compressibility"
    range = "kB, below 0, larger is better"
    weights_licence = "no weights"
    sign: ClassVar[int] = -1

    def __init__(self, quality: int = QUALITY, name: str | None = None) -> None:
        if not 1 <= quality <= 95:
            raise ValueError(f"`quality` must be between 1 and 95. Found {quality}. Pass 95 for DDPO's reward.")
        super().__init__(name=name, device="cpu", batch_size=64)
        self.quality = quality

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> list:
        return [self.sign * jpeg_kilobytes(image, self.quality) for image in to_pil(images)]


class JPEGIncompressibilityReward(JPEGCompressibilityReward):
    """Rewards images that compress badly: the kilobytes of the JPEG file; see [`JPEGCompressibilityReward`]."""

    default_name = "jpeg_incompressibility"
    range = "kB, above 0, larger is better"
    sign = 1


def jpeg_kilobytes(image: Image.Image, quality: int = QUALITY) -> float:
    """Size of an RGB image as JPEG, in kB of 1,000 bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return len(buffer.getbuffer()) / 1000
