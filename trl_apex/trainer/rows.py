"""Which (sample, step) rows each optimizer step of an iteration trains on."""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from ..rollout.noise import keyed_generator


def update_rows(
    num_samples: int, window: int, updates: int, first_sample: int, key: tuple[int, ...]
) -> Int[Tensor, "U M 2"]:
    """Deal the rows of this rank's samples to the updates of one pass, evenly and at random.

    The deal of a sample depends on its number among all ranks' samples alone, so the set of rows behind each optimizer
    step is the same on any number of processes.

    Args:
        num_samples (`int`): samples on this rank.
        window (`int`): N, trained steps a sample.
        updates (`int`): U, optimizer steps a pass; must divide `num_samples * window`.
        first_sample (`int`): number of this rank's first sample among all.
        key (`tuple[int, ...]`): seeds the deal, e.g. `(seed, iteration, pass)`.

    Returns:
        `torch.Tensor` of shape `[U, num_samples * N / U, 2]`: local sample and step of the window.

    Example:
        ```python
        >>> rows = update_rows(num_samples=4, window=3, updates=2, first_sample=0, key=(0,))
        >>> rows.shape, sorted(map(tuple, rows.flatten(0, 1).tolist()))[:4]
        (torch.Size([2, 6, 2]), [(0, 0), (0, 1), (0, 2), (1, 0)])

        ```
    """
    if num_samples * window % updates:
        raise ValueError(f"{num_samples} x {window} rows cannot be dealt evenly to {updates} updates")
    block = updates // math.gcd(updates, window)  # the fewest samples whose rows split evenly
    if num_samples % block or first_sample % block:
        block = num_samples
    dealt = []
    for start in range(0, num_samples, block):
        order = torch.randperm(block * window, generator=keyed_generator(*key, (first_sample + start) // block))
        sample, step = order // window + start, order % window
        dealt.append(torch.stack([sample, step], -1).reshape(updates, -1, 2))
    return torch.cat(dealt, 1)


def updates_per_pass(
    samples: int, window: int, batch_size: int, timestep_batch_size: int, accumulation_steps: int
) -> int:
    """How many optimizer steps one pass over this rank's rows of an iteration takes.

    Args:
        samples (`int`): images on this rank.
        window (`int`): trained steps of each.
        batch_size (`int`): `per_device_train_batch_size`.
        timestep_batch_size (`int`): steps of an image that share a forward.
        accumulation_steps (`int`): micro-batches of `batch_size * timestep_batch_size` rows an optimizer step.

    Raises:
        ValueError: if the rows do not split into whole updates.

    Example:
        ```python
        >>> updates_per_pass(samples=8, window=3, batch_size=4, timestep_batch_size=1, accumulation_steps=2)
        3

        ```
    """
    rows_per_step = batch_size * timestep_batch_size
    rows_per_update = rows_per_step * accumulation_steps
    if samples * window % rows_per_update:
        raise ValueError(
            "An iteration must split into whole updates: images per device x trained steps must be a multiple of "
            "per_device_train_batch_size x timestep_batch_size x gradient_accumulation_steps. Found "
            f"{samples} x {window} rows and {batch_size} x {timestep_batch_size} x {accumulation_steps} = "
            f"{rows_per_update} rows an update. For one update an iteration set "
            f"gradient_accumulation_steps={max(samples * window // rows_per_step, 1)}."
        )
    return samples * window // rows_per_update
