"""What several rewards together say of a run. Plain tensors in, plain numbers out."""

from jaxtyping import Float
from torch import Tensor


def paired_gain(base: Float[Tensor, " B"], tuned: Float[Tensor, " B"]) -> dict[str, float]:
    """How much one reward rose, on the same prompts and noise.

    ```
    gain = mean(tuned - base) / std(base)     gain_se = se / std(base)     se = std(tuned - base) / sqrt(n)
    ```

    Args:
        base, tuned (`torch.Tensor` of shape `[B]`): the reward of each image; a pair with a missing value is left out.

    Returns:
        `dict`: `base` and `tuned` (means), `se` (standard error of the mean paired difference, in reward units), `gain`
        and `gain_se` (in standard deviations of the base's rewards) and `n`.

    Raises:
        ValueError: if fewer than two whole pairs are left.

    Example:
        ```python
        >>> import torch
        >>> result = paired_gain(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 3.0, 4.0]))
        >>> result["tuned"], result["gain"], result["se"]
        (3.0, 1.0, 0.0)

        ```
    """
    whole = base.isfinite() & tuned.isfinite()
    base, tuned = base[whole].double(), tuned[whole].double()
    if len(base) < 2:
        raise ValueError(
            f"A paired difference needs at least 2 images scored both times. Found {len(base)}. Use more."
        )
    difference = tuned - base
    se = difference.std().item() / len(base) ** 0.5
    spread = base.std().item()
    scale = 1 / spread if spread > 0 else float("nan")
    return {
        "base": base.mean().item(),
        "tuned": tuned.mean().item(),
        "se": se,
        "gain": difference.mean().item() * scale,
        "gain_se": se * scale,
        "n": len(base),
    }


def domination_rates(base: Float[Tensor, "B K"], tuned: Float[Tensor, "B K"]) -> tuple[float, float]:
    """Share of prompts that got better all round, and share that got worse all round.

    The first (JDR) counts prompts where no objective fell and one rose; the second (JCR) the reverse.

    Args:
        base, tuned (`torch.Tensor` of shape `[B, K]`): rewards; missing values count as equal.

    Returns:
        `tuple[float, float]`

    Example:
        ```python
        >>> import torch
        >>> base = torch.zeros(4, 2)
        >>> tuned = torch.tensor([[1.0, 0.0], [1.0, -1.0], [-1.0, -1.0], [0.0, 0.0]])
        >>> domination_rates(base, tuned)
        (0.25, 0.25)

        ```
    """
    difference = (tuned - base).nan_to_num(nan=0.0)
    rose, fell = (difference > 0).any(1), (difference < 0).any(1)
    return (rose & ~fell).double().mean().item(), (fell & ~rose).double().mean().item()


def hypervolume(points: Float[Tensor, "M K"], reference: Float[Tensor, " K"]) -> float:
    """Volume that a set of points dominates above a reference point; larger is better.

    Args:
        points (`torch.Tensor` of shape `[M, K]`): e.g. gains of checkpoints, one axis an objective.
        reference (`torch.Tensor` of shape `[K]`): e.g. the base model (zeros). Points below it on any axis count nothing.

    Returns:
        `float`

    Example:
        ```python
        >>> import torch
        >>> hypervolume(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.zeros(2))
        3.0

        ```

    Reference: slicing of objectives, exact; meant for tens of points and a handful of objectives.
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

    Args:
        means (`torch.Tensor` of shape `[E, K]`): mean reward of each evaluation.
        errors (`torch.Tensor` of shape `[E, K]`): their standard errors.

    Returns:
        `float`: 0 where there are fewer than two evaluations.

    Example:
        ```python
        >>> import torch
        >>> means = torch.tensor([[0.0, 0.0], [1.0, -1.0], [2.0, 0.0]])
        >>> seesaw_rate(means, torch.full((3, 2), 0.1))
        0.5

        ```
    """
    if len(means) < 2:
        return 0.0
    step = means[1:] - means[:-1]
    noise = 2 * (errors[1:] ** 2 + errors[:-1] ** 2).sqrt()
    return ((step > noise).any(1) & (step < -noise).any(1)).double().mean().item()
