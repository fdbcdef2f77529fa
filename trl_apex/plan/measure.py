"""Memory of a forward pass on the meta device: the real code runs, on shapes alone."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

LOWER = (F.linear, F.conv2d, torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__)
"""What autocast runs in half precision."""
UPPER = (F.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax)
"""What autocast runs in float32."""


class _Attention(torch.autograd.Function):
    """Attention as fused kernels do it: no matrix of all pairs is kept, only inputs, output and one sum a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("a plan runs no backward pass")


class _AsOnTheDevice(TorchFunctionMode):
    """Fused attention, and autocast to `half` where it is given (the meta device has neither of its own)."""

    def __init__(self, half: torch.dtype | None) -> None:
        self.half = half
        self.copies: dict[tuple[int, torch.dtype], Tensor] = {}  # autocast casts a weight once

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = [*args[:3], *(kwargs[name] for name in ("query", "key", "value")[len(args[:3]) :])]
            return _Attention.apply(*(self.cast(tensor, self.half) for tensor in given))
        if func in LOWER:
            args, kwargs = self._cast_all(args, self.half), {k: self.cast(v, self.half) for k, v in kwargs.items()}
        elif func in UPPER and self.half is not None:
            args = self._cast_all(args, torch.float32)
            kwargs = {k: self.cast(v, torch.float32) for k, v in kwargs.items()}
        return func(*args, **kwargs)

    def _cast_all(self, values: tuple, dtype: torch.dtype | None) -> tuple:
        return tuple(self.cast(value, dtype) for value in values)

    def cast(self, value: Any, dtype: torch.dtype | None) -> Any:
        if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(dtype)
        key = (id(value), dtype)
        if key not in self.copies:
            self.copies[key] = value.to(dtype)
        return self.copies[key]


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor], half: torch.dtype | None = None) -> int:
    """Bytes that a forward pass keeps for its backward pass, beside the weights.

    Args:
        module (`nn.Module`): on the meta device; what requires gradients, and its gradient checkpointing, count.
        forward (`Callable`): calls it.
        half (`torch.dtype`, *optional*): of autocast.
    """
    mode = _AsOnTheDevice(half)
    seen: dict[int, tuple[int, Any]] = {}
    own = {t.untyped_storage()._cdata for t in [*module.parameters(), *module.buffers()]}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage._cdata] = (storage.nbytes(), storage)  # alive, so that no other storage takes its address
        return tensor

    with mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    own |= {copy.untyped_storage()._cdata for copy in mode.copies.values()}
    del output
    return sum(size for address, (size, _) in seen.items() if address not in own)


class _Peak(TorchDispatchMode):
    """The most bytes that results of operations have taken at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._alive and key not in given:
                self._alive[key] = size
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, key)
        return result

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)


@torch.no_grad()
def peak_bytes(module: nn.Module, forward: Callable[[], Any], half: torch.dtype | None = None) -> int:
    """The most bytes that a forward pass without gradients takes at one time, beside weights and inputs.

    Takes the arguments of [`saved_bytes`].
    """
    mode, peak = _AsOnTheDevice(half), _Peak()
    for parameter in module.parameters():
        mode.cast(parameter, half)  # beforehand, so that it is not counted
    with peak, mode:
        forward()
    return peak.most


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    return []
