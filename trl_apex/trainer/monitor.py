"""Watches held-out rewards from one evaluation to the next."""

import hashlib
import json
import logging
import math
from typing import Any

import torch

from ..evaluation import hacking_signs

logger = logging.getLogger(__name__)


class RewardHackingWatch:
    """Warns, once, when a monitored reward has fallen since the first evaluation while the trained ones rose.

    Args:
        trained (`int`): how many of the rewards, the first ones, are trained on.
    """

    def __init__(self, trained: int):
        self._trained = trained
        self._first: dict[str, dict[str, Any]] = {}
        self._warned = False

    def see(self, dataset: str, names: list[str], records: list[dict[str, Any]], step: int) -> None:
        """Compare an evaluation with the first one of the same dataset.

        Args:
            dataset (`str`): its name, e.g. the prefix of its metrics.
            names (`list[str]`): of the rewards, trained ones first.
            records (`list[dict]`): one a row, with `prompt` and `rewards`.
            step (`int`): optimizer steps so far.
        """
        prompts = json.dumps([[record["prompt"] for record in records], names])
        key = hashlib.sha256(prompts.encode()).hexdigest()[:16]
        rewards = [[_finite(record["rewards"][name]) for name in names] for record in records]
        first = self._first.get(dataset)
        if first is None or first["key"] != key:
            self._first[dataset] = {"key": key, "rewards": rewards}
            return
        if self._warned or len(names) == self._trained:
            return
        signs = hacking_signs(names, _tensor(first["rewards"]), _tensor(rewards), self._trained)
        if signs:
            self._warned = True
            logger.warning(
                "Possible reward hacking at step %d: since the first evaluation, the trained rewards (%s) rose by more than 2 "
                "standard errors on average, while %s. Look at the images. `beta` > 0, a lower learning rate or an earlier "
                "checkpoint help.",
                step,
                ", ".join(names[: self._trained]),
                " and ".join(signs),
            )

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first, self._warned = state["first"], state["warned"]


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _tensor(rows: list[list[float | None]]) -> torch.Tensor:
    return torch.tensor([[math.nan if value is None else value for value in row] for row in rows], dtype=torch.float64)
