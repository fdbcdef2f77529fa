"""The learning-rate schedule that every tiny model is pretrained with."""

import torch


def warm_then_decay(
    optimizer: torch.optim.Optimizer, steps: int, *, warm_up: int = 100, decay_share: float = 0.35
) -> torch.optim.lr_scheduler.LambdaLR:
    """Rises linearly over `warm_up` steps, stays, then falls linearly to zero over the last `decay_share`.

    `factor(t) = min(1, (t + 1) / warm_up, (steps - t) / (decay_share * steps))`

    Args:
        optimizer (`torch.optim.Optimizer`): Its learning rates are scaled.
        steps (`int`): Length of the training.
        warm_up (`int`, *optional*, defaults to 100): Steps of the rise.
        decay_share (`float`, *optional*, defaults to 0.35): Share of the steps that the fall takes.

    Returns:
        `torch.optim.lr_scheduler.LambdaLR`: To be stepped once after every optimizer step.

    Example:
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> warm_then_decay(optimizer, 1000).get_last_lr()
        [0.01]
    """
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / warm_up, (steps - t) / (decay_share * steps))
    )
