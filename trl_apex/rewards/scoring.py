"""Score a batch with all reward functions side by side, without stopping the trainer."""

import asyncio
import logging
import math
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trl_apex.rewards.calling import as_numbers, describe, is_async, reward_name, takes_images
from trl_apex.rewards.failure import FailureWindow, RewardFailureWarning
from trl_apex.rewards.lane import Lane, on_this_device
from trl_apex.rewards.protocol import RewardLoadError, TransientRewardError

logger = logging.getLogger(__name__)

BACKOFF = 0.5
LONGEST_WAIT = 30.0


@dataclass(frozen=True)
class ScoredBatch:
    """The rewards of a batch.

    Args:
        rewards (`Tensor` of shape `[B, K]`): float32, one column per reward function in their order; NaN for a
            missing reward.
        seconds (`dict[str, float]`): Time that each reward function took, retries included, waiting in line not.
        failures (`dict[str, int]`): Samples per reward function whose reward is missing because something broke. A
            reward that does not apply to a sample (None) is no failure.
    """

    rewards: Float[Tensor, "B K"]
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)


class RewardScorer:
    """Runs reward functions side by side in the background.

    Blocking functions run in a thread of their own each, one batch at a time and in order, since networks are not
    thread-safe; async functions run in one event loop. A failing function costs its own rewards of that batch, never
    the batch.

    Args:
        reward_funcs (`Sequence[Callable]`): The reward functions, blocking or async.
        names (`Sequence[str]`, *optional*): One objective name per function. Defaults to each function's `__name__`.
        timeout (`float` or `Sequence[float | None]`, *optional*): Seconds that one call may take, for all functions
            or one per function; None for no limit.
        max_retries (`int`, *optional*, defaults to `2`): How often a call is tried again after a failure that may
            pass: a [`TransientRewardError`] or another `ConnectionError`.
        backoff (`float`, *optional*, defaults to `0.5`): Seconds before the first retry; each further one
            waits twice as long.
        max_failure_rate (`float`, *optional*): Largest share of failed samples per function over the last
            `failure_window` batches; above it the batch raises [`RewardFailureRateError`]. None never stops.
        failure_window (`int`, *optional*, defaults to `10`): Batches that the share is taken over; those still to
            come count as sound.

    Raises:
        ValueError: If names are not one per function and unique, or an option is out of range.

    Example:

    ```python
    >>> from trl_apex.rewards import RewardScorer
    >>> def brightness(completions, **kwargs):
    ...     return [0.5, None]
    >>> scorer = RewardScorer([brightness])
    >>> scored = scorer.submit(prompts=["a", "b"], completions=[], columns={}).result()
    >>> scored.rewards
    tensor([[0.5000],
            [   nan]])
    >>> scored.failures
    {'brightness': 0}
    >>> scorer.close()

    ```
    """

    def __init__(
        self,
        reward_funcs: Sequence[Callable],
        names: Sequence[str] | None = None,
        *,
        timeout: float | int | Sequence[float | int | None] | None = None,
        max_retries: int = 2,
        backoff: float | int = BACKOFF,
        max_failure_rate: float | int | None = None,
        failure_window: int = 10,
    ) -> None:
        self.reward_funcs = list(reward_funcs)
        self.names = list(names) if names is not None else [reward_name(func) for func in self.reward_funcs]
        if len(self.names) != len(self.reward_funcs) or len(set(self.names)) != len(self.names):
            raise ValueError(
                f"`names` must be one unique name per reward function. Found {self.names} for "
                f"{len(self.reward_funcs)} functions. Give each its own `name=`."
            )
        if max_retries < 0 or backoff < 0:
            raise ValueError(
                f"`max_retries` and `backoff` must not be negative. Found {max_retries} and {backoff}. Pass 0."
            )
        if isinstance(timeout, Sequence):
            self.timeouts: list[float | int | None] = list(timeout)
        else:
            self.timeouts = [timeout] * len(self.reward_funcs)
        if len(self.timeouts) != len(self.reward_funcs) or any(t is not None and t <= 0 for t in self.timeouts):
            raise ValueError(
                f"`timeout` must be a positive number of seconds, or one per reward function. Found {timeout}. "
                "Pass None for no limit."
            )
        self.max_retries, self.backoff = max_retries, backoff
        self._windows = [FailureWindow(name, max_failure_rate, failure_window) for name in self.names]
        self._warned: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=on_this_device(self._loop.run_forever), name="reward-scorer", daemon=True
        )
        self._thread.start()
        self._lanes = [
            None if is_async(func) else Lane(name) for func, name in zip(self.reward_funcs, self.names, strict=True)
        ]
        self._closed = False

    def submit(
        self,
        *,
        prompts: list[str],
        completions: Any,
        images: Float[Tensor, "B 3 H W"] | None = None,
        columns: dict[str, list] | None = None,
        **trl_keywords: Any,
    ) -> "Future[ScoredBatch]":
        """Start scoring a batch and return at once, from any thread and before earlier batches are done.

        Args:
            prompts (`list[str]`): One prompt per sample.
            completions (`Sequence[PIL.Image.Image]` or `Tensor` of shape `[B, 3, H, W]`): The images.
            images (`Tensor` of shape `[B, 3, H, W]`, *optional*): The images as floats in [0, 1], given to the
                functions that take `images`.
            columns (`dict[str, list]`, *optional*): Every other column of the dataset, one entry per sample.
            trl_keywords: `trainer_state`, `log_extra`, `log_metric` and what else TRL passes.

        Returns:
            `concurrent.futures.Future` of a [`ScoredBatch`]. Its `result()` raises ValueError for a function that
            returns no proper list of numbers, RewardLoadError or ImportError for one that cannot work at all, and
            [`RewardFailureRateError`] for one that fails too often.

        Raises:
            RuntimeError: If the scorer is closed.
        """
        if self._closed:
            raise RuntimeError("The scorer must be open to take a batch. Found it closed. Make a new RewardScorer.")
        keywords = {"completion_ids": None, **(columns or {}), **trl_keywords}
        keywords |= {"prompts": prompts, "completions": completions}
        return asyncio.run_coroutine_threadsafe(self._score_batch(keywords, images, len(prompts)), self._loop)

    def check(self) -> None:
        """Ask every reward that has a `check()` whether it can work, such as a remote one for its server's health.

        Raises:
            RewardLoadError: With the name of the reward and what is wrong, in one line.
        """
        for func in self.reward_funcs:
            check = getattr(func, "check", None)
            if callable(check):
                check()

    def close(self) -> None:
        """Stop the background threads; batches under way are cancelled. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        for lane in self._lanes:
            if lane is not None:
                lane.close()
        try:
            asyncio.run_coroutine_threadsafe(self._drain(), self._loop).result(timeout=10)
        except TimeoutError:  # must not hide the error that closed the scorer
            logger.warning("A reward did not stop within 10 s; its thread is left to end by itself.")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()

    def __enter__(self) -> "RewardScorer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def _drain(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for func in self.reward_funcs:
            close = getattr(func, "aclose", None)
            if close is not None:
                await close()

    async def _score_batch(self, keywords: dict[str, Any], images: Tensor | None, size: int) -> ScoredBatch:
        calls = [self._call(i, keywords, images, size) for i in range(len(self.reward_funcs))]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        results = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            results.append(outcome)
        columns = [torch.tensor(rewards, dtype=torch.float32) for rewards, _, _ in results]
        return ScoredBatch(
            rewards=torch.stack(columns, dim=1) if columns else torch.empty(size, 0),
            seconds={name: seconds for name, (_, seconds, _) in zip(self.names, results, strict=True)},
            failures={name: failed for name, (_, _, failed) in zip(self.names, results, strict=True)},
        )

    async def _call(
        self, index: int, keywords: dict[str, Any], images: Tensor | None, size: int
    ) -> tuple[list[float], float, int]:
        """One function's rewards, its seconds and its failed samples."""
        func, name = self.reward_funcs[index], self.names[index]
        if images is not None and takes_images(func):
            keywords = keywords | {"images": images}
        elapsed = [0.0]
        try:
            returned = await self._call_with_retries(index, keywords, elapsed)
        except (RewardLoadError, ImportError):
            raise
        except Exception as error:  # a reward function may fail in any way
            causes: list[str | None] = [describe(error)] * size
            rewards = [math.nan] * size
        else:
            rewards, causes = as_numbers(returned, name, size)
        failed = sum(cause is not None for cause in causes)
        if failed:
            self._warn(name, failed, size, next(cause for cause in causes if cause))
        self._windows[index].add(failed, size, next((cause for cause in causes if cause), ""))
        return rewards, elapsed[0], failed

    async def _call_with_retries(self, index: int, keywords: dict[str, Any], elapsed: list[float]) -> Any:
        for attempt in range(self.max_retries + 1):
            try:
                return await self._call_once(index, keywords, elapsed)
            except _passing_errors() as error:
                if attempt == self.max_retries:
                    raise
                wait = self.backoff * 2**attempt
                asked = error.retry_after if isinstance(error, TransientRewardError) else None
                wait = min(max(wait, asked or 0.0), LONGEST_WAIT)
                elapsed[0] += wait
                await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _call_once(self, index: int, keywords: dict[str, Any], elapsed: list[float]) -> Any:
        func, timeout, lane = self.reward_funcs[index], self.timeouts[index], self._lanes[index]
        started = time.perf_counter()
        try:
            if lane is None:
                return await asyncio.wait_for(func(**keywords), timeout)
            async with lane.turn(timeout):
                started = time.perf_counter()
                return await lane.run(func, keywords, timeout)
        except TimeoutError as error:
            limit = "" if timeout is None else f" within {timeout:g} s"
            raise RuntimeError(str(error) or f"no answer{limit}") from error
        finally:
            elapsed[0] += time.perf_counter() - started

    def _warn(self, name: str, failed: int, size: int, cause: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"The reward `{name}` failed on {failed} of {size} samples: {cause}. They count as missing. Further "
                f"failures are counted in `reward_failures/{name}` without a warning.",
                RewardFailureWarning,
                stacklevel=2,
            )


def _passing_errors() -> tuple[type[Exception], ...]:
    """What a second try may mend: connection errors, httpx's too if a function has loaded it."""
    httpx = sys.modules.get("httpx")
    return (ConnectionError, httpx.TransportError) if httpx is not None else (ConnectionError,)
