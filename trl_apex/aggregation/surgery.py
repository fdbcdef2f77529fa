"""Weights from the Gram matrix of the objectives' gradients, by TorchJD's solvers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def gramian_weights(
    rule: str,
    gramian: Float[Tensor, "K K"],
    weights: Float[Tensor, " K"],
    unit_gradients: bool = True,
    cagrad_c: float = 0.5,
    seed: int = 0,
) -> Float[Tensor, " K"]:
    r"""The weights that a multi-gradient method gives to the objectives.

    Solved on \(\tilde G_{kj} = K^2 \omega_k \omega_j G_{kj}\), the Gram matrix of the gradients scaled by the user's
    weights, so that the result is a set of weights \(v_k \omega_k\) for the unscaled ones. Objectives whose gradient
    is zero take no part: a min-norm method would otherwise follow them alone, which means standing still.

    Args:
        rule (`str`): "mgda", "upgrad", "pcgrad" or "cagrad".
        gramian (`Tensor` of shape `[K, K]`): \(G\), inner products of the objectives' gradients.
        weights (`Tensor` of shape `[K]`): \(\omega\), the user's, summing to one.
        unit_gradients (`bool`): for "mgda", solve for gradients of unit length, as MARBLE does.
        cagrad_c (`float`): for "cagrad", the radius of its search around the mean gradient.
        seed (`int`): for "pcgrad", whose projections come in a random order; must be the same on all ranks.

    Returns:
        `Tensor` of shape `[K]`, summing to one.

    Raises:
        ImportError: without TorchJD.

    Example:
        >>> even = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> gramian_weights("mgda", torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64), even).tolist()
        [0.333..., 0.666...]

    Note:
        MGDA as in MARBLE (arXiv 2605.06507); the solvers are TorchJD's. With `unit_gradients` the user's weights
        cancel out of "mgda". The weights are rescaled to sum to one, because the advantages are normalized afterwards.
    """
    active = (weights > 0) & (gramian.diagonal() > 0)
    if not bool(active.any()):
        return weights.clone()
    pick = active.nonzero()[:, 0]
    scale = len(weights) * weights[pick]
    if rule == "mgda" and unit_gradients:
        scale = 1.0 / gramian.diagonal()[pick].sqrt()
    scaled = gramian[pick][:, pick] * scale[:, None] * scale[None, :]
    scaled = scaled / scaled.diagonal().mean()  # the solvers' tolerances are absolute
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        solution = _weighting(rule, cagrad_c)(scaled)
    result = torch.zeros_like(weights)
    result[pick] = solution.to(weights.dtype) * scale
    total = float(result.sum())
    return result / total if total > 1e-9 else weights.clone()


def _weighting(rule: str, cagrad_c: float):
    try:
        from torchjd import aggregation

        if rule == "mgda":
            return aggregation.MGDAWeighting()
        if rule == "upgrad":
            return aggregation.UPGradWeighting()
        if rule == "pcgrad":
            return aggregation.PCGradWeighting()
        return aggregation.CAGradWeighting(c=cagrad_c)
    except ImportError as error:
        raise ImportError(
            f"The rule '{rule}' needs TorchJD and its solvers. Found them missing ({error}). "
            'Run `pip install "trl_apex[gradient]"`.'
        ) from error
