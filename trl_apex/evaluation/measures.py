"""Measures of a multi-objective run: gains with paired errors, prompts that got better all round, signs of reward hacking."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def compare(
    names: list[str], base: Float[Tensor, "P K"], tuned: Float[Tensor, "P K"], objectives: int | None = None
) -> dict[str, Any]:
    """Means, paired standard errors and gains of every reward, and how many prompts got better all round.

    Args:
        names (`list[str]`): K rewards, the objectives first.
        base, tuned (`torch.Tensor` of shape `[P, K]`): rewards, NaN where missing.
        objectives (`int`, *optional*): how many of the K were trained on; the others are held out. All by default.

    Returns:
        `dict`: `objectives` and `held_out` (by name, what [`paired_gain`] returns, None where fewer than two pairs are
        whole), `domination` (JDR and JCR) and `hypervolume` of the objectives' gains above the base.

    Example:
        >>> base = torch.tensor([[0.0, 1.0], [1.0, 2.0]])
        >>> result = compare(["a", "b"], base, base + 1)
        >>> result["domination"]["all_at_least_as_good"], round(result["objectives"]["a"]["gain"], 3)
        (1.0, 1.414)
    """
    split = len(names) if objectives is None else objectives
    rows = {name: paired_gain(base[:, k], tuned[:, k]) for k, name in enumerate(names)}
    rates = (share if math.isfinite(share) else None for share in domination_rates(base[:, :split], tuned[:, :split]))
    return {
        "objectives": {name: rows[name] for name in names[:split]},
        "held_out": {name: rows[name] for name in names[split:]},
        "domination": dict(zip(("all_at_least_as_good", "all_at_most_as_good"), rates, strict=True)),
        "hypervolume": joint_hypervolume([{name: rows[name]["gain"] for name in names[:split]}]),
    }


def paired_gain(base: Float[Tensor, " B"], tuned: Float[Tensor, " B"]) -> dict[str, Any]:
    """How much one reward rose, on the same prompts and noise.

    ```
    gain = mean(tuned - base) / std(base)     gain_se = se / std(base)     se = std(tuned - base) / sqrt(n)
    ```

    A pair with a missing value is left out; `n` pairs are whole. `base` and `tuned` are means. None where there is no number:
    everywhere but in `n` for fewer than 2 pairs, and in `gain` and its error where all of `base` is equal.

    Example:
        >>> result = paired_gain(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 4.0]))
        >>> result["tuned"], result["gain"], result["se"]
        (3.0, 1.0, 0.0)
    """
    whole = base.isfinite() & tuned.isfinite()
    base, tuned = base[whole].double(), tuned[whole].double()
    if len(base) < 2:
        return dict.fromkeys(("base", "tuned", "se", "gain", "gain_se"), None) | {"n": len(base)}
    mean, se = mean_and_error(tuned - base)
    spread = base.std().item()
    return {
        "base": base.mean().item(),
        "tuned": tuned.mean().item(),
        "se": se,
        "gain": mean / spread if spread else None,
        "gain_se": se / spread if spread else None,
        "n": len(base),
    }


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error, without missing values; 0 and infinity for fewer than two."""
    values = values[values.isfinite()]
    if len(values) < 2:
        return 0.0, float("inf")
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def domination_rates(base: Float[Tensor, "B K"], tuned: Float[Tensor, "B K"]) -> tuple[float, float]:
    """Share of prompts where no objective fell and one rose (JDR), and the reverse (JCR).

    Missing values count as equal; prompts without any pair of values do not count. NaN if none is left.

    Example:
        >>> tuned = torch.tensor([[1.0, 0.0], [1.0, -1.0], [-1.0, -1.0], [0.0, 0.0]])
        >>> domination_rates(torch.zeros(4, 2), tuned)
        (0.25, 0.25)
    """
    difference = tuned - base
    difference = difference[difference.isfinite().any(1)].nan_to_num(nan=0.0)
    rose, fell = (difference > 0).any(1), (difference < 0).any(1)
    return (rose & ~fell).double().mean().item(), (fell & ~rose).double().mean().item()


