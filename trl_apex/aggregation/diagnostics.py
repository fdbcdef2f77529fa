"""What the aggregated advantages are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .options import ApexOptions
from .schedule import Terms
from .state import AggregatorState


@dataclass(frozen=True)
class Aggregated:
    """One batch, aggregated.

    Args:
        scores (`Tensor` of shape `[B, K]`): each objective's scores, before weighting.
        contributions (`Tensor` of shape `[B, K]`): what each adds to the sum, weighted.
        advantages (`Tensor` of shape `[B]`): the result.
        weights (`Tensor` of shape `[K]`): the weights used.
    """

    scores: Float[Tensor, "B K"]
    contributions: Float[Tensor, "B K"]
    advantages: Float[Tensor, " B"]
    weights: Float[Tensor, " K"]


def hijack_shares(contributions: Float[Tensor, "B K"]) -> Float[Tensor, " K"]:
    r"""Share of the advantage's variance that each objective owns.

    $$\mathrm{share}_k = \frac{\mathrm{Cov}(w_k x_k, A)}{\mathrm{Var}(A)}, \qquad A = \sum_k w_k x_k$$

    Args:
        contributions (`Tensor` of shape `[B, K]`): \(w_k x_k\), with zero mean.

    Returns:
        `Tensor` of shape `[K]`, summing to one; a negative share means that the others cancel the objective. All zero
        where the advantages are.

    Example:
        >>> contributions = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [3.0, -1.0], [-3.0, -1.0]])
        >>> [round(share, 3) for share in hijack_shares(contributions).tolist()]
        [0.9, 0.1]
    """
    total = contributions.sum(1)
    power = total @ total
    shares = contributions.T @ total
    return shares / power if float(power) > 0 else torch.zeros_like(shares)


def intended_shares(weights: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    r"""The shares that uncorrelated objectives of equal size would have: \(w_k^2 / \sum_j w_j^2\).

    Args:
        weights (`Tensor` of shape `[K]`): any, not all zero.

    Returns:
        `Tensor` of shape `[K]`, summing to one.

    Example:
        >>> intended_shares(torch.tensor([3.0, 1.0])).tolist()
        [0.899..., 0.100...]
    """
    return weights**2 / (weights**2).sum()


def hijack_index(shares: Float[Tensor, " K"], weights: Float[Tensor, " K"]) -> float:
    r"""How many times its intended share the greediest objective owns: \(\max_k \mathrm{share}_k \sum w^2 / w_k^2\).

    Args:
        shares (`Tensor` of shape `[K]`): from [`hijack_shares`].
        weights (`Tensor` of shape `[K]`): \(w\); objectives with less than a hundredth of the largest do not count.

    Returns:
        `float`: 1 when every objective owns what was intended.

    Example:
        >>> hijack_index(torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5]))
        1.5
    """
    counted = weights.abs() > 0.01 * weights.abs().max()
    return float((shares[counted] / intended_shares(weights)[counted]).max())


def streaks(old: Float[Tensor, " K"], condition: Bool[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Batches in a row in which a condition has held.

    Args:
        old (`Tensor` of shape `[K]`): the count before this batch.
        condition (`Tensor` of shape `[K]`): whether it holds now.

    Returns:
        `Tensor` of shape `[K]`

    Example:
        >>> streaks(torch.tensor([3.0, 3.0]), torch.tensor([True, False])).tolist()
        [4.0, 0.0]
    """
    return torch.where(condition, old + 1, 0.0)


