"""Several images as one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw

LINE = 12
"""Pixels from one line of a caption to the next."""


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Lay images out row by row, on white.

    Args:
        images (`Sequence[PIL.Image.Image]`): of any sizes; a cell is as large as the largest.
        columns (`int`): images in a row.
        gap (`int`): pixels between cells.

    Raises:
        ValueError: if there is no image or no column.

    Example:
        >>> image_grid([Image.new("RGB", (8, 8))] * 3, columns=2, gap=1).size
        (17, 17)
    """
    if not images or columns < 1:
        raise ValueError(
            f"A grid needs at least one image and one column. Found {len(images)} images and {columns} columns. "
            "Pass a list of PIL images."
        )
    width, height = max(i.width for i in images), max(i.height for i in images)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image.convert("RGB"), (column * (width + gap), row * (height + gap)))
    return grid


def reward_grid(samples: Sequence[Mapping[str, Any]], columns: int, side: int = 160) -> Image.Image:
    """Images with their prompt and rewards beneath each, as one picture.

    Args:
        samples (`Sequence[Mapping]`): each with `prompt`, `image` (PIL) and `rewards` (name to number or None).
        columns (`int`): images in a row.
        side (`int`): pixels of the longer side of an image; small images are enlarged without blur.

    Example:
        >>> sample = {"prompt": "a cat", "image": Image.new("RGB", (8, 8)), "rewards": {"ocr": 0.5}}
        >>> reward_grid([sample] * 3, columns=2, side=64).size
        (130, 178)
    """
    return image_grid([_captioned(sample, side) for sample in samples], columns)


def _captioned(sample: Mapping[str, Any], side: int) -> Image.Image:
    image = sample["image"].convert("RGB")
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    lines = [sample["prompt"], *(f"{name} {_number(value)}" for name, value in sample["rewards"].items())]
    cell = Image.new("RGB", (image.width, image.height + LINE * len(lines)), "white")
    cell.paste(image)
    pen = ImageDraw.Draw(cell)
    for i, line in enumerate(lines):
        # The font that every Pillow has knows the letters of Latin-1.
        pen.text((1, image.height + LINE * i), line.encode("latin-1", "replace").decode("latin-1"), fill="black")
    return cell


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3g}"
