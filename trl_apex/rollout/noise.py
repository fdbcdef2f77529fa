"""Noise keyed by what it is for, so that results do not depend on batch order or the number of processes."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator whose seed is a hash of `key`.

    Example:
        ```python
        >>> a, b = keyed_generator(0, 1, 2), keyed_generator(0, 1, 2)
        >>> bool((torch.randn(3, generator=a) == torch.randn(3, generator=b)).all())
        True

        ```
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


def keyed_noise(keys: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> Float[Tensor, "B ..."]:
    """Unit normal noise, one independent draw of `shape` a key, float32 on the CPU.

    Args:
        keys (sequence of `tuple[int, ...]`): e.g. `(seed, iteration, sample)`; equal keys give equal noise.
        shape (`tuple[int, ...]`): of one draw.

    Returns:
        `torch.Tensor` of shape `[len(keys), *shape]`

    Note:
        Drawn on the CPU for every device: the same seed gives the same noise on any hardware.
    """
    return torch.stack([torch.randn(shape, generator=keyed_generator(*key)) for key in keys])
