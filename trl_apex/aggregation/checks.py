"""What the aggregator asks of its inputs, in words for the user."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .options import SIGNED_RULES, ApexOptions


def checked_options(objectives: list[str], options: dict) -> ApexOptions:
    """The options as an [`ApexOptions`], or a ValueError that says what is wrong with them."""
    known = ApexOptions.__dataclass_fields__
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"Options must be fields of ApexOptions. Found {', '.join(unknown)}. Use one of: {', '.join(known)}."
        )
    if isinstance(options.get("scale_rewards"), bool):  # as TRL accepts it
        options = {**options, "scale_rewards": "group" if options["scale_rewards"] else "none"}
    result = ApexOptions(**options)
    targets = result.reward_targets
    if targets is not None and len(targets) != len(objectives):
        raise ValueError(
            f"`reward_targets` must have one number per objective ({len(objectives)}). Found {len(targets)}. "
            "Pass nan for an objective without a target."
        )
    return result


def checked_batch(
    objectives: list[str], rewards: Tensor, group_ids: Tensor, mask: Tensor | None
) -> tuple[Float[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """The rewards on the CPU with NaN where missing, and where they are valid; a ValueError if shapes do not fit."""
    size = len(objectives)
    if rewards.ndim != 2 or rewards.shape[1] != size or not len(rewards):
        raise ValueError(
            f"`rewards` must have shape [B, K] with K = {size} ({', '.join(map(repr, objectives))}). "
            f"Found {list(rewards.shape)}. Pass one column per objective, in that order."
        )
    if group_ids.ndim != 1 or len(group_ids) != len(rewards) or group_ids.is_floating_point():
        raise ValueError(
            f"`group_ids` must be integers of shape [{len(rewards)}], one per row of `rewards`. "
            f"Found {list(group_ids.shape)} of {group_ids.dtype}. Pass the number of each row's prompt."
        )
    if mask is not None and mask.shape != rewards.shape:
        raise ValueError(
            f"`mask` must have the shape of `rewards`, {list(rewards.shape)}. Found {list(mask.shape)}. "
            "Pass one boolean per reward."
        )
    values = rewards.detach().cpu()
    values = values if values.dtype == torch.float64 else values.float()
    valid = values.isfinite() if mask is None else values.isfinite() & mask.cpu()
    return torch.where(valid, values, torch.nan), valid


def checked_weights(objectives: list[str], weights: list[float] | None, rule: str) -> Float[Tensor, " K"]:
    """The user's weights as they were given, 1 each if they were not; a ValueError if they do not fit."""
    if weights is None:
        return torch.ones(len(objectives), dtype=torch.float64)
    given = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    if len(given) != len(objectives):
        raise ValueError(
            f"`weights` must have one number per objective ({len(objectives)}). Found {len(given)}. "
            f"Pass them in the order {objectives}."
        )
    if not bool(given.isfinite().all()) or not bool((given != 0).any()):
        raise ValueError(f"`weights` must be finite and not all zero. Found {given.tolist()}. Pass positive numbers.")
    if rule not in SIGNED_RULES and bool((given < 0).any()):
        raise ValueError(
            f"`weights` must not be negative with the rule {rule!r}. Found {given.tolist()}. "
            "Negate the reward instead, so that larger is better."
        )
    return given
