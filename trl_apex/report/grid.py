"""Several images as one."""

from collections.abc import Sequence

from PIL import Image


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
