"""Noise keyed by what it is for, so that results do not depend on batch order or the number of processes."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# What a random draw is for, the second entry of its key.
INITIAL_NOISE, STEP_NOISE, ROW_ORDER, EVAL_NOISE = range(4)


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


def evaluation_noise(seed: int, rows: Sequence[int], shape: tuple[int, ...]) -> Float[Tensor, "B ..."]:
    """The noise that evaluation starts from: a row keeps its own, whatever the batch, the weights or the step.

    Args:
        seed (`int`): of the run.
        rows (sequence of `int`): numbers of rows in the evaluation dataset.
        shape (`tuple[int, ...]`): of one latent.

    Returns:
        `torch.Tensor` of shape `[len(rows), *shape]`
    """
    return keyed_noise([(seed, EVAL_NOISE, row) for row in rows], shape)
