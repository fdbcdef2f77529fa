"""Base against tuned, on the same prompts and noise: every reward, and all of them together."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .measures import domination_rates, hypervolume, paired_gain


def compare(
    names: list[str], base: Float[Tensor, "P K"], tuned: Float[Tensor, "P K"], objectives: int | None = None
) -> dict[str, Any]:
    """Means, paired standard errors and gains of every reward, and how many prompts got better all round.

    Args:
        names (`list[str]`): K rewards, the objectives first.
        base, tuned (`torch.Tensor` of shape `[P, K]`): rewards, NaN where missing.
        objectives (`int`, *optional*): how many of the K were trained on; the others are held out. All by default.

    Returns:
        `dict`: `objectives` and `held_out` (by name, what [`paired_gain`] returns; numbers are None where fewer than two
        pairs are whole), `domination` (JDR and JCR, over the objectives) and `hypervolume` of the gains above the base (None
        where a gain is).

    Example:
        ```python
        >>> base = torch.tensor([[0.0, 1.0], [1.0, 2.0]])
        >>> result = compare(["a", "b"], base, base + 1)
        >>> result["domination"]["all_at_least_as_good"], round(result["objectives"]["a"]["gain"], 3)
        (1.0, 1.414)

        ```
    """
    split = len(names) if objectives is None else objectives
    rows = {name: _gain(base[:, k], tuned[:, k]) for k, name in enumerate(names)}
    better, worse = domination_rates(base[:, :split], tuned[:, :split])
    return {
        "objectives": {name: rows[name] for name in names[:split]},
        "held_out": {name: rows[name] for name in names[split:]},
        "domination": {"all_at_least_as_good": better, "all_at_most_as_good": worse},
        "hypervolume": joint_hypervolume([{name: rows[name]["gain"] for name in names[:split]}]),
    }


def joint_hypervolume(gains: list[dict[str, float | None]]) -> float | None:
    """Hypervolume that some models together dominate above the base, each axis in standard deviations of the base.

    Args:
        gains (`list[dict]`): gain by objective, one dictionary a model.
    """
    if not gains or any(value is None for gain in gains for value in gain.values()):
        return None
    points = torch.tensor([[float(value or 0.0) for value in gain.values()] for gain in gains])
    return hypervolume(points, torch.zeros(points.shape[1]))


def _gain(base: Tensor, tuned: Tensor) -> dict[str, Any]:
    whole = int((base.isfinite() & tuned.isfinite()).sum())
    if whole < 2:
        return dict.fromkeys(("base", "tuned", "se", "gain", "gain_se"), None) | {"n": whole}
    return {key: value if math.isfinite(value) else None for key, value in paired_gain(base, tuned).items()}
