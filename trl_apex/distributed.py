"""The one file that calls collectives."""

from typing import Any

import torch
from accelerate.utils import gather, gather_object, reduce
from torch import Tensor


def gather_rows(values: Tensor) -> Tensor:
    """Concatenate equally long tensors of all ranks along the first axis, in rank order."""
    return gather(values)


def gather_list(values: list[Any]) -> list[Any]:
    """Concatenate lists of all ranks, in rank order."""
    return gather_object(values)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over ranks."""
    return reduce(values, reduction="sum")


def local_slice(size: int, rank: int) -> slice:
    """Where this rank's `size` rows stand in a gathered tensor."""
    return slice(rank * size, (rank + 1) * size)


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank where it is true on one."""
    return bool(gather(torch.tensor([flag], device=device)).any())
