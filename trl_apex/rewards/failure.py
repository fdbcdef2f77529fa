"""Stop a run whose rewards keep failing."""

from collections import deque


class RewardFailureRateError(RuntimeError):
    """A reward failed on more samples than allowed. The trainer saves a checkpoint and stops.

    Args:
        name (`str`): Name of the objective.
        rate (`float`): Share of failed samples.
        allowed (`float`): Largest share allowed.
        cause (`str`): The last failure, in one line.
    """

    def __init__(self, name: str, rate: float, allowed: float, cause: str) -> None:
        super().__init__(
            f"The reward `{name}` must not fail on more than {allowed:.0%} of the samples. Found {rate:.0%} over the "
            f"last batches: {cause}. Mend it and resume from the checkpoint, or raise `max_reward_failure_rate`."
        )
        self.name, self.rate, self.allowed, self.cause = name, rate, allowed, cause


class RewardFailureWarning(UserWarning):
    """A reward function failed on samples, which go on without this reward."""


class FailureWindow:
    """The share of failed samples over the last batches.

    `rate = failed / (n W / w)`, `n` = samples in the `w <= W` batches seen so far, `W = size`: batches still to come
    count as sound, so that one failed batch at the start does not stop a run.

    Args:
        name (`str`): Name of the objective.
        allowed (`float`, *optional*): Largest share allowed; None for any.
        size (`int`): Batches in the window.

    Raises:
        ValueError: If `allowed` is not in [0, 1] or `size` is below 1.

    Example:

    ```python
    >>> from trl_apex.rewards.failure import FailureWindow
    >>> window = FailureWindow("ocr", allowed=0.25, size=4)
    >>> window.add(failed=8, of=8)
    >>> window.rate
    0.25

    ```
    """

    def __init__(self, name: str, allowed: float | int | None, size: int) -> None:
        if allowed is not None and not 0 <= allowed <= 1:
            raise ValueError(f"`max_failure_rate` must be between 0 and 1. Found {allowed}. Pass a share, or None.")
        if size < 1:
            raise ValueError(f"`failure_window` must be at least 1. Found {size}. Pass a number of batches.")
        self.name, self.allowed = name, allowed
        self._batches: deque[tuple[int, int]] = deque(maxlen=size)

    @property
    def rate(self) -> float:
        """The share now."""
        samples = sum(of for _, of in self._batches)
        if not samples:
            return 0.0
        expected = samples * self._batches.maxlen / len(self._batches)  # type: ignore[operator]
        return sum(failed for failed, _ in self._batches) / expected

    def add(self, failed: int, of: int, cause: str = "") -> None:
        """Count one batch.

        Args:
            failed (`int`): Failed samples.
            of (`int`): Samples in the batch.
            cause (`str`, *optional*): The failure, in one line.

        Raises:
            RewardFailureRateError: If the share is now above the allowed one.
        """
        self._batches.append((failed, of))
        if self.allowed is not None and self.rate > self.allowed:
            raise RewardFailureRateError(self.name, self.rate, self.allowed, cause)
