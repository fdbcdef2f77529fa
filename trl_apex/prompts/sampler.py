"""Which prompts an iteration samples, and which (sample, step) rows each of its updates trains on."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
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

    With `sizes`, every iteration holds prompts of one size. The sizes take turns, each as often as its prompts fill iterations.

    Args:
        num_prompts (`int`): length of the dataset.
        groups, group_size (`int`): P, prompts an iteration, and G, images a prompt.
        repeats (`int`): micro-batches an iteration.
        shuffle, seed (`bool`, `int`): whether each epoch draws a new order, and the seed of that.
        kinds, mix (`Sequence`, `dict[str, float]`, *optional*): the kind of each prompt, and the share of each kind.
        sizes (`Sequence`, *optional*): the size of each prompt's images.
        dead_rate (`float`, *optional*, defaults to `1.0`): how likely a dead prompt, one that [`see`] was told of, takes part in
            a round of the prompts. What counts is which prompts were dead when the epoch began.

    Example:
        >>> list(GroupSampler(5, groups=2, group_size=2, repeats=1, shuffle=False, seed=0))
        [0, 0, 1, 1, 2, 2, 3, 3]
        >>> list(GroupSampler(4, 2, 1, 1, False, 0, kinds=["ocr", "any", "any", "any"], mix={"ocr": 1, "any": 1}))
        [0, 1, 0, 2, 0, 3]
        >>> list(GroupSampler(6, 2, 1, 1, False, 0, sizes=["wide", "tall", "wide", "tall", "tall", "tall"]))
        [1, 3, 0, 2, 4, 5]
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
        sizes: Sequence[Any] | None = None,
        dead_rate: float | int = 1.0,
    ):
        self.num_prompts, self.groups, self.group_size, self.repeats = num_prompts, groups, group_size, repeats
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        self.dead_rate, self.dead = dead_rate, set[int]()
        self._at_start: tuple[int, list[int]] = (-1, [])  # an epoch, and the prompts that were dead when it began
        self._order: list[list[int]] = []  # the prompts of the epoch's iterations
        if mix is not None:
            _check_mix(kinds or (), mix)
        of_size: dict[Any, list[int]] = {}
        for prompt in range(num_prompts):
            of_size.setdefault(sizes and sizes[prompt], []).append(prompt)
        self.parts = [  # of each size: quotas and prompts of each kind
            _quotas_and_prompts(own, size, groups, kinds or (), mix) for size, own in of_size.items()
        ]
        self.iterations = [math.floor(max(len(own) / quota for quota, own in part) + 1e-9) for part in self.parts]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self._at_start[0] != self.epoch:
            self._at_start = self.epoch, sorted(self.dead)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        iterations = [self._iterations(part, generator) for part in self.parts]
        self._order = [next(iterations[size]) for size in _in_turns(self.iterations)]
        for prompts in self._order:
            for _ in range(self.repeats):
                yield from (prompt for prompt in prompts for _ in range(self.group_size))

    def first(self, count: int) -> list[int]:
        """The prompts that the epoch begins with, in order, `count` of them or all that there are."""
        return [prompt for prompts in self._order for prompt in prompts][:count]

    def _iterations(self, part: list[tuple[float, Tensor]], generator: torch.Generator) -> Iterator[list[int]]:
        """The prompts of one iteration of this size after another, without end."""
        queues = [self._endless(own, math.ceil(quota), generator) for quota, own in part]
        quotas = [quota for quota, _ in part]
        whole = [math.floor(quota + 1e-9) for quota in quotas]
        owed = [0.0] * len(whole)  # what rounding kept from a kind, and will give it later
        while True:
            owed = [debt + quota - least for debt, quota, least in zip(owed, quotas, whole, strict=True)]
            paid = sorted(range(len(owed)), key=lambda kind: -round(owed[kind], 9))[: self.groups - sum(whole)]
            owed = [debt - (kind in paid) for kind, debt in enumerate(owed)]
            counts = [least + (kind in paid) for kind, least in enumerate(whole)]
            yield [next(queues[kind]) for kind in _in_turns(counts)]  # in turns, so that ranks share the kinds

    def _endless(self, prompts: Tensor, least: int, generator: torch.Generator) -> Iterator[int]:
        """Round after round of the prompts: of dead ones some, and `least` at least."""
        dead = torch.isin(prompts, torch.tensor(self._at_start[1], dtype=torch.long))
        while True:
            order = torch.randperm(len(prompts), generator=generator) if self.shuffle else torch.arange(len(prompts))
            if self.dead_rate < 1:
                rests = dead & (torch.rand(len(prompts), generator=generator) >= self.dead_rate)
                awake = max(len(prompts) - int(rests.sum()), least)
                order = order[rests[order].byte().argsort(stable=True)][:awake]
            yield from prompts[order].tolist()

    def see(self, iteration: int, dead: Bool[Tensor, "P"], scored: Bool[Tensor, "P"]) -> None:
        """Note which of an iteration's groups were dead in every objective; those that were not scored tell nothing."""
        prompts = self._order[iteration % len(self._order)]
        for prompt, is_dead, is_scored in zip(prompts, dead.tolist(), scored.tolist(), strict=True):
            if is_scored:
                (self.dead.add if is_dead else self.dead.discard)(prompt)

    def state_dict(self) -> dict[str, Any]:
        """What decides the order beside the arguments: dead prompts, now and when the epoch began."""
        return {"dead": sorted(self.dead), "epoch": self._at_start[0], "dead_at_start": self._at_start[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from [`state_dict`]."""
        self.dead, self._at_start = set(state["dead"]), (state["epoch"], state["dead_at_start"])

    def __len__(self) -> int:
        return sum(self.iterations) * self.groups * self.group_size * self.repeats


def _in_turns(counts: Sequence[int]) -> list[int]:
    """Each index of `counts` as often as it says, evenly spread: `[0, 1, 0]` for `[2, 1]`."""
    return [
        kind
        for _, kind in sorted(((i + 0.5) / count, kind) for kind, count in enumerate(counts) for i in range(count))
    ]


def _check_mix(kinds: Sequence[Any], mix: dict[str, float | int]) -> None:
    """Raise unless each kind has a share."""
    total, there = sum(mix.values()), set(kinds)
    if there != set(mix) or min(mix.values()) < 0 or not 0 < total < math.inf:
        raise ValueError(
            "`prompt_mix` must give each kind of the column a share that is not negative, and one that is positive. Found "
            f"{mix} and the kinds {sorted(map(str, there))}. Correct either; a share of 0 leaves a kind out."
        )


def _quotas_and_prompts(
    prompts: list[int], size: Any, groups: int, kinds: Sequence[Any], mix: dict[str, float | int] | None
) -> list[tuple[float, Tensor]]:
    """Of each kind of the prompts of one size, how many an iteration has, and which there are; ValueError for too few."""
    of_size = "" if size is None else f" of the size {size}"
    if len(prompts) < groups:
        found = f"{len(prompts)}{of_size}" if of_size else f"a dataset of {len(prompts)}"
        raise ValueError(
            f"One iteration needs {groups} prompts (generation_batch_size / num_generations), all of one size. Found {found}. "
            "Add prompts, or lower `generation_batch_size`, or raise `num_generations`."
        )
    if mix is None:
        return [(float(groups), torch.tensor(prompts))]
    part = []
    for kind, share in mix.items():
        quota, own = groups * share / sum(mix.values()), [prompt for prompt in prompts if kinds[prompt] == kind]
        if share and (quota < 1 - 1e-9 or len(own) < math.ceil(quota - 1e-9)):
            raise ValueError(
                f"Each kind must have at least one of the {groups} prompts of an iteration, and no prompt twice. Found a share of "
                f"{quota:.3g} for the {len(own)} prompts of {kind!r}{of_size}. Change the mix, `generation_batch_size` or the "
                "prompts."
            )
        if share:
            part.append((quota, torch.tensor(own)))
    return part


def update_rows(
    num_samples: int, window: int, updates: int, first_sample: int, key: tuple[int, ...]
) -> Int[Tensor, "U M 2"]:
    """Split the rows of this rank's samples over the updates of one pass, evenly and at random.

    Where a sample's rows go depends only on its number among all ranks' samples, so not on the number of processes.

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
    """Optimizer steps that one pass over this rank's `samples * window` rows takes; a ValueError unless they are whole.

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
