"""Call reward functions side by side, with timeouts, retries and counted failures.

[`RewardScorer`] takes a batch, a [`RewardCaller`] calls each function, and [`as_numbers`] reads what it returns.
"""

import asyncio
import functools
import inspect
import logging
import math
import queue
import reprlib
import sys
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from trl_apex.redact import describe
from trl_apex.rewards.base import RewardList, RewardLoadError, TransientRewardError, wants_whole_groups

logger = logging.getLogger(__name__)

LONGEST_WAIT = 30.0
LARGEST = torch.finfo(torch.float32).max  # rewards travel as float32
CONNECTION_ERRORS = {
    "httpx": ("TransportError",),
    "requests": ("ConnectionError", "Timeout"),
    "aiohttp": ("ClientConnectionError",),
}
Returned = TypeVar("Returned")


class RewardFailureRateError(RuntimeError):
    """A reward failed for more images than `max_reward_failure_rate` allows."""


class RewardFailureWarning(UserWarning):
    """A reward function failed on samples, which go on without this reward."""


@dataclass(frozen=True)
class ScoredBatch:
    """The rewards of a batch.

    Args:
        rewards (`Tensor` of shape `[B, K]`): float32, one column per reward function; NaN for a missing reward.
        seconds (`dict[str, float]`): Time inside each reward function, all tries together.
        failures (`dict[str, int]`): Samples per reward function whose reward is missing because something broke.
    """

    rewards: Float[Tensor, "B K"]
    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)


