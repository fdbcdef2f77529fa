"""Trains the held-out classifiers on rendered images with augmentation."""

import logging

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from trl_apex.tiny.heldout import HeldoutClassifier
from trl_apex.tiny.render import as_float
from trl_apex.tiny.schedule import warm_then_decay

logger = logging.getLogger(__name__)


def augment(images: Float[Tensor, "B 3 32 32"], generator: torch.Generator) -> Float[Tensor, "B 3 32 32"]:
    """Shifts the batch by up to one pixel and changes contrast, brightness and noise of each image.

    Args:
        images (`torch.Tensor`): In [0, 1], of shape `[B, 3, 32, 32]`.
        generator (`torch.Generator`): Advanced by the draw.

    Returns:
        `torch.Tensor`: In [0, 1], of the same shape.

    Example:
        >>> augment(torch.ones(2, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 32, 32])
    """
    down, right = torch.randint(3, (2,), generator=generator).tolist()
    shifted = functional.pad(images, (1, 1, 1, 1), mode="replicate")[:, :, down : down + 32, right : right + 32]
    contrast, brightness, noise = torch.rand(3, len(images), 1, 1, 1, generator=generator)
    changed = 0.5 + (0.7 + 0.4 * contrast) * (shifted - 0.5) + 0.1 * (brightness - 0.5)
    return (changed + 0.06 * noise * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def fit_heldout(
    pixels: UInt8[Tensor, "N 3 32 32"],
    labels: Int[Tensor, "N 5"],
    *,
    steps: int,
    batch_size: int = 96,
    seed: int = 0,
) -> HeldoutClassifier:
    """Trains the classifiers with the sum of five cross-entropies: three letters, the colour, the shape.

    Args:
        pixels (`torch.Tensor`): Images of shape `[N, 3, 32, 32]`, uint8.
        labels (`torch.Tensor`): Their classes, of shape `[N, 5]`, from [`~trl_apex.tiny.heldout.label_ids`].
        steps (`int`): Optimizer steps.
        batch_size (`int`, *optional*, defaults to 96): Images per step.
        seed (`int`, *optional*, defaults to 0): Seed of weights, batches and augmentation.

    Returns:
        `HeldoutClassifier`: In evaluation mode.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = HeldoutClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = warm_then_decay(optimizer, steps, warm_up=50)
    model.train()
    for step in range(steps):
        index = torch.randint(len(pixels), (batch_size,), generator=generator)
        letters, colour, shape = model(augment(as_float(pixels[index]), generator))
        classes = labels[index]
        loss = 3 * functional.cross_entropy(letters.flatten(0, 1), classes[:, :3].flatten())
        loss = loss + functional.cross_entropy(colour, classes[:, 3]) + functional.cross_entropy(shape, classes[:, 4])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            logger.info("heldout %d/%d loss %.3f", step, steps, loss.item())
    return model.eval().requires_grad_(False)
