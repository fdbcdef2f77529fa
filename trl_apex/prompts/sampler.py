"""Which prompts an iteration samples, and which (sample, step) rows each of its updates trains on."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Sampler

from ..diffusion.rollout import keyed_generator


class GroupSampler(Sampler[int]):
    """Yield dataset indices so that every iteration sees whole groups, on any number of processes.

    One iteration is `groups` prompts, each `group_size` times in a row. It is yielded `repeats` times, because Trainer
    draws a batch for every micro-batch of the update while the rollout behind it is made only once. Prompts beyond the
    last full iteration of an epoch wait for another epoch's order.

    Args:
        num_prompts (`int`): length of the dataset.
        groups (`int`): P, prompts an iteration.
        group_size (`int`): G, images a prompt.
        repeats (`int`): micro-batches an iteration.
        shuffle (`bool`): draw a new order each epoch.
        seed (`int`): of the order.

    Raises:
        ValueError: if there are fewer prompts than one iteration needs.

    Example:
        ```python
        >>> list(GroupSampler(5, groups=2, group_size=2, repeats=1, shuffle=False, seed=0))
        [0, 0, 1, 1, 2, 2, 3, 3]

        ```
    """

    def __init__(self, num_prompts: int, groups: int, group_size: int, repeats: int, shuffle: bool, seed: int):
        if num_prompts < groups:
            raise ValueError(
                f"One iteration needs {groups} prompts (generation_batch_size / num_generations). Found a dataset of "
                f"{num_prompts}. Add prompts, or lower `generation_batch_size`, or raise `num_generations`."
            )
        self.num_prompts, self.groups, self.group_size, self.repeats = num_prompts, groups, group_size, repeats
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = torch.arange(self.num_prompts)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_prompts, generator=generator)
        for start in range(0, self.num_prompts - self.groups + 1, self.groups):
            iteration = order[start : start + self.groups].repeat_interleave(self.group_size).tolist()
            for _ in range(self.repeats):
                yield from iteration

    def __len__(self) -> int:
        return self.num_prompts // self.groups * self.groups * self.group_size * self.repeats


def update_rows(
    num_samples: int, window: int, updates: int, first_sample: int, key: tuple[int, ...]
) -> Int[Tensor, "U M 2"]:
    """Split the rows of this rank's samples over the updates of one pass, evenly and at random.

    Where a sample's rows go depends only on its number among all ranks' samples, so each update sees the same rows on any
    number of processes.

    Args:
        num_samples (`int`): samples on this rank.
        window (`int`): N, trained steps a sample.
        updates (`int`): U, optimizer steps a pass; must divide `num_samples * window`.
        first_sample (`int`): number of this rank's first sample among all.
        key (`tuple[int, ...]`): seed, e.g. `(seed, iteration, pass)`.

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
        raise ValueError(f"{num_samples} x {window} rows do not split evenly over {updates} updates")
    block = updates // math.gcd(updates, window)  # the fewest samples whose rows split evenly
    if num_samples % block or first_sample % block:
        block = num_samples
    parts = []
    for start in range(0, num_samples, block):
        order = torch.randperm(block * window, generator=keyed_generator(*key, (first_sample + start) // block))
        sample, step = order // window + start, order % window
        parts.append(torch.stack([sample, step], -1).reshape(updates, -1, 2))
    return torch.cat(parts, 1)


def updates_per_pass(
    samples: int, window: int, batch_size: int, timestep_batch_size: int, accumulation_steps: int
) -> int:
    """Optimizer steps that one pass over this rank's `samples * window` rows takes.

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
