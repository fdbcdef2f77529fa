"""Conflict between objectives: how it is measured, and who pays for it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def score_correlation(
    scores: Float[Tensor, "B K"], live: Bool[Tensor, "B K"]
) -> tuple[Float[Tensor, "K K"], Float[Tensor, "K K"]]:
    r"""Correlation of the objectives' normalized scores over the rows that both score.

    $$c_{kj} = \frac{\sum_i z_{ik} z_{ij}}{\sqrt{\sum_i z_{ik}^2 m_{ij} \sum_i z_{ij}^2 m_{ik}}}$$

    Scores have zero mean inside every group, so no further centring is needed.

    Args:
        scores (`Tensor` of shape `[B, K]`): \(z\), 0 where dead or missing.
        live (`Tensor` of shape `[B, K]`): \(m\), true where the reward is valid and its group is live.

    Returns:
        `tuple` of the correlation of shape `[K, K]` (NaN where two objectives share no live row) and the number of
        shared rows, of shape `[K, K]`.

    Example:
        >>> scores = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> score_correlation(scores, torch.ones(2, 2, dtype=torch.bool))[0].round().tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    there = live.to(scores.dtype)
    norms = (scores * scores).T @ there
    shared = there.T @ there
    return ((scores.T @ scores) / torch.sqrt(norms * norms.T)).clamp(-1.0, 1.0), shared


def cosines(gramian: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    r"""Cosines of the vectors behind a Gram matrix; NaN where one of them is zero.

    $$c_{kj} = G_{kj} / \sqrt{G_{kk} G_{jj}}$$

    Args:
        gramian (`Tensor` of shape `[K, K]`): \(G\), inner products. A matrix of cosines is left as it is.

    Returns:
        `Tensor` of shape `[K, K]`

    Example:
        >>> cosines(torch.tensor([[4.0, -1.0], [-1.0, 1.0]])).tolist()
        [[1.0, -0.5], [-0.5, 1.0]]
    """
    norms = gramian.diagonal().clamp(min=0.0).sqrt()
    outer = norms[:, None] * norms[None, :]
    return torch.where(outer > 0, (gramian / outer).clamp(-1.0, 1.0), torch.nan)


def opposition(conflict: Float[Tensor, "K K"], margin: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    r"""How much two objectives oppose each other, beyond what noise explains.

    $$h_{kj} = \mathrm{clip}\left(\frac{-c_{kj} - \delta}{1 - \delta}, 0, 1\right), \qquad h_{kk} = 0$$

    Args:
        conflict (`Tensor` of shape `[K, K]`): \(c\), NaN where unknown.
        margin (`Tensor` of shape `[K, K]`): \(\delta\), below 1.

    Returns:
        `Tensor` of shape `[K, K]`, in [0, 1].

    Example:
        >>> opposition(torch.tensor([[1.0, -0.625], [-0.625, 1.0]]), torch.full((2, 2), 0.25)).tolist()
        [[0.0, 0.5], [0.5, 0.0]]

    Note:
        Reconstructed from the abstract of arXiv 2601.06574.
    """
    slack = (1.0 - margin).clamp(min=1e-6)
    strength = ((-torch.nan_to_num(conflict, nan=0.0) - margin) / slack).clamp(0.0, 1.0)
    return strength * (1.0 - torch.eye(len(conflict), dtype=conflict.dtype, device=conflict.device))


def conflict_penalty(
    strength: Float[Tensor, "K K"],
    need: Float[Tensor, " K"],
    weighted: Bool[Tensor, " K"],
    attribution: str = "lag",
) -> Float[Tensor, " K"]:
    r"""Who pays for the conflicts.

    $$C_k = \frac{1}{K-1}\sum_j a_{kj} h_{kj}, \qquad a_{kj} = \begin{cases} \max(N_j - N_k, 0) & \text{lag}\\
    \min(N_j, 1) & \text{victim}\\ 1 & \text{plain}\end{cases}$$

    With "lag" the objective that is ahead pays for opposing the one that is behind. "plain" also lowers the objective
    that is being sacrificed, which makes the conflict worse; it is here for comparison.

    Args:
        strength (`Tensor` of shape `[K, K]`): \(h\), from [`opposition`].
        need (`Tensor` of shape `[K]`): \(N\), progress need.
        weighted (`Tensor` of shape `[K]`): where the user's weight is positive; the others neither pay nor charge.
        attribution (`str`): "lag", "victim" or "plain".

    Returns:
        `Tensor` of shape `[K]`, non-negative.

    Example:
        >>> strength, need = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0.25, 0.75])
        >>> conflict_penalty(strength, need, torch.tensor([True, True])).tolist()
        [0.5, 0.0]

    Note:
        Reconstructed from the abstract of arXiv 2601.06574.
    """
    if attribution == "lag":
        share = (need[None, :] - need[:, None]).clamp(min=0.0)
    elif attribution == "victim":
        share = need.clamp(max=1.0)[None, :].expand_as(strength)
    else:
        share = torch.ones_like(strength)
    both = weighted[:, None] & weighted[None, :]
    return torch.where(both, share * strength, 0.0).sum(1) / max(int(weighted.sum()) - 1, 1)
