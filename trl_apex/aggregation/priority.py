"""Adaptive priorities: potential, conflict penalty and progress need become weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SMALL_FACTOR = 0.1  # keeps one vanishing factor of the product from silencing an objective


def priority_scores(
    potential: Float[Tensor, " K"],
    penalty: Float[Tensor, " K"],
    need: Float[Tensor, " K"],
    coefficients: tuple[float, float, float] = (0.5, 1.0, 1.0),
    combination: str = "additive",
) -> Float[Tensor, " K"]:
    r"""One score per objective.

    $$s_k = \alpha_L L_k - \alpha_C C_k + \alpha_N N_k \qquad\text{(additive)}$$
    $$s_k = \alpha_L \ln(L_k + 0.1) - \alpha_C \ln(1 + C_k) + \alpha_N \ln(N_k + 0.1) \qquad\text{(multiplicative)}$$

    Args:
        potential (`Tensor` of shape `[K]`): \(L\).
        penalty (`Tensor` of shape `[K]`): \(C\).
        need (`Tensor` of shape `[K]`): \(N\), already times the share of live groups.
        coefficients (`tuple` of three `float`): \(\alpha_L, \alpha_C, \alpha_N\).
        combination (`str`): "additive" or "multiplicative".

    Returns:
        `Tensor` of shape `[K]`

    Example:
        >>> one = torch.ones(1)
        >>> priority_scores(one, 0.5 * one, 0.5 * one).tolist()
        [0.5]

    Note:
        Reconstructed from the abstract of arXiv 2601.06574.
    """
    gain, loss, want = coefficients
    if combination == "multiplicative":
        return (
            gain * torch.log(potential + SMALL_FACTOR)
            - loss * torch.log1p(penalty)
            + want * torch.log(need + SMALL_FACTOR)
        )
    return gain * potential - loss * penalty + want * need


def ramp(iteration: int, warmup: int, length: int) -> float:
    r"""How far the priorities have faded in: \(\lambda_t = \mathrm{clip}((t - T_w)/T_r, 0, 1)\).

    Args:
        iteration (`int`): \(t\), batches seen.
        warmup (`int`): \(T_w\).
        length (`int`): \(T_r\); 0 switches them on at once.

    Returns:
        `float`, in [0, 1].

    Example:
        >>> ramp(15, warmup=10, length=10)
        0.5
    """
    if length == 0:
        return float(iteration >= warmup)
    return min(max((iteration - warmup) / length, 0.0), 1.0)


def next_priorities(
    priorities: Float[Tensor, " K"],
    weights: Float[Tensor, " K"],
    scores: Float[Tensor, " K"],
    strength: float,
    temperature: float = 0.5,
    floor: float = 0.2,
    ema: float = 0.7,
) -> Float[Tensor, " K"]:
    r"""The priorities of the next batch.

    $$p = \eta\,\omega + (1-\eta)\,\mathrm{softmax}\left(\ln\omega + s/\tau\right), \qquad
    w \leftarrow \rho w + (1-\rho)\left((1-\lambda)\omega + \lambda p\right)$$

    Args:
        priorities (`Tensor` of shape `[K]`): \(w\), summing to one.
        weights (`Tensor` of shape `[K]`): \(\omega\), the user's, summing to one; 0 stays 0.
        scores (`Tensor` of shape `[K]`): \(s\).
        strength (`float`): \(\lambda\), from [`ramp`].
        temperature (`float`): \(\tau\).
        floor (`float`): \(\eta\).
        ema (`float`): \(\rho\).

    Returns:
        `Tensor` of shape `[K]`, summing to one, at least \(\eta\omega\) everywhere.

    Example:
        >>> half = torch.tensor([0.5, 0.5])
        >>> next_priorities(half, half, torch.tensor([1.0, 0.0]), strength=1.0, ema=0.0).tolist()
        [0.804..., 0.195...]

    Note:
        Reconstructed from the abstract of arXiv 2601.06574. A softmax over a sum is a normalized product of
        exponentials, so the additive score covers both readings of "combine".
    """
    wanted = floor * weights + (1 - floor) * torch.softmax(torch.log(weights) + scores / temperature, 0)
    moved = ema * priorities + (1 - ema) * ((1 - strength) * weights + strength * wanted)
    return moved / moved.sum()
