"""A reward function of `DDPOTrainer`, as one of this package."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .images import to_arrays
from .protocol import Images

METADATA_COLUMN = "prompt_metadata"


def reward_from_ddpo(reward_function: Callable, name: str | None = None) -> Callable:
    """Adapt `reward_function(images, prompts, metadata) -> (rewards, reward_metadata)`.

    Args:
        reward_function (`Callable`): as in `trl.DDPOTrainer`: takes images as a float tensor of shape `[B, 3, H, W]` in
            [0, 1], a tuple of B prompts and a tuple of B metadata, and returns B rewards and something that is dropped.
        name (`str`, *optional*): of the objective; by default the function's own.

    Returns:
        `Callable`: takes this package's keywords. The metadata are dictionaries of the dataset's columns, or, where the
        dataset has the column `prompt_metadata`, what is in there.

    Example:
        >>> def brightness(images, prompts, metadata):
        ...     return images.mean((1, 2, 3)), {}
        >>> reward = reward_from_ddpo(brightness)
        >>> reward.__name__, reward(prompts=["grey"], completions=None, images=torch.full((1, 3, 8, 8), 0.5))
        ('brightness', [0.5])
    """

    def reward(
        prompts: Sequence[str], completions: Images | None = None, images: Tensor | None = None, **columns: Any
    ) -> list[float]:
        batch = images if images is not None else _tensor(completions)
        rows = {key: list(value) for key, value in columns.items() if _is_column(value, len(prompts))}
        metadata: list[Any] = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        metadata = rows.get(METADATA_COLUMN, metadata or [{}] * len(prompts))
        values, _ = reward_function(batch, tuple(prompts), tuple(metadata))
        return torch.as_tensor(values, dtype=torch.float64).flatten().tolist()

    reward.__name__ = str(name or getattr(reward_function, "__name__", type(reward_function).__name__))
    return reward


def _is_column(value: Any, size: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == size


def _tensor(pictures: Any) -> Tensor:
    arrays = np.stack(list(to_arrays(pictures)))
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
