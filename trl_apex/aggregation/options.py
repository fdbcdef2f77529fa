"""The options of the aggregator in one object, and the checks of everything that a user passes to it."""

from __future__ import annotations

import dataclasses
import difflib
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .rules import GRADIENT_RULES, RULES, SIGNED_RULES

__all__ = [
    "AGGREGATION_OPTIONS",
    "GRADIENT_RULES",
    "RULES",
    "SIGNED_RULES",
    "ApexOptions",
    "did_you_mean",
    "option_table",
]

INF = math.inf
Range = tuple[float, float]
_DECAY, _POSITIVE = (0.0, math.nextafter(1.0, 0.0)), (math.nextafter(0.0, 1.0), INF)
_SAID = {
    _DECAY: ("be below 1 and not negative, or nothing is ever learned", "Pass e.g. 0.9."),
    _POSITIVE: ("be positive", "To switch a clip off, pass inf."),
}
OTHER_NAMES = {"gdpo": "normalize_then_sum", "mixgrpo": "weighted_advantages", "flow_grpo": "sum_then_normalize"}
_SHARE, _NOT_NEGATIVE, _COUNT = (0.0, 1.0), (0.0, INF), (0, 10**9)


def _option(default: Any, text: str, allowed: Range | None = None, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "range": allowed, "choices": choices})


def _one_of(choices: tuple[str, ...], text: str) -> Any:
    return _option(choices[0], text, choices=choices)


