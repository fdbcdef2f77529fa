"""What a batch is logged with, and what the user is warned about."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .options import ApexOptions
from .state import PriorityState, ReportState

NEVER_THERE_AFTER = 5  # batches without any reward of an objective that never had one


@dataclass(frozen=True)
class Aggregated:
    """One batch, aggregated."""

    scores: Float[Tensor, "B K"]  # of each objective, before weighting
    contributions: Float[Tensor, "B K"]  # what each objective adds to the advantage
    advantages: Float[Tensor, " B"]
    weights: Float[Tensor, " K"]  # the weights used
    clipped: Bool[Tensor, " B"]  # where the advantage was clipped


def hijack_shares(contributions: Float[Tensor, "B K"]) -> Float[Tensor, " K"]:
    r"""Share of the advantage's variance that each objective owns.

    $$\mathrm{share}_k = \frac{\mathrm{Cov}(w_k x_k, A)}{\mathrm{Var}(A)}, \qquad A = \sum_k w_k x_k$$

    `contributions` are \(w_k x_k\), with zero mean. The shares sum to one; a negative one means that the others cancel the
    objective. All are zero if the advantages are.

    Example:
        >>> hijack_shares(torch.tensor([[3.0, 1.0], [-3.0, 1.0], [3.0, -1.0], [-3.0, -1.0]])).tolist()
        [0.899..., 0.100...]
    """
    total = contributions.sum(1)
    power = total @ total
    shares = contributions.T @ total
    return shares / power if float(power) > 0 else torch.zeros_like(shares)


def intended_shares(weights: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    r"""The shares that uncorrelated objectives of equal size would have: \(w_k^2 / \sum_j w_j^2\).

    Example:
        >>> intended_shares(torch.tensor([3.0, 1.0])).tolist()
        [0.899..., 0.100...]
    """
    return weights**2 / (weights**2).sum()


def hijack_index(shares: Float[Tensor, " K"], weights: Float[Tensor, " K"]) -> float:
    r"""How many times its intended share the greediest objective owns: \(\max_k \mathrm{share}_k \sum w^2 / w_k^2\).

    Objectives with less than a hundredth of the largest weight do not count.

    Example:
        >>> hijack_index(torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5]))
        1.5
    """
    counted = weights.abs() > 0.01 * weights.abs().max()
    return float((shares[counted] / intended_shares(weights)[counted]).max())


def batch_metrics(
    objectives: list[str],
    batch: Aggregated,
    columns: dict[str, Float[Tensor, " K"]],
    conflict: Float[Tensor, "K K"],
    report: ReportState,
) -> dict[str, float]:
    """The metrics of one batch, under flat keys; all finite."""
    metrics = {
        f"{key}/{name}": value
        for key, column in columns.items()
        for name, value in zip(objectives, column.tolist(), strict=True)
    }
    size = batch.advantages.abs().double()
    return {
        **metrics,
        **pair_metrics("conflict", objectives, conflict),
        "hijack_index": hijack_index(columns["hijack_share"], batch.weights),
        "advantage_rms": float((size * size).mean().sqrt()),
        "advantage_clipped": float(batch.clipped.double().mean()),
        "all_dead": float(size.max() == 0),
        **pair_metrics("gradient_conflict", objectives, report.measured),
    }


def pair_metrics(key: str, objectives: list[str], matrix: Float[Tensor, "K K"]) -> dict[str, float]:
    """The known entries above the diagonal of a symmetric matrix, as `{key}/{a}/{b}`."""
    rows = matrix.tolist()
    return {
        f"{key}/{first}/{second}": rows[a][b]
        for a, first in enumerate(objectives)
        for b, second in enumerate(objectives)
        if a < b and not math.isnan(rows[a][b])
    }


def next_report(
    report: ReportState,
    shares: Float[Tensor, " K"],
    effective: Float[Tensor, " K"],
    dead_fraction: Float[Tensor, " K"],
    absent: Bool[Tensor, " K"],
    warn_share: float,
) -> ReportState:
    """Count for how many batches in a row each finding has held."""
    owned = (shares > warn_share) & (intended_shares(effective).nan_to_num(nan=0.0) <= warn_share)
    return ReportState(
        owned=torch.where(owned, report.owned + 1, 0.0),
        silent=torch.where(absent, report.silent, torch.where(dead_fraction == 1, report.silent + 1, 0.0)),
        absent=torch.where(absent, report.absent + 1, 0.0),
        effective=effective,
        measured=report.measured,
    )


def complaints(
    objectives: list[str],
    rule: str,
    options: ApexOptions,
    state: PriorityState,
    report: ReportState,
    sparse: Bool[Tensor, " K"],
    absurd: Bool[Tensor, " K"],
) -> list[str]:
    """Warnings about the run so far, one text per finding."""
    after, found = options.warn_after, []
    seen = state.slow.weight > 0
    for k, name in enumerate(objectives):
        if report.owned[k] >= after:
            remedy = "Lower its weight" if rule == "apex" else "Use the rule 'apex', or lower its weight or scale"
            found.append(
                f"The objective '{name}' has owned more than {options.warn_share:.0%} of the advantage's variance for "
                f"{after} iterations: the others hardly train. {remedy}."
            )
        if report.silent[k] >= after:
            found.append(
                f"The objective '{name}' has scored all samples of every group alike for {after} iterations: it "
                "teaches nothing. Check its reward function, or whether it has saturated."
            )
        patience = after if seen[k] else min(after, NEVER_THERE_AFTER)
        if report.absent[k] >= patience:
            found.append(
                f"The objective '{name}' has had no reward at all for {patience} iterations: nothing is trained on it. "
                "Check that its reward function applies to these prompts, and that the columns it reads are there."
            )
        if sparse[k]:
            found.append(
                f"More than {options.max_missing:.0%} of the rewards of the objective '{name}' are missing in the groups "
                "that it applies to: its statistics are held. Check its reward function."
            )
        if absurd[k]:
            found.append(
                f"The objective '{name}' returned a reward more than {options.outlier_limit:g} standard deviations away "
                "from its mean: such rewards count as missing. Check its reward function; if they are right, set "
                "`outlier_limit` to inf."
            )
    return found
