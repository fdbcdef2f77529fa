"""Conflict between objectives: how it is measured, and which objective pays for it.

Three measures, cheapest first: the correlation of one batch's scores ([`score_correlation`]), the cosine of one batch's
gradients ([`cosines`]), and the cosine of the expected gradients ([`PopulationConflict`]). The penalty is reconstructed from the
abstract of arXiv 2601.06574.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def score_correlation(
    scores: Float[Tensor, "B K"], live: Bool[Tensor, "B K"]
) -> tuple[Float[Tensor, "K K"], Float[Tensor, "K K"]]:
    r"""Correlation of the objectives' normalized scores over the rows that both score.

    $$c_{kj} = \frac{\sum_i z_{ik} z_{ij}}{\sqrt{\sum_i z_{ik}^2 m_{ij} \sum_i z_{ij}^2 m_{ik}}}$$

    \(z\) = `scores`, with zero mean in every group and 0 where dead or missing; \(m\) = `live`, true for valid rewards of live
    groups. Returns the correlation, NaN if two objectives share no live row, and the number of shared rows.

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
    r"""Cosines of the vectors behind a Gram matrix, \(G_{kj} / \sqrt{G_{kk} G_{jj}}\); NaN where one of them is zero.

    Example:
        >>> cosines(torch.tensor([[4.0, -1.0], [-1.0, 1.0]])).tolist()
        [[1.0, -0.5], [-0.5, 1.0]]
    """
    norms = gramian.diagonal().clamp(min=0.0).sqrt()
    outer = norms[:, None] * norms[None, :]
    return torch.where(outer > 0, (gramian / outer).clamp(-1.0, 1.0), torch.nan)


