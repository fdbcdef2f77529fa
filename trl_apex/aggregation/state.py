"""The aggregator's memory: small, explicit, and the same on every rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Average:
    r"""Bias-corrected moving averages, one per entry, each holding its value while nothing is observed.

    $$T \leftarrow \beta T + (1-\beta) x, \qquad W \leftarrow \beta W + (1-\beta), \qquad \bar x = T / W$$

    Args:
        total (`Tensor`): \(T\).
        weight (`Tensor` of the same shape): \(W\), 0 where nothing was observed yet.

    Example:
        >>> average = Average.empty(2).update(torch.tensor([3.0, float("nan")], dtype=torch.float64), 0.9)
        >>> average.value.tolist()
        [3.0, nan]
    """

    total: Float[Tensor, " *S"]
    weight: Float[Tensor, " *S"]

    @classmethod
    def empty(cls, *shape: int) -> Average:
        """Averages that have seen nothing."""
        return cls(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))

    @property
    def value(self) -> Float[Tensor, " *S"]:
        """The averages; NaN where nothing was observed."""
        return self.total / self.weight

    def update(self, new: Float[Tensor, " *S"], decay: float) -> Average:
        """The averages with `new` taken in; entries where `new` is not finite are held."""
        seen = new.isfinite()
        total = torch.where(seen, decay * self.total + (1 - decay) * new, self.total)
        return Average(total, torch.where(seen, decay * self.weight + (1 - decay), self.weight))


@dataclass(frozen=True)
class AggregatorState:
    """Everything the aggregator remembers from batch to batch, in float64.

    It is computed from the gathered rewards alone, so it does not depend on the number of processes.

    Args:
        iteration (`int`): batches seen.
        priorities (`Tensor` of shape `[K]`): weights for the next batch, summing to one.
        variance ([`Average`] of shape `[K]`): pooled within-group variance.
        fast ([`Average`] of shape `[K]`): mean reward, short memory.
        slow ([`Average`] of shape `[K]`): mean reward, long memory.
        error ([`Average`] of shape `[K]`): standard error of a batch's mean reward.
        first_mean (`Tensor` of shape `[K]`): mean reward at the end of the warm-up; NaN before.
        first_scale (`Tensor` of shape `[K]`): within-group standard deviation then; NaN before.
        largest_scale (`Tensor` of shape `[K]`): the largest since then; NaN before.
        dead_fraction (`Tensor` of shape `[K]`): share of dead groups in the last batch that had the objective.
        conflict ([`Average`] of shape `[K, K]`): correlation or cosine of the objectives.
        margin (`Tensor` of shape `[K, K]`): what counts as noise in `conflict`.
        gradient_weights ([`Average`] of shape `[K]`): weights from the gradients' Gram matrix.
        owned (`Tensor` of shape `[K]`): batches in a row in which the objective owned the advantage's variance.
        silent (`Tensor` of shape `[K]`): batches in a row in which all groups were dead for the objective.
    """

    iteration: int
    priorities: Float[Tensor, " K"]
    variance: Average
    fast: Average
    slow: Average
    error: Average
    first_mean: Float[Tensor, " K"]
    first_scale: Float[Tensor, " K"]
    largest_scale: Float[Tensor, " K"]
    dead_fraction: Float[Tensor, " K"]
    conflict: Average
    margin: Float[Tensor, "K K"]
    gradient_weights: Average
    owned: Float[Tensor, " K"]
    silent: Float[Tensor, " K"]

    @classmethod
    def initial(cls, weights: Float[Tensor, " K"], margin: float) -> AggregatorState:
        """The state before the first batch, at the user's weights."""
        n = len(weights)
        zero, unknown = torch.zeros(n, dtype=torch.float64), torch.full((n,), torch.nan, dtype=torch.float64)
        return cls(
            iteration=0,
            priorities=weights.clone(),
            variance=Average.empty(n),
            fast=Average.empty(n),
            slow=Average.empty(n),
            error=Average.empty(n),
            first_mean=unknown,
            first_scale=unknown.clone(),
            largest_scale=unknown.clone(),
            dead_fraction=zero,
            conflict=Average.empty(n, n),
            margin=torch.full((n, n), margin, dtype=torch.float64),
            gradient_weights=Average.empty(n),
            owned=zero.clone(),
            silent=zero.clone(),
        )

    @property
    def scale(self) -> Float[Tensor, " K"]:
        """Pooled within-group standard deviation; NaN where no live group was seen."""
        return self.variance.value.sqrt()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and None, exact to the last bit through JSON."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    def loaded(self, plain: dict[str, Any]) -> AggregatorState:
        """A state with this one's shapes and the numbers of `plain`."""
        return replace(self, **{item.name: _like(getattr(self, item.name), plain[item.name]) for item in fields(self)})


def _plain(value: Any) -> Any:
    if isinstance(value, Average):
        return {"total": _plain(value.total), "weight": _plain(value.weight)}
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _like(old: Any, plain: Any) -> Any:
    if isinstance(old, Average):
        return Average(_like(old.total, plain["total"]), _like(old.weight, plain["weight"]))
    if isinstance(old, Tensor):
        return torch.tensor(_numbers(plain), dtype=torch.float64).reshape(old.shape)
    return int(plain)


def _numbers(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_numbers(item) for item in plain]
    return math.nan if plain is None else float(plain)