@dataclass(kw_only=True)
class ApexOptions:
    """Every choice that the abstract of arXiv 2601.06574 leaves open, and the settings of the baseline rules.

    Example:
        >>> ApexOptions(priority_floor=2.0)
        Traceback (most recent call last):
        ...
        ValueError: `priority_floor` must lie in [0, 1]. Found 2.0. Pass a value in that range.
    """

    # Stage 1
    normalize_objectives: bool = _option(True, "Stage 1: divide by the adaptive scale. False only centres.")
    scale_blend: float = _option(
        1 / 3, "Weight of the pooled scale, in group sizes: 0 is the group's own, inf the pooled.", _NOT_NEGATIVE
    )
    scale_reference: str = _one_of(
        ("current", "initial"),
        "The pooled scale: of the 'current' spread, or of the 'initial' one, which outliers and saturation do not change.",
    )
    scale_ema: float = _option(0.9, "Decay of the moving average of the pooled variance.", _DECAY)
    z_clip: float = _option(5.0, "Clip of each objective's normalized score; inf turns it off.", _POSITIVE)
    dead_tolerance: float = _option(1e-6, "Spread of a group, relative to its mean, below which it is dead.", _SHARE)
    # Stage 2
    normalize_advantages: bool = _option(True, "Stage 2: divide the weighted sum by its floored size over the batch.")
    norm_floor: float = _option(0.5, "Least divisor of stage 2, in norms of the weights; 0: none.", _NOT_NEGATIVE)
    advantage_clip: float = _option(5.0, "Clip of the final advantage; inf turns it off.", _POSITIVE)
    # Adaptive priorities
    adaptive_priorities: bool = _option(True, "Schedule the objectives; False keeps the user's weights.")
    potential_coef: float = _option(0.5, "Coefficient of the learning potential.", (0.0, 100.0))
    conflict_coef: float = _option(1.0, "Coefficient of the conflict penalty.", (0.0, 100.0))
    need_coef: float = _option(4.0, "Coefficient of the progress need.", (0.0, 100.0))
    fast_ema: float = _option(0.7, "Decay of the fast moving average of each objective's mean reward.", _DECAY)
    slow_ema: float = _option(0.95, "Decay of the slow moving average of each objective's mean reward.", _DECAY)
    need_mode: str = _one_of(
        ("relative", "target"),
        "Progress need: 'relative' to the other objectives, or the way left to a 'target' (`reward_targets`).",
    )
    reward_targets: list[float] | None = _option(None, "With need_mode 'target': one per objective; nan for none.")
    need_temperature: float = _option(0.5, "Softness of the relative need, in initial standard deviations.", _POSITIVE)
    need_scale: str = _one_of(
        ("initial", "largest"),
        "Unit of gains: the spread after the warm-up ('initial') or the 'largest' since, better for sparse rewards.",
    )
    need_cap: float = _option(1.5, "Largest need in target mode.", _NOT_NEGATIVE)
    conflict_source: str = _one_of(
        ("advantage", "gradient", "population"),
        "Measure of conflict: correlation of scores ('advantage', free), or by the probe, cosine of a batch's gradients "
        "('gradient') or of the expected gradients ('population').",
    )
    conflict_ema: float = _option(0.7, "Decay of the moving average of the conflict matrix.", _DECAY)
    conflict_margin: float = _option(0.05, "Least negative correlation that counts as a conflict.", (0.0, 0.99))
    conflict_attribution: str = _one_of(
        ("lag", "victim", "plain"),
        "Who pays for a conflict: the one ahead ('lag'), whoever opposes one in need ('victim'), or both ('plain').",
    )
    combination: str = _one_of(
        ("additive", "multiplicative"),
        "How the three terms form a score: a sum ('additive') or a product of powers ('multiplicative').",
    )
    priority_temperature: float = _option(0.5, "Temperature of the softmax over the scores.", _POSITIVE)
    priority_floor: float = _option(0.2, "Share of the user's weight that no objective can lose.", _SHARE)
    priority_ema: float = _option(0.7, "Decay of the moving average of the priorities.", _DECAY)
    warmup_iterations: int = _option(
        10, "Iterations at the user's weights; at their end the unit of progress is taken.", _COUNT
    )
    ramp_iterations: int = _option(10, "Iterations over which the priorities fade in after the warm-up.", _COUNT)
    max_missing: float = _option(0.5, "Share of missing rewards above which an objective's statistics hold.", _SHARE)
    outlier_limit: float = _option(1e9, "Spreads from the mean beyond which a reward is missing.", (1e3, INF))
    # Baselines
    scale_rewards: str = _one_of(
        ("group", "batch", "none"),
        "sum_then_normalize, weighted_advantages: divide by the std of the 'group', the 'batch' or 'none'.",
    )
    std_epsilon: float = _option(1e-4, "Absolute epsilon of the baseline rules' divisions.", _NOT_NEGATIVE)
    gd2po_agreement: float = _option(0.2, "gd2po: agreement below which a row with mixed signs is dropped.", _SHARE)
    gradient_ema: float = _option(0.7, "mgda, upgrad, pcgrad, cagrad: decay of the average of the weights.", _DECAY)
    unit_gradients: bool = _option(True, "mgda: scale every objective's gradient to unit length first.")
    cagrad_c: float = _option(0.5, "cagrad: how far the update may leave the mean gradient.", _NOT_NEGATIVE)
    # Warnings
    warn_after: int = _option(20, "Iterations in a row before a hijacked or dead objective is named.", (1, 10**9))
    warn_share: float = _option(0.7, "Share of the advantage's variance above which an objective owns it.", _SHARE)

    def __post_init__(self) -> None:
        if isinstance(self.scale_rewards, bool):  # as TRL accepts it
            self.scale_rewards = "group" if self.scale_rewards else "none"
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if wrong := _what_is_wrong(value, option.default, option.metadata["range"], option.metadata["choices"]):
                rule, remedy = wrong
                raise ValueError(f"`{option.name}` must {rule}. Found {value!r}. {remedy}")
        targets = self.reward_targets
        if self.need_mode == "target" and targets is None:
            raise ValueError(
                "`reward_targets` must be given with `need_mode='target'`. Found None. Pass one number per objective."
            )
        if not isinstance(targets, list | tuple | None) or not all(isinstance(t, int | float) for t in targets or ()):
            raise ValueError(f"`reward_targets` must be a list of numbers. Found {targets!r}. Pass one per objective.")

    @classmethod
    def read(cls, given: ApexOptions | dict[str, Any] | None) -> ApexOptions:
        """The options from an object, a dictionary of its fields, or None for the defaults."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, dict | None):
            raise ValueError(
                f"The options must be an ApexOptions or a dictionary of its fields. Found {given!r}. "
                "Pass e.g. {'scale_blend': 0.5}."
            )
        given, known = given or {}, [option.name for option in dataclasses.fields(cls)]
        if unknown := sorted(map(str, given.keys() - known)):
            raise ValueError(
                f"Options must be fields of ApexOptions. Found {', '.join(unknown)}. {did_you_mean(unknown[0], known)}"
                f"Use one of: {', '.join(known)}."
            )
        return cls(**given)

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """A question with the nearest of the `known` names, for the end of an error; empty where none is near.

    Example:
        >>> did_you_mean("normalise_then_sum", ["apex", "normalize_then_sum"])
        "Did you mean 'normalize_then_sum'? "
    """
    name = str(name).lower()
    close = difflib.get_close_matches(OTHER_NAMES.get(name, name), known, 1)
    return f"Did you mean {close[0]!r}? " if close else ""


def _what_is_wrong(
    value: Any, default: Any, allowed: Range | None, choices: tuple[str, ...]
) -> tuple[str, str] | None:
    """The rule that an option's value breaks, and the remedy."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if choices and value not in choices:
        return f"be one of {', '.join(map(repr, choices))}", f"{did_you_mean(value, choices)}Pass one of these."
    if isinstance(default, bool) and not isinstance(value, bool):
        return "be True or False", "Pass one of the two."
    if type(default) is int and not isinstance(value, int):
        return "be a whole number", "Pass e.g. 10."
    if allowed and not (number and allowed[0] <= value <= allowed[1]):
        return _SAID.get(allowed, (f"lie in [{allowed[0]:g}, {allowed[1]:g}]", "Pass a value in that range."))
    return None