def opposition(conflict: Float[Tensor, "K K"], margin: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    r"""How much two objectives oppose each other, beyond what noise explains; between 0 and 1.

    $$h_{kj} = \mathrm{clip}\left(\frac{-c_{kj} - \delta}{1 - \delta}, 0, 1\right), \qquad h_{kk} = 0$$

    \(c\) = `conflict`, NaN where unknown; \(\delta\) = `margin`, below 1.

    Example:
        >>> opposition(torch.tensor([[1.0, -0.625], [-0.625, 1.0]]), torch.full((2, 2), 0.25)).tolist()
        [[0.0, 0.5], [0.5, 0.0]]
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
    r"""What each objective pays for its conflicts; never negative.

    $$C_k = \frac{1}{K-1}\sum_j a_{kj} h_{kj}, \qquad a_{kj} = \begin{cases} \max(N_j - N_k, 0) & \text{lag}\\
    \min(N_j, 1) & \text{victim}\\ 1 & \text{plain}\end{cases}$$

    \(h\) is from [`opposition`], \(N\) = `need`; objectives without weight are left out. With "lag" the objective that is ahead
    pays for opposing the one behind. "plain" also lowers the objective that is sacrificed; it is here for comparison.

    Example:
        >>> strength, need = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0.25, 0.75])
        >>> conflict_penalty(strength, need, torch.tensor([True, True])).tolist()
        [0.5, 0.0]
    """
    if attribution == "lag":
        share = (need[None, :] - need[:, None]).clamp(min=0.0)
    elif attribution == "victim":
        share = need.clamp(max=1.0)[None, :].expand_as(strength)
    else:
        share = torch.ones_like(strength)
    both = weighted[:, None] & weighted[None, :]
    return torch.where(both, share * strength, 0.0).sum(1) / max(int(weighted.sum()) - 1, 1)


class PopulationConflict:
    r"""Cross-fitted estimate of the cosines between the objectives' expected gradients.

    One batch's gradients share their samples' noise, so their cosine shows how the *scores* correlate over that batch.
    Gradients of two disjoint halves of the prompts have independent noise, so their inner products are unbiased:

    $$\hat G_{kl} = \tfrac12 \left(\langle g_k^{(1)}, g_l^{(2)} \rangle + \langle g_l^{(1)}, g_k^{(2)} \rangle\right),
    \qquad \mathbb E\, \hat G_{kl} = \langle \mathbb E g_k, \mathbb E g_l \rangle, \qquad
    c_{kl} = \frac{\bar G_{kl}}{\sqrt{\bar G_{kk} \bar G_{ll}}}$$

    with \(\bar G\) the mean over updates, weighted by `decay`. A cosine is given if both diagonals are `clearly` standard errors
    above zero; its own standard error is by the delta method. A batch's gradient is nearly all noise, so this needs
    thousands of samples, and says NaN until then.

    Args:
        size (`int`): K, objectives.
        decay (`float` in (0, 1]): decay of the weights of past updates; 1 weighs all alike.
        clearly (`float`): how many standard errors a diagonal must be above zero.

    Example:
        >>> estimate = PopulationConflict(2, decay=1.0)
        >>> for wobble in (0.9, 1.0, 1.1):
        ...     estimate.update(wobble * torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64))
        >>> cosine, error = estimate.estimate()
        >>> round(cosine[0, 1].item(), 6)
        -0.5
    """

    def __init__(self, size: int, decay: float = 0.99, clearly: float = 2.0) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"`decay` must lie in (0, 1]. Found {decay}. Pass e.g. 0.99.")
        self.size, self.decay, self.clearly = size, decay, clearly
        pairs = size * size
        self._weight, self._squares = 0.0, 0.0
        self._mean = torch.zeros(pairs, dtype=torch.float64)
        self._scatter = torch.zeros(pairs, pairs, dtype=torch.float64)

    def update(self, cross: Float[Tensor, "K K"]) -> None:
        r"""Take in one update's products between halves, \(\langle g_k^{(1)}, g_l^{(2)} \rangle\)."""
        cross = cross.detach().to("cpu", torch.float64)
        new = ((cross + cross.T) / 2).flatten()
        self._weight = self.decay * self._weight + 1.0
        self._squares = self.decay**2 * self._squares + 1.0
        step = new - self._mean
        self._mean = self._mean + step / self._weight
        self._scatter = self.decay * self._scatter + torch.outer(step, new - self._mean)

    @property
    def gramian(self) -> Float[Tensor, "K K"]:
        """Inner products of the expected gradients; diagonals may be negative while noise dominates."""
        return self._mean.reshape(self.size, self.size)

    def estimate(self) -> tuple[Float[Tensor, "K K"], Float[Tensor, "K K"]]:
        """The cosines and their standard errors; NaN where they are not known yet."""
        size = self.size
        cosine = torch.full((size, size), torch.nan, dtype=torch.float64)
        error = cosine.clone()
        if self._weight**2 <= self._squares * 1.5:
            return cosine, error  # one update has no spread
        # The unbiased covariance of a weighted mean (reliability weights)
        spread = self._scatter / (self._weight - self._squares / self._weight)
        covariance = spread * self._squares / self._weight**2
        gramian = self.gramian
        diagonal = gramian.diagonal()
        index = torch.arange(size * size).reshape(size, size)
        sure = diagonal > self.clearly * covariance.diagonal()[index.diagonal()].clamp(min=0.0).sqrt()
        for k in range(size):
            for j in range(size):
                if not (sure[k] and sure[j]):
                    continue
                c = gramian[k, j] / torch.sqrt(diagonal[k] * diagonal[j])
                slope = torch.zeros(size * size, dtype=torch.float64)
                slope[index[k, j]] += 1 / torch.sqrt(diagonal[k] * diagonal[j])
                slope[index[k, k]] -= c / (2 * diagonal[k])
                slope[index[j, j]] -= c / (2 * diagonal[j])
                cosine[k, j] = c.clamp(-1.0, 1.0)
                error[k, j] = torch.sqrt((slope @ covariance @ slope).clamp(min=0.0))
        return cosine, error

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers and lists, exact through JSON."""
        return {
            "size": self.size,
            "weight": self._weight,
            "squares": self._squares,
            "mean": self._mean.tolist(),
            "scatter": self._scatter.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; a ValueError says if it is incomplete or of another number of objectives."""
        missing = sorted(self.state_dict().keys() - state.keys())
        if missing:
            raise ValueError(
                f"The saved estimate must hold {', '.join(self.state_dict())}. Found no {', '.join(missing)}. "
                "The file was cut: start without it."
            )
        if state["size"] != self.size:
            raise ValueError(
                f"The saved estimate must be of {self.size} objectives. Found {state['size']}. "
                "Resume with the saved objectives, or start without it."
            )
        self._weight, self._squares = float(state["weight"]), float(state["squares"])
        self._mean = torch.tensor(state["mean"], dtype=torch.float64)
        self._scatter = torch.tensor(state["scatter"], dtype=torch.float64)
