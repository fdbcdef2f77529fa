"""Which prompts an iteration is about."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


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
