"""What a reward server accepts, and how much memory its requests may hold together."""

from dataclasses import dataclass, fields

MEBI = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may send.

    Args:
        max_body (`int`): Bytes of one request.
        max_memory (`int`): Bytes of all requests under way, bodies and decoded images together.
        max_images (`int`): Images of one request.
        max_pixels (`int`): Pixels of one image.
        max_prompt (`int`): Characters of one prompt.
        max_metadata (`int`): Bytes of the JSON part.
        max_queue (`int`): Images waiting for one reward.
        max_connections (`int`): Open connections; more are answered 503, and twice as many are cut off.
        header_timeout (`float`): Seconds a client may take to send the head of a request.
        body_timeout (`float`): Seconds it may take to send the body.
        score_timeout (`float`): Seconds one request may wait and be scored.

    Raises:
        ValueError: If a bound is not positive.

    Example:

    ```python
    >>> from trl_apex.rewards.limits import Limits
    >>> Limits(max_images=8).max_images
    8

    ```
    """

    max_body: int = 256 * MEBI
    max_memory: int = 1024 * MEBI
    max_images: int = 64
    max_pixels: int = 2048 * 2048
    max_prompt: int = 10_000
    max_metadata: int = 4 * MEBI
    max_queue: int = 512
    max_connections: int = 512
    header_timeout: float | int = 10.0
    body_timeout: float | int = 60.0
    score_timeout: float | int = 300.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(
                    f"`{field.name}` must be positive. Found {getattr(self, field.name)}. Pass a larger bound."
                )


class OutOfMemoryBudget(Exception):
    """The requests under way hold all the memory they may."""


class MemoryBudget:
    """Counts the bytes that requests hold.

    Args:
        size (`int`): Bytes in all.

    Example:

    ```python
    >>> from trl_apex.rewards.limits import MemoryBudget
    >>> budget = MemoryBudget(100)
    >>> share = budget.share()
    >>> share.take(60)
    >>> budget.used
    60
    >>> share.give_back()
    >>> budget.used
    0

    ```
    """

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0

    def share(self) -> "MemoryShare":
        """A new request's share, empty at first."""
        return MemoryShare(self)


class MemoryShare:
    """What one request holds of a [`MemoryBudget`]."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget, self._held = budget, 0

    def take(self, size: int) -> None:
        """Hold more bytes.

        Raises:
            OutOfMemoryBudget: If there are not as many left.
        """
        if self._budget.used + size > self._budget.size:
            raise OutOfMemoryBudget
        self._budget.used += size
        self._held += size

    def give_back(self) -> None:
        """Hold nothing any more."""
        self._budget.used -= self._held
        self._held = 0