class RewardScorer:
    """Runs reward functions side by side in the background.

    Each blocking function has a thread of its own and gets one batch at a time, in order. Async functions share one
    event loop. Each function gets its own copy of the lists, PIL images and tensors. A function that fails, whatever it
    raises, loses its own rewards of that batch; the others go on.

    Args:
        reward_funcs (`Sequence[Callable]`): The reward functions, blocking or async.
        names (`Sequence[str]`, *optional*): One objective name per function. Defaults to [`reward_name`] of each.
        timeout (`float` or `Sequence[float | None]`, *optional*): Seconds that one call may take, of all functions or of each.
        max_retries, backoff (`int`, `float`, *optional*, default to `2`, `0.5`): See [`retrying`].
        max_failure_rate, failure_window: Deprecated, without effect.

    Example:
        >>> def brightness(completions, **kwargs):
        ...     return [0.5, None]
        >>> with RewardScorer([brightness]) as scorer:
        ...     scorer.submit(prompts=["a", "b"], completions=[]).result().rewards.tolist()
        [[0.5], [nan]]
    """

    def __init__(
        self,
        reward_funcs: Sequence[Callable],
        names: Sequence[str] | None = None,
        *,
        timeout: float | int | Sequence[float | int | None] | None = None,
        max_retries: int = 2,
        backoff: float | int = 0.5,
        max_failure_rate: float | int | None = None,
        failure_window: int | None = None,
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
        timeouts: list[Any] = list(timeout) if isinstance(timeout, Sequence) else [timeout] * len(self.names)
        if len(timeouts) != len(self.names) or any(t is not None and t <= 0 for t in timeouts):
            raise ValueError(
                f"`timeout` must be a positive number of seconds, or one per reward function. Found {timeout}. "
                "Pass None for no limit."
            )
        if max_failure_rate is not None or failure_window is not None:
            warnings.warn(
                "`max_failure_rate` and `failure_window` have no effect any more. Read `ScoredBatch.failures`, or set "
                "the trainer's `max_reward_failure_rate`.",
                FutureWarning,
                stacklevel=2,
            )
        self.max_retries, self.backoff = max_retries, backoff
        self.failed: set[str] = set()
        """Names of the functions that failed on a sample so far; each was warned of."""
        self._closed = False
        self._callers = list(map(RewardCaller, self.reward_funcs, self.names, timeouts))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=on_this_device(self._run), name="reward-scorer", daemon=True)
        self._thread.start()

    def submit(
        self,
        *,
        prompts: list[str],
        completions: Any,
        images: Float[Tensor, "B 3 H W"] | None = None,
        columns: dict[str, list] | None = None,
        group_ids: list[int] | None = None,
        **trl_keywords: Any,
    ) -> "Future[ScoredBatch]":
        """Start scoring a batch and return at once, from any thread and before earlier batches are done.

        Args:
            prompts, completions, images: As in [`Reward`]; `images` go to the functions that take them.
            columns (`dict[str, list]`, *optional*): Every other column of the dataset, one entry per sample.
            group_ids (`list[int]`, *optional*): The group of each sample, its own by default; for rewards of whole groups.
            trl_keywords: `trainer_state`, `log_extra`, `log_metric` and what else TRL passes.

        Returns:
            A future, whose `result()` raises ValueError for a function that returns no proper list of numbers, and
            RewardLoadError or ImportError for one that cannot work at all.
        """
        if self._closed:
            raise RuntimeError("The scorer must be open to take a batch. Found it closed. Make a new RewardScorer.")
        keywords = {"completion_ids": None, **(columns or {}), **trl_keywords}
        keywords |= {"prompts": prompts, "completions": completions}
        groups = list(range(len(prompts))) if group_ids is None else group_ids
        return asyncio.run_coroutine_threadsafe(self._score_batch(keywords, images, groups), self._loop)

    def check(self) -> None:
        """Call the `check()` of every reward that has one, which loads its weights or asks its server.

        A RewardLoadError names the reward and what is wrong, in one line.
        """
        for func, name in zip(self.reward_funcs, self.names, strict=True):
            check = getattr(func, "check", None)
            try:
                if callable(check):
                    check()
            except (RewardLoadError, ImportError, KeyboardInterrupt):
                raise
            except BaseException as error:
                found = describe(error)
                raise RewardLoadError(f"The reward `{name}` must pass its `check()`. Found {found}.") from error

    def offload(self) -> None:
        """Call the `offload()` of every reward that has one, unless a call of it that was given up still runs."""
        for func, caller in zip(self.reward_funcs, self._callers, strict=True):
            if callable(offload := getattr(func, "offload", None)) and not caller.stuck:
                offload()

    def close(self) -> None:
        """Stop the background threads; batches under way are cancelled. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        for caller in self._callers:
            caller.close()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10)
        if self._thread.is_alive():  # an async function that catches its cancellation
            logger.warning("A reward did not stop within 10 s; its thread is left to end by itself.")

    def __enter__(self) -> "RewardScorer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._loop.run_forever()
        finally:  # however it ended: nobody may wait for a batch any more
            self._closed = True
            for task in (tasks := asyncio.all_tasks(self._loop)):
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.close()

    async def _score_batch(self, keywords: dict[str, Any], images: Tensor | None, groups: list[int]) -> ScoredBatch:
        calls = [self._score(caller, keywords, images, groups) for caller in self._callers]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)  # all of them end, whichever raises
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        scored: dict[str, Any] = dict(zip(self.names, outcomes, strict=True))
        rewards = [rewards for rewards, _ in scored.values()]
        return ScoredBatch(
            rewards=torch.tensor(rewards, dtype=torch.float32).reshape(len(rewards), len(groups)).T.contiguous(),
            seconds={name: seconds for name, (_, seconds) in scored.items()},
            failures={name: rewards.failures for name, (rewards, _) in scored.items()},
        )

    async def _score(
        self, caller: "RewardCaller", keywords: dict[str, Any], images: Tensor | None, groups: list[int]
    ) -> tuple[RewardList, float]:
        """One function's rewards of a batch, and its seconds."""
        size = len(groups)
        if wants_whole_groups(caller.func):
            keywords = keywords | {"group_ids": groups}
        if images is not None and takes_images(caller.func):
            keywords = keywords | {"images": images}
        edits_nothing = type(caller.func).__module__.startswith("trl_apex.")
        own = functools.partial(dict if edits_nothing else own_copies, keywords)
        seconds: list[float] = []
        try:
            returned = await retrying(lambda: caller.call(own, seconds), self.max_retries, self.backoff)
        except (RewardLoadError, ImportError):
            raise
        except Exception as error:  # a reward function may fail in any way
            rewards = RewardList([math.nan] * size, [describe(error)] * size)
        else:
            rewards = as_numbers(returned, caller.name, size)
        if rewards.failures and caller.name not in self.failed:
            self.failed.add(caller.name)
            warnings.warn(
                f"The reward `{caller.name}` failed on {rewards.failures} of {size} samples: "
                f"{next(filter(None, rewards.errors))}. They count as missing. Further failures are counted in "
                f"`reward_failures/{caller.name}` without a warning.",
                RewardFailureWarning,
                stacklevel=2,
            )
        return rewards, math.fsum(seconds)


class RewardTimeoutError(RuntimeError):
    """A reward function did not return in time."""


