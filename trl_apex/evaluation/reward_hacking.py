"""When the rewards that are trained rise and one that is only watched falls."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def hacking_signs(
    names: Sequence[str],
    first: Float[Tensor, "P K"],
    latest: Float[Tensor, "P K"],
    trained: int,
    threshold: float = 2.0,
) -> list[str]:
    """Sentences about watched rewards that fell while the trained ones rose; none where there is no such sign.

    ```
    d_ik = latest_ik - first_ik                      paired: same prompt, same noise
    rise = mean over trained k of d_ik / std_i(first_ik), per row i
    sign: mean_i(rise) > threshold SE(rise)  and, for a watched k,  mean_i(d_ik) < -threshold SE(d_ik)
    ```

    Args:
        names (sequence of `str`): K rewards, the trained ones first.
        first, latest (`torch.Tensor` of shape `[P, K]`): rewards of the first and of the latest evaluation, row by row of the
            same dataset; NaN where missing.
        trained (`int`): how many of the K are trained on.
        threshold (`float`): in standard errors.

    Returns:
        `list[str]`: one for each watched reward that fell, with the figures.

    Example:
        ```python
        >>> first = torch.arange(4.0).repeat(2, 1).T
        >>> latest = first + torch.tensor([1.0, -1.0]) + 0.1 * torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
        >>> hacking_signs(["ocr", "faces"], first, latest, trained=1)
        ['faces fell from 1.5 to 0.5 (-1 ± 0.0408)']
        >>> hacking_signs(["ocr", "faces"], first, first + 1, trained=1)
        []

        ```
    """
    difference = latest.double() - first.double()
    spread = torch.stack([_std(column) for column in first[:, :trained].double().T])
    rise = (difference[:, :trained] / spread)[:, spread > 0].nanmean(1)
    if not _mean_and_error(rise)[0] > threshold * _mean_and_error(rise)[1]:
        return []
    signs = []
    for k in range(trained, len(names)):
        mean, error = _mean_and_error(difference[:, k])
        if mean < -threshold * error:
            both = difference[:, k].isfinite()
            before, after = first[both, k].mean().item(), latest[both, k].mean().item()
            signs.append(f"{names[k]} fell from {before:.4g} to {after:.4g} ({mean:.3g} ± {error:.3g})")
    return signs


def _std(values: Tensor) -> Tensor:
    values = values[values.isfinite()]
    return values.std() if len(values) > 1 else values.new_zeros(())


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error; nothing can be said of fewer than two values."""
    values = values[values.isfinite()]
    if len(values) < 2:
        return 0.0, float("inf")
    return values.mean().item(), values.std().item() / len(values) ** 0.5