AGGREGATION_OPTIONS: dict[str, tuple[Any, str]] = {
    option.name: (option.default, option.metadata["help"]) for option in dataclasses.fields(ApexOptions)
}


def option_table() -> str:
    """Every option with its default and what it does, for `help()`."""
    return "".join(f"\n        {name} ({value!r}): {text}" for name, (value, text) in AGGREGATION_OPTIONS.items())


ApexOptions.__doc__ = f"{ApexOptions.__doc__}\n    Args:{option_table()}\n"


# Checks of the aggregator's arguments: each returns what it checked, or raises a ValueError


def checked_options(
    objectives: list[str], given: ApexOptions | dict[str, Any] | None, flat: dict[str, Any]
) -> ApexOptions:
    """The options as one object; `flat` are those passed as keywords of their own, as in 0.1.0."""
    if flat and given is not None:
        raise ValueError(
            f"Options must be passed in one place. Found `options` and {', '.join(flat)}. Pass all in `options`."
        )
    result = ApexOptions.read(flat or given)
    if flat:
        warnings.warn(
            f"Options of MultiObjectiveRewardAggregator are passed as one object. Found the keywords {', '.join(flat)}, "
            f"which the next release will refuse. Pass options=ApexOptions({', '.join(f'{n}=...' for n in flat)}).",
            FutureWarning,
            stacklevel=3,
        )
    targets = result.reward_targets
    if targets is not None and len(targets) != len(objectives):
        raise ValueError(
            f"`reward_targets` must have one number per objective ({len(objectives)}). Found {len(targets)}. "
            "Pass nan for an objective without a target."
        )
    return result


def checked_weights(objectives: list[str], weights: list[float] | None, rule: str) -> Float[Tensor, " K"]:
    """The user's weights as they were given, 1 each if they were not."""
    if weights is None:
        return torch.ones(len(objectives), dtype=torch.float64)
    name = "`weights` (`reward_weights` of a trainer)"
    try:
        if isinstance(weights, dict | str):
            raise TypeError
        given = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a list of numbers. Found {weights!r}. Pass them in the order {objectives}."
        ) from None
    if len(given) != len(objectives):
        raise ValueError(
            f"{name} must have one number per objective ({len(objectives)}). Found {len(given)}. "
            f"Pass them in the order {objectives}."
        )
    if not bool(given.isfinite().all()) or not bool((given != 0).any()):
        raise ValueError(f"{name} must be finite and not all zero. Found {given.tolist()}. Pass positive numbers.")
    if rule not in SIGNED_RULES and bool((given < 0).any()):
        raise ValueError(
            f"{name} must not be negative with the rule {rule!r}. Found {given.tolist()}. Negate the reward instead, so "
            f"that larger is better, or use a rule that takes negative weights: {', '.join(SIGNED_RULES)}."
        )
    return given


def checked_batch(
    objectives: list[str], rewards: Tensor, group_ids: Tensor, mask: Tensor | None
) -> tuple[Float[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """The rewards on the CPU with NaN where missing, and where they are valid."""
    size = len(objectives)
    for name, value in (("rewards", rewards), ("group_ids", group_ids), ("mask", mask)):
        if not isinstance(value, Tensor) and (value is not None or name != "mask"):
            raise ValueError(
                f"`{name}` must be a torch.Tensor. Found {type(value).__name__}. Pass torch.as_tensor({name})."
            )
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