class RewardCaller:
    """Calls one reward function from one event loop: a blocking one in a thread of its own, one call at a time.

    A call that overruns its time is given up, but its thread, a daemon, cannot be stopped: later calls wait for it, no longer
    than their own timeout, since a network that runs in two threads at once gives wrong numbers.
    """

    def __init__(self, func: Callable, name: str, timeout: float | int | None = None) -> None:
        self.func, self.name, self.timeout, self.is_async = func, name, timeout, is_async(func)
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        self._turn = asyncio.Lock()
        self._overrun: asyncio.Future | None = None
        self._thread = threading.Thread(target=on_this_device(self._work), name=f"reward-{name}", daemon=True)

    @property
    def stuck(self) -> bool:
        """Whether a call that was given up still runs."""
        return self._overrun is not None and not self._overrun.done()

    async def call(self, keywords: Callable[[], dict[str, Any]], seconds: list[float] | None = None) -> Any:
        """Call the function with what `keywords()` makes in the function's own thread; adds its time to `seconds`."""
        if self.is_async:
            return await _timed(_contained(self.func, keywords), self.timeout, seconds)
        return await self.run(lambda: self.func(**keywords()), self.timeout, seconds)

    async def run(
        self, action: Callable[[], Any], timeout: float | int | None = None, seconds: list[float] | None = None
    ) -> Any:
        """Run something that blocks, such as the reward's `load`, in the function's thread, once that is free."""
        async with self._turn:
            if self._overrun is not None:
                await asyncio.wait([self._overrun], timeout=timeout)
                if self.stuck:
                    raise RewardTimeoutError(f"an earlier call is still running after another {timeout:g} s")
            return await _timed(self._in_thread(action), timeout, seconds)

    def close(self) -> None:
        """Let the thread end after its present call."""
        self._waiting.put(None)

    async def _in_thread(self, action: Callable[[], Any]) -> Any:
        if self._thread.ident is None:
            self._thread.start()
        done: Future = Future()
        done.set_running_or_notify_cancel()
        self._waiting.put((action, done))
        outcome = asyncio.wrap_future(done)
        try:
            returned, error = await asyncio.shield(outcome)
        except asyncio.CancelledError:
            self._overrun = outcome
            raise
        if error is not None:
            raise error if isinstance(error, Exception) else RuntimeError(f"the function raised {describe(error)}")
        return returned

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            action, done = item
            outcome: tuple[Any, BaseException | None]
            try:
                outcome = action(), None
            except BaseException as error:  # handed to the waiting side, whatever it is
                outcome = None, error
            done.set_result(outcome)
            del item, action, done, outcome  # a batch of images


async def _timed(call: Awaitable, timeout: float | int | None, seconds: list[float] | None) -> Any:
    started, limit = time.perf_counter(), asyncio.timeout(timeout)
    try:
        async with limit:
            return await call
    except TimeoutError as error:
        if not limit.expired():  # the function's own
            raise
        raise RewardTimeoutError(f"no answer within {timeout:g} s") from error
    finally:
        if seconds is not None:
            seconds.append(time.perf_counter() - started)


async def _contained(func: Callable, keywords: Callable[[], dict[str, Any]]) -> Any:
    """Await an async function; what would end the event loop becomes an ordinary error, a cancellation by us does not."""
    try:
        return await func(**keywords())
    except Exception:
        raise
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        raise RuntimeError(f"the function raised {describe(error)}") from error


def on_this_device(target: Callable[[], Any]) -> Callable[[], Any]:
    """`target` for another thread, to run there with this thread's current device; a new thread's own is the first."""
    if not torch.accelerator.is_available():
        return target
    index = torch.accelerator.current_device_index()

    def run() -> Any:
        torch.accelerator.set_device_index(index)
        return target()

    return run


async def retrying(call: Callable[[], Awaitable[Returned]], max_retries: int, backoff: float | int) -> Returned:
    """Await `call()`, and again, at most `max_retries` times, after a connection that failed or did not answer.

    That is a `ConnectionError` or `TimeoutError`, or what httpx, requests, aiohttp and urllib raise for one. Waits `backoff`,
    `2 backoff`, `4 backoff` ... seconds, longer where the other side asks for it, and at most 30.
    """
    for attempt in range(max_retries):
        try:
            return await call()
        except Exception as error:
            if not _of_connection(error):
                raise
            asked = error.retry_after if isinstance(error, TransientRewardError) else None
            await asyncio.sleep(min(max(backoff * 2**attempt, asked or 0.0), LONGEST_WAIT))
    return await call()


