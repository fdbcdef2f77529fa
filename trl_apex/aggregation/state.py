"""What the aggregator remembers from batch to batch, the same on every rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .normalize import Matrix, Vector

NEW_SINCE_0_1_0 = ("weights", "effective", "measured", "absent", "in_vain")  # missing from files of 0.1.0


@dataclass(frozen=True)
class Average:
    r"""Bias-corrected moving averages, one per entry, each holding its value while nothing is observed.

    $$T \leftarrow \beta T + (1-\beta) x, \qquad W \leftarrow \beta W + (1-\beta), \qquad \bar x = T / W$$

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
class PriorityState:
    """What the method needs, in float64 on the CPU, from gathered rewards alone."""

    iteration: int  # batches seen
    weights: Vector  # the user's weights that the priorities were made for, summing to one
    priorities: Vector  # weights for the next batch, summing to one
    variance: Average  # pooled within-group variance
    fast: Average  # mean reward, short memory
    slow: Average  # mean reward, long memory
    error: Average  # standard error of a batch's mean reward
    first_mean: Vector  # mean reward before training, or in the first batch; NaN before
    first_scale: Vector  # within-group standard deviation at the end of the warm-up; NaN before
    largest_scale: Vector  # the largest since then; NaN before
    dead_fraction: Vector  # share of dead groups in the last batch that had the objective
    conflict: Average  # correlation or cosine of the objectives
    margin: Matrix  # what counts as noise in `conflict`
    gradient_weights: Average  # weights from the gradients' Gram matrix

    @classmethod
    def initial(cls, weights: Vector, margin: float) -> PriorityState:
        """The state before the first batch, at the user's weights."""
        n = len(weights)
        unknown = torch.full((n,), torch.nan, dtype=torch.float64)
        return cls(
            iteration=0, weights=weights, priorities=weights,
            variance=Average.empty(n), fast=Average.empty(n), slow=Average.empty(n), error=Average.empty(n),
            first_mean=unknown, first_scale=unknown, largest_scale=unknown, dead_fraction=torch.zeros_like(unknown),
            conflict=Average.empty(n, n), margin=torch.full((n, n), margin, dtype=torch.float64),
            gradient_weights=Average.empty(n),
        )  # fmt: skip

    def with_conflict(self, measured: Matrix, noise: Matrix, decay: float, least: float) -> PriorityState:
        """The state with a correlation or cosine taken in; entries where `measured` is NaN are held."""
        margin = noise.nan_to_num(nan=1.0).clamp(least, 0.99)
        return replace(
            self,
            conflict=self.conflict.update(measured, decay),
            margin=torch.where(measured.isnan(), self.margin, margin),
        )

    @property
    def scale(self) -> Vector:
        """Pooled within-group standard deviation; NaN where no live group was seen."""
        return self.variance.value.sqrt()

    @property
    def widest(self) -> Vector:
        """The largest standard deviation known; 0 where none is."""
        return torch.stack([self.scale, self.first_scale, self.largest_scale]).nan_to_num(nan=0.0).amax(0)


@dataclass(frozen=True)
class ReportState:
    """What logs and warnings need; no advantage depends on it."""

    owned: Vector  # batches in a row in which the objective owned the advantage's variance
    silent: Vector  # batches in a row in which all its groups were dead
    absent: Vector  # batches in a row without any reward of it
    in_vain: Vector  # batches in a row in which it had far more than its weight, and no gain so far
    effective: Vector  # mean weight over the rows of the last batch
    measured: Matrix  # cosines of the gradients when last measured; NaN before

    @classmethod
    def initial(cls, weights: Vector) -> ReportState:
        """The state before the first batch."""
        zero = torch.zeros_like(weights)
        return cls(
            zero, zero, zero, zero, weights, torch.full((len(weights), len(weights)), torch.nan, dtype=torch.float64)
        )


# To and from the plain values of a checkpoint


def to_plain(state: Any) -> dict[str, Any]:
    """The fields as plain numbers, lists and None (for NaN), exact to the last bit through JSON."""
    return {item.name: _plain(getattr(state, item.name)) for item in fields(state)}


def from_plain(state: Any, plain: dict[str, Any]) -> Any:
    """A state with the shapes of `state` and the numbers of `plain`; a ValueError names what is missing or damaged."""
    names = [item.name for item in fields(state)]
    missing = [name for name in names if name not in plain and name not in NEW_SINCE_0_1_0]
    if missing:
        raise ValueError(
            f"The saved state must hold {', '.join(names)}. Found no {', '.join(missing)}. The file was cut, or saved by "
            "another version: start without the state."
        )
    values = {}
    for name in plain.keys() & names:
        old = getattr(state, name)
        try:
            values[name] = _like(old, plain[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"`{name}` of the saved state must hold numbers as in {str(_plain(old))[:80]}. Found "
                f"{str(plain[name])[:80]}. The file was damaged: start without the state, or from an older checkpoint."
            ) from error
    return replace(state, **values)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_plain(value)
    if isinstance(value, Tensor | list):
        return [_plain(item) for item in (value.tolist() if isinstance(value, Tensor) else value)]
    return None if isinstance(value, float) and math.isnan(value) else value


def _like(old: Any, plain: Any) -> Any:
    if isinstance(old, Average):
        return Average(_like(old.total, plain["total"]), _like(old.weight, plain["weight"]))
    if isinstance(old, Tensor):
        return torch.tensor(_numbers(plain), dtype=torch.float64).reshape(old.shape)
    return type(old)(plain)


def _numbers(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_numbers(item) for item in plain]
    return math.nan if plain is None else float(plain)
