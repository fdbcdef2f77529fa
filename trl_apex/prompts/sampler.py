"""Which prompts an iteration samples, and which (sample, step) rows each of its updates trains on."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

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

    With a `mix`, every iteration holds `groups * share` prompts of each kind, up or down to a whole number so that the shares
    hold over the epoch. It goes once through the kind with the most prompts for its share; the others repeat.

    Args:
        num_prompts (`int`): length of the dataset.
        groups, group_size (`int`): P, prompts an iteration, and G, images a prompt.
        repeats (`int`): micro-batches an iteration.
        shuffle, seed (`bool`, `int`): whether each epoch draws a new order, and the seed of that.
        kinds, mix (`Sequence`, `dict[str, float]`, *optional*): the kind of each prompt, and the share of each kind.

    Raises:
        ValueError: if there are fewer prompts than one iteration needs, or the mix does not fit the kinds.

    Example:
        >>> list(GroupSampler(5, groups=2, group_size=2, repeats=1, shuffle=False, seed=0))
        [0, 0, 1, 1, 2, 2, 3, 3]
        >>> list(GroupSampler(4, 2, 1, 1, False, 0, kinds=["ocr", "any", "any", "any"], mix={"ocr": 1, "any": 1}))
        [0, 1, 0, 2, 0, 3]
    """

    def __init__(
        self,
        num_prompts: int,
        groups: int,
        group_size: int,
        repeats: int,
        shuffle: bool,
        seed: int,
        kinds: Sequence[Any] | None = None,
        mix: dict[str, float | int] | None = None,
    ):
        if num_prompts < groups:
            raise ValueError(
                f"One iteration needs {groups} prompts (generation_batch_size / num_generations). Found a dataset of "
                f"{num_prompts}. Add prompts, or lower `generation_batch_size`, or raise `num_generations`."
            )
        self.num_prompts, self.groups, self.group_size, self.repeats = num_prompts, groups, group_size, repeats
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.quotas, self.prompts = [float(groups)], [torch.arange(num_prompts)]  # of each kind
        if kinds is not None and mix is not None:
            _check_mix(kinds, mix, groups)
            drawn = [kind for kind, share in mix.items() if share]
            self.quotas = [groups * mix[kind] / sum(mix.values()) for kind in drawn]
            self.prompts = [torch.tensor([i for i, kind in enumerate(kinds) if kind == own]) for own in drawn]
        rounds = [len(own) / quota for own, quota in zip(self.prompts, self.quotas, strict=True)]
        self.iterations = math.floor(max(rounds) + 1e-9)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        queues = [self._endless(own, generator) for own in self.prompts]
        whole = [math.floor(quota + 1e-9) for quota in self.quotas]
        owed = [0.0] * len(whole)  # what rounding kept from a kind, and will give it later
        for _ in range(self.iterations):
            owed = [debt + quota - least for debt, quota, least in zip(owed, self.quotas, whole, strict=True)]
            paid = sorted(range(len(owed)), key=lambda kind: -round(owed[kind], 9))[: self.groups - sum(whole)]
            owed = [debt - (kind in paid) for kind, debt in enumerate(owed)]
            counts = [least + (kind in paid) for kind, least in enumerate(whole)]
            # The kinds take turns, so that ranks share them.
            turns = sorted(((i + 0.5) / count, kind) for kind, count in enumerate(counts) for i in range(count))
            iteration = [prompt for _, kind in turns for prompt in [next(queues[kind])] * self.group_size]
            for _ in range(self.repeats):
                yield from iteration

    def _endless(self, prompts: Tensor, generator: torch.Generator) -> Iterator[int]:
        while True:
            order = torch.randperm(len(prompts), generator=generator) if self.shuffle else slice(None)
            yield from prompts[order].tolist()

    def __len__(self) -> int:
        return self.iterations * self.groups * self.group_size * self.repeats


def _check_mix(kinds: Sequence[Any], mix: dict[str, float | int], groups: int) -> None:
    """Raise unless each kind has a share, of at least one prompt an iteration, and as many prompts."""
    total, there = sum(mix.values()), Counter(kinds)
    if set(there) != set(mix) or min(mix.values()) < 0 or not 0 < total < math.inf:
        raise ValueError(
            "`prompt_mix` must give each kind of the column a share that is not negative, and one that is positive. Found "
            f"{mix} and the kinds {sorted(map(str, there))}. Correct either; a share of 0 leaves a kind out."
        )
    for kind, share in mix.items():
        quota = groups * share / total
        if share and (quota < 1 - 1e-9 or there[kind] < math.ceil(quota - 1e-9)):
            raise ValueError(
                f"Each kind must have at least one of the {groups} prompts of an iteration, and no prompt twice. Found a share of "
                f"{quota:.3g} for the {there[kind]} prompts of {kind!r}. Change the mix, `generation_batch_size` or the prompts."
            )


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
        >>> rows = update_rows(num_samples=4, window=3, updates=2, first_sample=0, key=(0,))
        >>> rows.shape, sorted(map(tuple, rows.flatten(0, 1).tolist()))[:4]
        (torch.Size([2, 6, 2]), [(0, 0), (0, 1), (0, 2), (1, 0)])
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
        >>> updates_per_pass(samples=8, window=3, batch_size=4, timestep_batch_size=1, accumulation_steps=2)
        3
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