def _of_connection(error: BaseException) -> bool:
    kinds: tuple[Any, ...] = (ConnectionError, TimeoutError)
    for module, names in CONNECTION_ERRORS.items():
        if library := sys.modules.get(module):  # if it is not loaded, nothing can raise its errors
            kinds += tuple(getattr(library, name) for name in names)
    return isinstance(error, kinds) or isinstance(getattr(error, "reason", None), kinds)  # urllib wraps them


def own_copies(value: Any) -> Any:
    """A copy that shares nothing that is likely to be edited in place: lists, dicts, PIL images, tensors and arrays."""
    if type(value) in (list, tuple):
        return type(value)(map(own_copies, value))
    if type(value) is dict:
        return {key: own_copies(item) for key, item in value.items()}
    if isinstance(value, (Image.Image, np.ndarray, set, bytearray)):
        return value.copy()
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value


def reward_name(func: Callable) -> str:
    """The objective name of a reward function: its `__name__`, else its class's; that of what a `partial` wraps."""
    while isinstance(func, functools.partial):
        func = func.func
    name = getattr(func, "__name__", None)
    return name if isinstance(name, str) and not isinstance(func, torch.nn.Module) else type(func).__name__


def is_async(func: Callable) -> bool:
    """Whether a call returns a coroutine."""
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


def takes_images(func: Callable) -> bool:
    """Whether a function takes the keyword `images`, by name or among `**kwargs`."""
    try:
        parameters = inspect.signature(func).parameters
    except (TypeError, ValueError):
        return False
    return "images" in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def as_numbers(returned: Any, name: str, size: int) -> RewardList:
    """What the reward `name` returned for `size` samples: floats, NaN for missing, and the cause of each failure.

    Raises:
        ValueError: If there is not one number or None per sample.

    Example:
        >>> as_numbers([1, None, math.inf], "ocr", 3), as_numbers([1, None, math.inf], "ocr", 3).errors
        ([1.0, nan, nan], [None, None, 'the reward is inf'])
    """
    try:
        values = returned.tolist() if hasattr(returned, "tolist") else returned
    except Exception as error:  # a tensor whose numbers cannot be had, or any object's own
        raise ValueError(
            f"The reward `{name}` must return numbers or None. Found a {type(returned).__name__} that cannot be read: "
            f"{describe(error)}. Return a list of floats."
        ) from error
    if not isinstance(values, list | tuple) or len(values) != size:
        found = f"{len(values)}" if isinstance(values, list | tuple) else f"a {type(returned).__name__}"
        raise ValueError(
            f"The reward `{name}` must return one number or None per sample, {size} here. Found {found}. "
            "Return a list as long as `prompts`."
        )
    errors = getattr(returned, "errors", None)
    rewards = RewardList([_as_number(value, name) for value in values])
    if isinstance(errors, list) and len(errors) == size:
        rewards.errors = list(errors)
    for i, reward in enumerate(rewards):
        if abs(reward) > LARGEST:
            rewards[i], rewards.errors[i] = math.nan, rewards.errors[i] or f"the reward is {reward:g}"
    return rewards


def _as_number(value: Any, name: str) -> float:
    try:
        if not isinstance(value, (str, bytes)):
            return math.nan if value is None else float(value)
    except OverflowError:
        return math.inf
    except Exception:  # `__float__` may raise anything
        pass
    raise ValueError(
        f"The reward `{name}` must return numbers or None. Found {reprlib.repr(value)} of type {type(value).__name__}. "
        "Convert it, or return None for a sample without a reward."
    )


def numbered_names(names: list[str], warn: bool = False) -> list[str]:
    """The names with the repeated ones numbered, since priorities and logs are kept by name.

    Example:
        >>> numbered_names(["short", "short", "ocr", "short_2"])
        ['short', 'short_3', 'ocr', 'short_2']
    """
    result: list[str] = []
    for name in names:
        new, number = name, 1
        while new in result or (new != name and new in names):
            number += 1
            new = f"{name}_{number}"
        result.append(new)
    if warn and result != names:
        warnings.warn(
            f"Reward names should differ, since priorities and logs are kept by name. Found {names}, named {result} here. "
            "Give each reward its own `name=` (or a function its own `__name__`).",
            UserWarning,
            stacklevel=3,
        )
    return result
