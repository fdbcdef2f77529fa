"""Conflict of the objectives' true gradients, from many noisy batches."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class PopulationConflict:
    r"""Cross-fitted estimate of the cosines between the objectives' expected gradients.

    One batch's gradients share their samples' noise, so the cosine of two objectives' batch gradients shows how their
    *scores* correlate over that batch, whatever the true gradients do. Gradients of two disjoint halves of the prompts
    have independent noise, so their inner products are unbiased:

    $$\hat G_{kl} = \tfrac12 \left(\langle g_k^{(1)}, g_l^{(2)} \rangle + \langle g_l^{(1)}, g_k^{(2)} \rangle\right),
    \qquad \mathbb E\, \hat G_{kl} = \langle \mathbb E g_k, \mathbb E g_l \rangle, \qquad
    c_{kl} = \frac{\bar G_{kl}}{\sqrt{\bar G_{kk} \bar G_{ll}}}$$

    with \(\bar G\) the exponentially weighted mean over updates. A cosine is given only where both diagonals are
    clearly positive; its standard error is by the delta method, from the spread of the products over updates.

    Args:
        size (`int`): K, objectives.
        decay (`float`): decay of the weights of past updates; 1 weighs all alike.
        clearly (`float`): how many standard errors a diagonal must be above zero.

    Raises:
        ValueError: if `decay` is not in (0, 1].

    Example:
        >>> estimate = PopulationConflict(2, decay=1.0)
        >>> for wobble in (0.9, 1.0, 1.1):
        ...     estimate.update(wobble * torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64))
        >>> cosine, error = estimate.estimate()
        >>> round(cosine[0, 1].item(), 6)
        -0.5

    Note:
        A batch's gradient is nearly all noise, so this needs thousands of samples; until then it says NaN.
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
        r"""Take in one update's products between halves.

        Args:
            cross (`Tensor` of shape `[K, K]`): \(\langle g_k^{(1)}, g_l^{(2)} \rangle\), as [`ProbeResult`] has them.
        """
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
        """The cosines and their standard errors, both of shape `[K, K]`; NaN where they cannot be told yet."""
        size = self.size
        cosine = torch.full((size, size), torch.nan, dtype=torch.float64)
        error = cosine.clone()
        if self._weight**2 <= self._squares * 1.5:
            return cosine, error  # one update has no spread
        # Unbiased covariance of the weighted mean (reliability weights).
        spread = self._scatter / (self._weight - self._squares / self._weight)
        covariance = spread * self._squares / self._weight**2
        gramian = self.gramian
        diagonal = gramian.diagonal()
        index = torch.arange(size * size).reshape(size, size)
        sure = diagonal > self.clearly * covariance[index.diagonal(), index.diagonal()].clamp(min=0.0).sqrt()
        for k in range(size):
            for l in range(size):  # noqa: E741
                if not (sure[k] and sure[l]):
                    continue
                c = gramian[k, l] / torch.sqrt(diagonal[k] * diagonal[l])
                slope = torch.zeros(size * size, dtype=torch.float64)
                slope[index[k, l]] += 1 / torch.sqrt(diagonal[k] * diagonal[l])
                slope[index[k, k]] -= c / (2 * diagonal[k])
                slope[index[l, l]] -= c / (2 * diagonal[l])
                cosine[k, l] = c.clamp(-1.0, 1.0)
                error[k, l] = torch.sqrt((slope @ covariance @ slope).clamp(min=0.0))
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
        """Take over a state.

        Raises:
            ValueError: if it was saved for another number of objectives.
        """
        if state["size"] != self.size:
            raise ValueError(
                f"The saved estimate must be of {self.size} objectives. Found {state['size']}. "
                "Resume with the saved objectives, or start without it."
            )
        self._weight, self._squares = float(state["weight"]), float(state["squares"])
        self._mean = torch.tensor(state["mean"], dtype=torch.float64)
        self._scatter = torch.tensor(state["scatter"], dtype=torch.float64)