def joint_hypervolume(gains: list[dict[str, float | None]]) -> float | None:
    """Hypervolume that models together dominate above the base: of each, the gains by objective; None if any is None."""
    if not gains or any(value is None for gain in gains for value in gain.values()):
        return None
    points = torch.tensor([[float(value or 0.0) for value in gain.values()] for gain in gains])
    return hypervolume(points, torch.zeros(points.shape[1]))


def hypervolume(points: Float[Tensor, "M K"], reference: Float[Tensor, " K"]) -> float:
    """Volume that a set of points dominates above a reference point; larger is better. Exact, for tens of points.

    A point is e.g. a checkpoint's gains above the base model, the reference (zeros). One below it on any axis counts nothing.

    Example:
        >>> hypervolume(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.zeros(2))
        3.0
    """
    above = (points.double() - reference.double()).clamp_min(0)
    return _dominated(above[(above > 0).all(1)])


def _dominated(points: Tensor) -> float:
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return points.max().item()
    volume, below = 0.0, 0.0
    for height in points[:, -1].unique().tolist():
        volume += (height - below) * _dominated(points[points[:, -1] >= height][:, :-1])
        below = height
    return volume


def seesaw_rate(means: Float[Tensor, "E K"], errors: Float[Tensor, "E K"]) -> float:
    """Share of evaluation intervals in which one objective rises and another falls, each by more than 2 standard errors.

    Example:
        >>> means = torch.tensor([[0.0, 0.0], [1.0, -1.0], [2.0, 0.0]])
        >>> seesaw_rate(means, torch.full((3, 2), 0.1))
        0.5
    """
    if len(means) < 2:
        return 0.0
    step = means[1:] - means[:-1]
    noise = 2 * (errors[1:] ** 2 + errors[:-1] ** 2).sqrt()
    return ((step > noise).any(1) & (step < -noise).any(1)).double().mean().item()


def hacking_signs(
    names: Sequence[str],
    first: Float[Tensor, "P K"],
    latest: Float[Tensor, "P K"],
    trained: int,
    threshold: float = 2.0,
) -> list[str]:
    """Sentences about watched rewards that fell while the trained ones rose; none where there is no such sign.

    ```
    d_ik = latest_ik - first_ik                      paired: same prompt, same noise
    rise = mean over trained k of d_ik / std_i(first_ik), per row i
    sign: mean_i(rise) > threshold SE(rise)  and, for a watched k,  mean_i(d_ik) < -threshold SE(d_ik)
    ```

    Args:
        names (sequence of `str`): K rewards, the trained ones first.
        first, latest (`torch.Tensor` of shape `[P, K]`): rewards of two evaluations on the same dataset; NaN where missing.
        trained (`int`): how many of the K are trained on.
        threshold (`float`): in standard errors.

    Example:
        >>> first = torch.arange(4.0).repeat(2, 1).T
        >>> latest = first + torch.tensor([1.0, -1.0]) + 0.1 * torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
        >>> hacking_signs(["ocr", "faces"], first, latest, trained=1)
        ['faces fell from 1.5 to 0.5 (-1 ± 0.0408)']
        >>> hacking_signs(["ocr", "faces"], first, first + 1, trained=1)
        []
    """
    difference = latest.double() - first.double()
    columns = [column[column.isfinite()] for column in first[:, :trained].double().T]
    spread = torch.stack([c.std() if len(c) > 1 else c.new_zeros(()) for c in columns])
    rise, error = mean_and_error((difference[:, :trained] / spread)[:, spread > 0].nanmean(1))
    if not rise > threshold * error:
        return []
    signs = []
    for k in range(trained, len(names)):
        mean, error = mean_and_error(difference[:, k])
        if mean < -threshold * error:
            both = difference[:, k].isfinite()
            before, after = first[both, k].mean().item(), latest[both, k].mean().item()
            signs.append(f"{names[k]} fell from {before:.4g} to {after:.4g} ({mean:.3g} ± {error:.3g})")
    return signs
