"""The one file that calls collectives: gather, reduce, fail together, and weights that an engine has sharded."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed
from accelerate.utils import gather, gather_object, reduce
from torch import Tensor, nn


class OtherRankError(RuntimeError):
    """Another process of the run failed, so this one stops too instead of waiting for it."""


def num_ranks() -> int:
    """Processes of this run, 1 if it is not distributed."""
    return torch.distributed.get_world_size() if _distributed() else 1


def this_rank() -> int:
    """Number of this process, from 0."""
    return torch.distributed.get_rank() if _distributed() else 0


def wait_for_all() -> None:
    """Return once every rank has called this."""
    if _distributed():
        torch.distributed.barrier()


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
    """The place of this rank's `size` rows in a gathered tensor."""
    return slice(rank * size, (rank + 1) * size)


def deal_groups(rows: list[Any], images: Tensor, group_size: int) -> tuple[list[Any], list[int], Tensor]:
    """Give each rank whole groups of the rows of all ranks: its rows, their numbers among all, and their images."""
    rows, images = gather_list(rows), gather_rows(images)
    mine = [i for i in range(len(rows)) if i // group_size % num_ranks() == this_rank()]
    return [rows[i] for i in mine], mine, images[mine]


def collect_dealt(numbers: list[int], values: Tensor) -> Tensor:
    """Values `[B, K]` of all rows in their order, gathered from the rows that [`deal_groups`] gave to each rank."""
    found = sorted(gather_list(list(zip(numbers, values.tolist(), strict=True))))
    return torch.tensor([row for _, row in found])


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank if `flag` is true on one."""
    return bool(gather(torch.tensor([flag], device=device)).any())


@contextmanager
def failing_together(what: str) -> Iterator[None]:
    """Make all ranks fail if one of them fails in this block, which must not call collectives.

    An exception on one rank alone would leave the others waiting in the next collective. The rank that failed raises its
    own error, every other rank an [`OtherRankError`] that quotes it. `what` is the work, for the message, such as "the rollout".
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    own = None if error is None else f"{type(error).__name__}: {error}"
    told = gather_list([own]) if _distributed() else []
    if error is not None:
        raise error
    failed = {rank: text for rank, text in enumerate(told) if text is not None}
    if failed:
        rank, text = next(iter(failed.items()))
        others = "" if len(failed) == 1 else f" (and ranks {sorted(failed)[1:]} with it)"
        raise OtherRankError(
            f"Every process must finish {what}. Rank {rank}{others} failed with {text} This process has no error of "
            f"its own; mend what rank {rank} reports."
        )


def lost_rank(error: BaseException) -> bool:
    """Whether an error means that another process died or closed its connections.

    Example:
        >>> lost_rank(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711"))
        True
    """
    if isinstance(error, torch.distributed.DistBackendError):  # NCCL has words of its own
        return True
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")
    return any(sign in text for sign in signs)


def check_equal(name: str, state: Any) -> None:
    """Raise a RuntimeError on every rank if the JSON value `state` differs between them; `name` is for the message."""
    text = json.dumps(state, sort_keys=True, default=repr)
    digests = gather_list([hashlib.sha256(text.encode()).hexdigest()]) if _distributed() else []
    if len(set(digests)) > 1:
        usual = max(digests, key=digests.count)  # the first of equals, so rank 0 where two ranks disagree
        others = [rank for rank, digest in enumerate(digests) if digest != usual]
        raise RuntimeError(
            f"{name} must be equal on all ranks. Found other values on rank {', '.join(map(str, others))} than on rank "
            f"{digests.index(usual)}. A checkpoint of it would be wrong, so none is written; the last one stands. "
            "Something rank-dependent reached the aggregation: look for rewards that are changed after the gather."
        )


# Weights that an engine has sharded


def is_sharded(parameter: Any) -> bool:
    """Whether this rank holds only a part of the parameter (ZeRO-3, FSDP2)."""
    return hasattr(parameter, "ds_tensor") or hasattr(parameter, "full_tensor")


def local_shard(parameter: Any) -> Tensor:
    """A view of the part of a parameter that this rank owns: all of it if nothing is sharded."""
    if hasattr(parameter, "ds_tensor"):
        if parameter.ds_status.name == "AVAILABLE":  # small parameters stay gathered, and would hide the shard
            parameter.partition(has_been_updated=False)
        return parameter.ds_tensor.data
    if hasattr(parameter, "to_local"):
        return parameter.to_local().data
    return parameter.data


def shard_of(value: Tensor, parameter: Any) -> Tensor:
    """The part of a whole tensor that this rank would own of a parameter of its shape; all ranks must call it."""
    if hasattr(parameter, "ds_tensor"):
        size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank(parameter.ds_process_group)
        part = value.flatten()[rank * size : (rank + 1) * size]
        return nn.functional.pad(part, (0, size - part.numel()))
    if hasattr(parameter, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, parameter.device_mesh, parameter.placements).to_local()
    return value


def whole_of(shard: Tensor, parameter: Any) -> Tensor:
    """The whole tensor of which each rank holds what it owns of a parameter; all ranks must call it."""
    if hasattr(parameter, "ds_tensor"):
        shard = shard.to(parameter.device)
        parts = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size(parameter.ds_process_group))]
        torch.distributed.all_gather(parts, shard, group=parameter.ds_process_group)
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
    if hasattr(parameter, "to_local"):
        from torch.distributed.tensor import DTensor

        size = {"shape": parameter.shape, "stride": parameter.stride()}
        return DTensor.from_local(shard, parameter.device_mesh, parameter.placements, **size).full_tensor()
    return shard


