"""The two forms an image batch comes in, and the exact way from one to the other."""

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from trl_apex.rewards.protocol import Images


def to_uint8(images: Tensor) -> UInt8[Tensor, "B 3 H W"]:
    """Quantize float images to bytes, as saving them to a file would.

    `u = round(255 clip(x, 0, 1))`, `x = images`.

    Args:
        images (`Tensor` of shape `[B, 3, H, W]`): Floats in [0, 1], or bytes, which pass unchanged.

    Returns:
        `Tensor` of shape `[B, 3, H, W]`, uint8.

    Raises:
        ValueError: If `images` has another shape or is neither float nor uint8.

    Example:

    ```python
    >>> import torch
    >>> from trl_apex.rewards.images import to_uint8
    >>> to_uint8(torch.tensor([0.0, 0.5, 1.2]).reshape(1, 3, 1, 1)).flatten().tolist()
    [0, 128, 255]

    ```
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"`images` must have shape [B, 3, H, W]. Found {list(images.shape)}. Pass RGB images, channels first."
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"`images` must be floats in [0, 1] or uint8. Found {images.dtype}. Convert them first.")
    # NaN has no defined byte value; black is what a failed decode is saved as.
    return torch.nan_to_num(images.detach().float(), nan=0.0).clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def to_arrays(images: Images) -> list[UInt8[np.ndarray, "H W 3"]]:
    """The images as RGB byte arrays, channels last, the form that PIL and OpenCV share.

    Args:
        images (`Sequence[PIL.Image.Image]` or `Tensor` of shape `[B, 3, H, W]`): The batch.

    Returns:
        `list[np.ndarray]`, one `[H, W, 3]` uint8 array per image.

    Example:

    ```python
    >>> from PIL import Image
    >>> from trl_apex.rewards.images import to_arrays
    >>> to_arrays([Image.new("L", (4, 2), 7)])[0].shape
    (2, 4, 3)

    ```
    """
    if isinstance(images, Tensor):
        return list(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())
    return [np.asarray(image.convert("RGB")) for image in images]


def to_pil(images: Images) -> list[Image.Image]:
    """The images as RGB PIL images.

    Args:
        images (`Sequence[PIL.Image.Image]` or `Tensor` of shape `[B, 3, H, W]`): The batch.

    Returns:
        `list[PIL.Image.Image]`.

    Example:

    ```python
    >>> import torch
    >>> from trl_apex.rewards.images import to_pil
    >>> to_pil(torch.ones(1, 3, 2, 4))[0].size
    (4, 2)

    ```
    """
    if isinstance(images, Tensor):
        return [Image.fromarray(array) for array in to_arrays(images)]
    return [image.convert("RGB") for image in images]
