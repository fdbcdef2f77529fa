"""What is logged of a batch, and what the user is warned about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from .normalize import Flags, Matrix, Rows, Vector
from .options import ApexOptions
from .state import PriorityState, ReportState

NEVER_THERE_AFTER = 5  # batches without any reward of an objective that never had one
FAVOURED = 1.5  # times its weight: an objective with more than that is favoured
GAINED = 0.1  # first spreads: below that an objective has not gained
PATIENCE = 5  # times `warn_after` until an objective that is favoured and has not gained is named


@dataclass(frozen=True)
class Aggregated:
    """One batch, aggregated."""

    scores: Rows  # of each objective, before weighting
    contributions: Rows  # what each objective adds to the advantage
    advantages: Float[Tensor, " B"]
    weights: Vector  # the weights used


def hijack_shares(contributions: Rows) -> Vector:
    r"""Share of the advantage's variance that each objective owns: \(\mathrm{Cov}(w_k x_k, A) / \mathrm{Var}(A)\).

    `contributions` are \(w_k x_k\), with zero mean; \(A\) is their sum. The shares sum to one; a negative one means that the
    others cancel the objective. All are zero if the advantages are.

    Example:
        >>> hijack_shares(torch.tensor([[3.0, 1.0], [-3.0, 1.0], [3.0, -1.0], [-3.0, -1.0]])).tolist()
        [0.899..., 0.100...]
    """
    total = contributions.sum(1)
    power = total @ total
    shares = contributions.T @ total
    return shares / power if float(power) > 0 else torch.zeros_like(shares)


def intended_shares(weights: Vector) -> Vector:
    r"""The shares that uncorrelated objectives of equal size would have: \(w_k^2 / \sum_j w_j^2\)."""
    return weights**2 / (weights**2).sum()


def hijack_index(shares: Vector, weights: Vector) -> float:
    """How many times its intended share the greediest objective owns.

    Objectives with less than a hundredth of the largest weight do not count.
    """
    counted = weights.abs() > 0.01 * weights.abs().max()
    return float((shares[counted] / intended_shares(weights)[counted]).max())


def batch_metrics(
    objectives: list[str],
    batch: Aggregated,
    columns: dict[str, Vector],
    pairs: dict[str, Matrix],
    clip: float,
) -> dict[str, float]:
    """The metrics of one batch under flat keys: of each objective, each pair whose value is known, and the whole."""
    metrics = {
        f"{key}/{name}": value
        for key, column in columns.items()
        for name, value in zip(objectives, column.tolist(), strict=True)
    }
    for key, matrix in pairs.items():
        for a, b in combinations(range(len(objectives)), 2):
            if math.isfinite(value := float(matrix[a, b])):
                metrics[f"{key}/{objectives[a]}/{objectives[b]}"] = value
    size = batch.advantages.abs().double()
    return {
        **metrics,
        "hijack_index": hijack_index(columns["hijack_share"], batch.weights),
        "advantage_rms": float((size * size).mean().sqrt()),
        "advantage_clipped": float((size >= clip).double().mean()),
        "all_dead": float(size.max() == 0),
    }


def next_report(
    report: ReportState,
    shares: Vector,
    effective: Vector,
    priorities: Vector,
    state: PriorityState,
    absent: Flags,
    warn_share: float,
) -> ReportState:
    """Count for how many batches in a row each finding has held; `priorities` are the batch's, `state` has taken it in."""
    owned = (shares > warn_share) & (intended_shares(effective).nan_to_num(nan=0.0) <= warn_share)
    gain = (state.slow.value - state.first_mean) / state.first_scale
    in_vain = (priorities > FAVOURED * state.weights) & (gain < GAINED)
    return ReportState(
        owned=torch.where(owned, report.owned + 1, 0.0),
        silent=torch.where(absent, report.silent, torch.where(state.dead_fraction == 1, report.silent + 1, 0.0)),
        absent=torch.where(absent, report.absent + 1, 0.0),
        in_vain=torch.where(absent, report.in_vain, torch.where(in_vain, report.in_vain + 1, 0.0)),
        effective=effective,
        measured=report.measured,
    )


def complaints(
    objectives: list[str],
    rule: str,
    options: ApexOptions,
    state: PriorityState,
    report: ReportState,
    sparse: Flags,
    absurd: Flags,
) -> list[str]:
    """Warnings about the run so far, one text per finding."""
    after, early = options.warn_after, min(options.warn_after, NEVER_THERE_AFTER)
    seen = state.slow.weight > 0
    less = "Lower its weight" if rule == "apex" else "Use the rule 'apex', or lower its weight or scale"
    no_reward = (
        "has had no reward at all for {} iterations: nothing is trained on it. Check that its reward function applies to "
        "these prompts, and that the columns it reads are there."
    )
    findings = [
        (
            report.owned >= after,
            f"has owned more than {options.warn_share:.0%} of the advantage's variance for {after} iterations: the others "
            f"hardly train. {less}.",
        ),
        (
            report.silent >= after,
            f"has scored all samples of every group alike for {after} iterations: it teaches nothing. Check its reward "
            "function, or whether it has saturated.",
        ),
        (
            (report.in_vain >= PATIENCE * after) & (rule == "apex"),
            f"has had more than {FAVOURED:g} times its weight for {PATIENCE * after} iterations, because it lags, and has not "
            "gained: it may be one that training cannot raise, and the others train slower for it. Check its reward function, "
            "lower its weight, or lower `need_coef`.",
        ),
        (seen & (report.absent >= after), no_reward.format(after)),
        (~seen & (report.absent >= early), no_reward.format(early)),
        (
            sparse,
            f"has more than {options.max_missing:.0%} of its rewards missing in the groups that it applies to: its "
            "statistics are held. Check its reward function.",
        ),
        (
            absurd,
            f"returned a reward more than {options.outlier_limit:g} standard deviations away from its mean: such rewards "
            "count as missing. Check its reward function; if they are right, set `outlier_limit` to inf.",
        ),
    ]
    return [
        f"The objective '{name}' {text}" for k, name in enumerate(objectives) for found, text in findings if found[k]
    ]