def batch_metrics(
    objectives: list[str],
    options: ApexOptions,
    state: AggregatorState,
    batch: Aggregated,
    shares: Float[Tensor, " K"],
    effective: Float[Tensor, " K"],
    valid: Bool[Tensor, "B K"],
    terms: Terms | None,
) -> dict[str, float]:
    """Everything that one batch is logged with, under flat keys.

    Args:
        objectives (`list[str]`): the names.
        options ([`ApexOptions`]): where the clip is.
        state ([`AggregatorState`]): after the batch.
        batch ([`Aggregated`]): the batch.
        shares (`Tensor` of shape `[K]`): from [`hijack_shares`].
        effective (`Tensor` of shape `[K]`): mean weight over the rows.
        valid (`Tensor` of shape `[B, K]`): where the rewards are valid.
        terms ([`Terms`], *optional*): what the next priorities are made of; the baselines have none.

    Returns:
        `dict[str, float]`: all finite.
    """
    scores = batch.scores.double()
    columns = {
        "priority": batch.weights,
        "effective_weight": effective,
        "hijack_share": shares,
        "advantage_std": ((scores * scores).sum(0) / valid.sum(0).clamp(min=1)).sqrt(),
        "live_groups": 1 - state.dead_fraction,
        "missing": 1 - valid.double().mean(0),
    }
    if terms is not None:
        columns |= {"potential": terms.potential, "conflict_penalty": terms.penalty, "need": terms.need}
    metrics = {
        f"{key}/{name}": value
        for key, column in columns.items()
        for name, value in zip(objectives, column.tolist(), strict=True)
    }
    metrics |= pair_metrics("conflict", objectives, state.conflict.value)
    size = batch.advantages.abs().double()
    metrics["hijack_index"] = hijack_index(shares, batch.weights)
    metrics["advantage_rms"] = float((size * size).mean().sqrt())
    metrics["advantage_clipped"] = float((size >= options.advantage_clip).double().mean())
    metrics["all_dead"] = float(size.max() == 0)
    return metrics


def pair_metrics(key: str, objectives: list[str], matrix: Float[Tensor, "K K"]) -> dict[str, float]:
    """The known entries above the diagonal, as `{key}/{a}/{b}`.

    Args:
        key (`str`): first part of the names.
        objectives (`list[str]`): the names of the rows and columns.
        matrix (`Tensor` of shape `[K, K]`): symmetric; NaN = not known.

    Returns:
        `dict[str, float]`

    Example:
        >>> pair_metrics("conflict", ["a", "b"], torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        {'conflict/a/b': -0.5}
    """
    rows = matrix.tolist()
    return {
        f"{key}/{first}/{second}": rows[a][b]
        for a, first in enumerate(objectives)
        for b, second in enumerate(objectives)
        if a < b and not math.isnan(rows[a][b])
    }


def complaints(
    objectives: list[str],
    options: ApexOptions,
    state: AggregatorState,
    sparse: Bool[Tensor, " K"],
    absurd: Bool[Tensor, " K"],
) -> list[str]:
    """What the user should know about the run so far, in plain words.

    Args:
        objectives (`list[str]`): the names.
        options ([`ApexOptions`]): the thresholds.
        state ([`AggregatorState`]): after the batch.
        sparse (`Tensor` of shape `[K]`): objectives with too many missing rewards in this batch.
        absurd (`Tensor` of shape `[K]`): objectives with a reward beyond `outlier_limit` in this batch.

    Returns:
        `list[str]`: one sentence or two per finding.
    """
    after, share, missing = options.warn_after, options.warn_share, options.max_missing
    owned, silent, few = (state.owned >= after).tolist(), (state.silent >= after).tolist(), sparse.tolist()
    wild = absurd.tolist()
    found = []
    for number, name in enumerate(objectives):
        if owned[number]:
            found.append(
                f"The objective '{name}' has owned more than {share:.0%} of the advantage's variance for {after} "
                "iterations: the others hardly train. Use the rule 'apex', or lower its weight or scale."
            )
        if silent[number]:
            found.append(
                f"The objective '{name}' has scored all samples of every group alike for {after} iterations: it "
                "teaches nothing. Check its reward function, or whether it has saturated."
            )
        if few[number]:
            found.append(
                f"More than {missing:.0%} of the rewards of the objective '{name}' are missing in the groups that it "
                "applies to: its statistics are held. Check its reward function."
            )
        if wild[number]:
            found.append(
                f"The objective '{name}' returned a reward more than {options.outlier_limit:g} standard deviations away "
                "from its mean: such rewards count as missing. Check its reward function; if they are right, set "
                "`outlier_limit` to inf."
            )
    return found