def full_trainable_weights(
    model: nn.Module, main_only: bool = False, shards: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """Unsharded trainable parameters by name, on the CPU; all ranks must call it, with `main_only` the others get none.

    `shards` are what this rank holds of other values for them, such as an average.
    """
    weights = {}
    for number, (name, parameter) in enumerate(named_trainable(model)):
        value = whole_of(local_shard(parameter) if shards is None else shards[number], parameter)
        if not main_only or this_rank() == 0:
            weights[name] = value.to("cpu", copy=True)
    return weights


def named_trainable(model: nn.Module) -> list[tuple[str, Any]]:
    """Trainable parameters by name; Any, since an engine adds to them what nn.Parameter does not have.

    FSDP2 leaves those of its root whole after a forward without gradients, in the precision of compute: here they are
    sharded again.
    """
    for module in _sharded_modules(model):
        module.reshard()
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]


@contextmanager
def gathered_for_rollout(model: nn.Module) -> Iterator[None]:
    """Keep unsharded weights of a wrapped model on every rank, instead of gathering each layer in each forward."""
    parameters = [p for p in model.parameters() if hasattr(p, "ds_tensor")]
    sharded = _sharded_modules(model)
    with _gathered(parameters), _without_zero3_hooks(model) if parameters else nullcontext():
        for module in sharded:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for module in sharded:
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()


def _sharded_modules(model: nn.Module) -> list[Any]:
    """The modules whose weights FSDP2 gathers together."""
    return [m for m in model.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")]


@contextmanager
def _gathered(parameters: Sequence[Tensor]) -> Iterator[None]:
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextmanager
def _without_zero3_hooks(engine: Any) -> Iterator[None]:
    from trl.models.utils import add_hooks, remove_hooks

    remove_hooks(engine)
    try:
        yield
    finally:
        add_hooks(engine)


@contextmanager
def whole_models() -> Iterator[None]:
    """Load transformers models unsharded while ZeRO-3 is on, which would partition them at once.

    Text encoders and reward models are never trained. Partitioned outside an engine, they fail in their first forward.
    """
    from transformers.integrations import deepspeed as integration

    reference = getattr(integration, "_hf_deepspeed_config_weak_ref", None)
    config = reference and reference()
    if config is None:
        yield
        return
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration.set_hf_deepspeed_config(config)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
