"""Rewards that compare the images of a group: rank by another reward, and win rate by a judge of pairs."""

import asyncio
import inspect
import math
from collections.abc import Callable
from itertools import permutations
from statistics import fmean
from typing import Any

from torch import Tensor

from trl_apex.rewards.base import Images, Reward, RewardList, to_pil, wants_whole_groups
from trl_apex.rewards.registry import load_rewards
from trl_apex.rewards.scoring import as_numbers, own_copies, reward_name, takes_images


class _Comparison(Reward):
    """Base: asks a reward or judge about whole groups."""

    whole_groups = True
    range = "0 to 1, larger is better"
    weights_licence = "that of what is inside"

    def __init__(self, asked: Callable | str, name: str | None, prefix: str) -> None:
        (self.asked,) = load_rewards([asked])
        super().__init__(name or f"{prefix}_{reward_name(self.asked)}", device="cpu")

    def load(self) -> Any:
        """Load what is inside as well: first, since two rewards that load wait for each other."""
        if self._loaded is None and hasattr(self.asked, "check"):
            self.asked.check()
        return super().load()

    def unload(self) -> None:
        super().unload()
        if hasattr(self.asked, "unload"):
            self.asked.unload()

    def offload(self) -> None:
        if hasattr(self.asked, "offload"):
            self.asked.offload()

    def _ask(self, size: int, **keywords: Any) -> RewardList:
        """What the reward or judge, blocking or async, returns: `size` numbers, NaN for missing."""
        returned = self.asked(**own_copies(keywords))
        if inspect.iscoroutine(returned):
            returned = asyncio.run(returned)
        return as_numbers(returned, reward_name(self.asked), size)


class RankReward(_Comparison):
    """The rank of an image in its group by another reward: the share of the others that it beats, half for equal ones.

    None for an image without a score, and where no other has one.

    Args:
        reward (`Callable` or `str`): A reward, blocking or async, or what [`load_reward`] takes. It gets prompts, images and
            columns, and none of TRL's `trainer_state`, `log_metric` and `log_extra`.
        name (`str`, *optional*): Name of the objective. Defaults to `rank_of_` and the reward's.

    Example:
        >>> import torch
        >>> def length(prompts, completions, answer, **kwargs):
        ...     return [len(text) for text in answer]
        >>> RankReward(length)(["a"] * 4, torch.zeros(4, 3, 8, 8), answer=["1", "333", "22", "22"])
        [0.0, 1.0, 0.5, 0.5]
    """

    def __init__(self, reward: Callable | str, name: str | None = None) -> None:
        super().__init__(reward, name, "rank_of")

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> RewardList:
        keywords = {**columns, "prompts": prompts, "completions": to_pil(images), "completion_ids": None}
        if not wants_whole_groups(self.asked):
            keywords.pop("group_ids", None)
        if isinstance(images, Tensor) and takes_images(self.asked):
            keywords["images"] = images
        scores = self._ask(len(prompts), **keywords)

        def rank(number: int, score: float) -> float | None:
            others = [other for i, other in enumerate(scores) if i != number and not math.isnan(other)]
            if math.isnan(score) or not others:
                return None
            return fmean((other < score) + (other == score) / 2 for other in others)

        return RewardList([rank(i, score) for i, score in enumerate(scores)], scores.errors)


class PairwiseReward(_Comparison):
    """The share of comparisons that an image wins against the others of its group, by a judge of pairs, each in both orders.

    `r_i = mean over j of (p(i, j) + 1 - p(j, i)) / 2`, in `n (n - 1)` comparisons; None for an image without an answer.

    Args:
        judge (`Callable` or `str`): `judge(prompts, first, second, **columns)`, blocking or async, with lists of PIL images.
            Returns for each pair the probability p that the first image is better, or None. Or what [`load_reward`] takes.
        name (`str`, *optional*): Name of the objective. Defaults to `wins_by_` and the judge's.
    """

    def __init__(self, judge: Callable | str, name: str | None = None) -> None:
        super().__init__(judge, name, "wins_by")

    def _score(self, loaded: Any, images: Images, prompts: list[str], columns: dict[str, Any]) -> RewardList:
        pictures, pairs = to_pil(images), list(permutations(range(len(prompts)), 2))
        first, second = [i for i, _ in pairs], [j for _, j in pairs]
        keywords = {name: [values[i] for i in first] for name, values in columns.items() if name != "group_ids"}
        keywords |= {"first": [pictures[i] for i in first], "second": [pictures[j] for j in second]}
        answers = self._ask(len(pairs), prompts=[prompts[i] for i in first], **keywords) if pairs else RewardList([])
        wins: list[list[float]] = [[] for _ in prompts]
        for i, j, answer in zip(first, second, answers, strict=True):
            if answer < 0 or answer > 1:
                raise ValueError(
                    f"A judge must return probabilities that the first image is better. Found {answer:g} from "
                    f"`{reward_name(self.asked)}`. Return numbers from 0 to 1, or None."
                )
            if not math.isnan(answer):
                wins[i].append(answer)
                wins[j].append(1 - answer)
        cause = next(filter(None, answers.errors), None)
        return RewardList([fmean(won) if won else None for won in wins], [None if won else cause for won in wins])
