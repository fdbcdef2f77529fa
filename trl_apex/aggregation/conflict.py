"""How conflict between objectives is measured.

Three measures, cheapest first: the correlation of one batch's scores ([`score_correlation`]), the cosine of one batch's
gradients ([`cosines`]), and the cosine of the expected gradients ([`PopulationConflict`]).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .normalize import Matrix, Rows, Valid
from .state import from_plain, to_plain


def score_correlation(scores: Rows, live: Valid) -> tuple[Matrix, Matrix]:
    r"""Correlation of the objectives' normalized scores over the rows that both score.

    $$c_{kj} = \frac{\sum_i z_{ik} z_{ij}}{\sqrt{\sum_i z_{ik}^2 m_{ij} \sum_i z_{ij}^2 m_{ik}}}$$

    \(z\) = `scores`, with zero mean in every group and 0 where dead or missing; \(m\) = `live`, true for valid rewards of live
    groups. Returns the correlation, NaN if two objectives share no live row, and the number of shared rows.
    """
    there = live.to(scores.dtype)
    norms = (scores * scores).T @ there
    shared = there.T @ there
    return ((scores.T @ scores) / torch.sqrt(norms * norms.T)).clamp(-1.0, 1.0), shared


def cosines(gramian: Matrix) -> Matrix:
    r"""Cosines of the vectors behind a Gram matrix, \(G_{kj} / \sqrt{G_{kk} G_{jj}}\); NaN where one of them is zero."""
    norms = gramian.diagonal().clamp(min=0.0).sqrt()
    outer = norms[:, None] * norms[None, :]
    return torch.where(outer > 0, (gramian / outer).clamp(-1.0, 1.0), torch.nan)


@dataclass(frozen=True)
class Sums:
    """Weighted moments of the products between halves, over updates."""

    weight: float  # sum of the updates' weights
    squares: float  # sum of their squares
    mean: Float[Tensor, " N"]  # N = K * K
    scatter: Float[Tensor, "N N"]


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
        zeros = torch.zeros(size**2, size**2, dtype=torch.float64)
        self._sums = Sums(0.0, 0.0, zeros[0], zeros)

    def update(self, cross: Matrix) -> None:
        r"""Take in one update's products between halves, \(\langle g_k^{(1)}, g_l^{(2)} \rangle\)."""
        old, cross = self._sums, cross.detach().to("cpu", torch.float64)
        new = ((cross + cross.T) / 2).flatten()
        weight = self.decay * old.weight + 1.0
        step = new - old.mean
        mean = old.mean + step / weight
        scatter = self.decay * old.scatter + torch.outer(step, new - mean)
        self._sums = Sums(weight, self.decay**2 * old.squares + 1.0, mean, scatter)

    @property
    def gramian(self) -> Matrix:
        """Inner products of the expected gradients; diagonals may be negative while noise dominates."""
        return self._sums.mean.reshape(self.size, self.size)

    def estimate(self) -> tuple[Matrix, Matrix]:
        """The cosines and their standard errors; NaN where they are not known yet."""
        size, weight, squares = self.size, self._sums.weight, self._sums.squares
        cosine = torch.full((size, size), torch.nan, dtype=torch.float64)
        error = cosine.clone()
        if weight**2 <= squares * 1.5:
            return cosine, error  # one update has no spread
        # The unbiased covariance of a weighted mean (reliability weights)
        covariance = self._sums.scatter / (weight - squares / weight) * squares / weight**2
        gramian, diagonal = self.gramian, self.gramian.diagonal()
        noise = covariance.diagonal().reshape(size, size).diagonal().clamp(min=0.0).sqrt()
        sure = diagonal > self.clearly * noise
        for k, j in product(range(size), repeat=2):
            if sure[k] and sure[j]:
                root = torch.sqrt(diagonal[k] * diagonal[j])
                c = gramian[k, j] / root
                slope = torch.zeros_like(gramian)  # of c, by each entry of the Gram matrix
                slope[k, j] += 1 / root
                slope[k, k] -= c / (2 * diagonal[k])
                slope[j, j] -= c / (2 * diagonal[j])
                cosine[k, j] = c.clamp(-1.0, 1.0)
                error[k, j] = torch.sqrt((slope.flatten() @ covariance @ slope.flatten()).clamp(min=0.0))
        return cosine, error

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers and lists, exact through JSON."""
        return {"size": self.size, **to_plain(self._sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; a ValueError says if it is incomplete or of another number of objectives."""
        if state.get("size", self.size) != self.size:
            raise ValueError(
                f"The saved estimate must be of {self.size} objectives. Found {state['size']}. "
                "Resume with the saved objectives, or start without it."
            )
        self._sums = from_plain(self._sums, state)
