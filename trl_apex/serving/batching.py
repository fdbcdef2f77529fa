"""One reward of a server: the requests that wait for it, joined into calls, and its state."""

import asyncio
import math
import warnings
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from trl_apex.redact import describe
from trl_apex.rewards.base import Reward, RewardList, to_arrays, wants_whole_groups
from trl_apex.rewards.scoring import RewardCaller, RewardTimeoutError, as_numbers, takes_images

ASYNC_CALLS = 8  # of one async reward at the same time


@dataclass(eq=False)
class Job:
    """The images of one request, arrays of shape `[H, W, 3]`, uint8 or float32, and its answer once there is one."""

    prompts: list[str]
    arrays: list[np.ndarray]
    columns: dict[str, list]
    floats: bool  # whether the reward may get the images as a float tensor too
    done: asyncio.Future[RewardList] = field(init=False)

    @property
    def kind(self) -> tuple:
        """Jobs of one kind can be scored in one call."""
        form = (self.arrays[0].dtype, self.arrays[0].shape) if self.floats else None
        return form, tuple(sorted(self.columns))


class ServedReward:
    """One reward of the server: its state, its counters, and the requests that wait for it.

    A request that finds the reward free takes all waiting requests that fit into one call along.

    Args:
        requests (`int`): Requests whose bodies are held at a time.
        timeout (`float`): Seconds that one call may take.
        max_batch (`int`): Images joined into one call.
        batch_wait (`float`): Seconds to wait for further requests.
    """

    def __init__(
        self, name: str, func: Callable, requests: int, timeout: float | int, max_batch: int, batch_wait: float | int
    ) -> None:
        self.name, self.func = name, func
        # Requests number their groups alike, so those of a reward that compares within groups are not joined.
        self.max_batch, self.batch_wait = 0 if wants_whole_groups(func) else max_batch, batch_wait
        self.caller = RewardCaller(func, name, timeout)
        self.bodies = asyncio.Semaphore(requests)
        self.counts: Counter[str] = Counter()
        self._state = "loading"
        self._calls = asyncio.Semaphore(ASYNC_CALLS if self.caller.is_async else 1)
        self._waiting: deque[Job] = deque()

    @property
    def state(self) -> str:
        """`ready`, `loading`, or `failed: CAUSE`; a call that hangs counts as failed until it returns."""
        if self.caller.stuck:
            return f"failed: a call has not returned within {self.caller.timeout:g} s"
        return self._state

    @property
    def waiting(self) -> int:
        """Images whose requests were read and that no call has taken yet."""
        return sum(len(job.prompts) for job in self._waiting)

    def describe(self, trusted: bool) -> dict[str, str]:
        """Name and state; for a trusted client also causes, and the class with the models it names, not local paths."""
        if not trusted:
            return {"name": self.name, "state": self.state.partition(":")[0]}
        func = self.func
        sources = [str(getattr(func, key)) for key in ("model", "clip", "weights") if getattr(func, key, None)]
        model = [getattr(func, "__qualname__", type(func).__name__), *(s for s in sources if s.count("/") <= 1)]
        told = {"name": self.name, "state": self.state, "model": " ".join(model)}
        told |= {"exact": "true"} if self.exact else {}
        told |= {"whole_groups": "true"} if wants_whole_groups(func) else {}
        return told | {key: str(getattr(func, key, "")) for key in ("range", "weights_licence")}

    @property
    def exact(self) -> bool:
        """Whether the reward may read more than the bytes of an image."""
        return takes_images(self.func) and not isinstance(self.func, Reward)

    async def load(self) -> None:
        """Load the weights in the reward's own thread."""
        try:
            if callable(load := getattr(self.func, "load", None)):
                await self.caller.run(load)
            self._state = "ready"
        except Exception as error:
            self._state = f"failed: {describe(error)}"

    async def offload(self) -> None:
        """Keep the network in the CPU's memory until the next call."""
        if callable(offload := getattr(self.func, "offload", None)) and self.state == "ready":
            await self.caller.run(offload)

    async def close(self) -> None:
        """Free the memory, unless a call still runs."""
        unload = getattr(self.func, "unload", None)
        if callable(unload) and not self.caller.stuck:
            try:
                await self.caller.run(unload, timeout=10)
            except Exception as error:
                warnings.warn(f"The reward `{self.name}` did not unload: {describe(error)}", stacklevel=2)
        self.caller.close()

    async def score(self, job: Job) -> RewardList:
        """A job's rewards, NaN for missing, and the cause of each failure."""
        job.done = asyncio.get_running_loop().create_future()
        self._waiting.append(job)
        async with self._calls:
            if job in self._waiting:
                await asyncio.sleep(self.batch_wait)
                if self._waiting:
                    await self._call(self._next_jobs())
        return await job.done

    def _next_jobs(self) -> list[Job]:
        """The jobs that have waited longest and fit into one call."""
        jobs = [self._waiting.popleft()]
        size = len(jobs[0].prompts)
        while self._waiting and self._waiting[0].kind == jobs[0].kind:
            size += len(self._waiting[0].prompts)
            if size > self.max_batch:
                break
            jobs.append(self._waiting.popleft())
        return jobs

    async def _call(self, jobs: list[Job]) -> None:
        size = sum(len(job.prompts) for job in jobs)
        try:
            if self.caller.stuck:
                raise RewardTimeoutError(self.state)
            returned = await self.caller.call(lambda: self._keywords(jobs))
            scored = as_numbers(returned, self.name, size)
        except asyncio.CancelledError:  # the server stops
            for job in jobs:
                job.done.cancel()
            raise
        except Exception as error:
            if len(jobs) > 1 and not isinstance(error, RewardTimeoutError):
                for job in jobs:  # one client's images must not cost another's
                    await self._call([job])
                return
            scored = RewardList([math.nan] * size, [describe(error)] * size)
        end = 0
        for job in jobs:
            start, end = end, end + len(job.prompts)
            if not job.done.done():
                job.done.set_result(RewardList(scored[start:end], scored.errors[start:end]))

    def _keywords(self, jobs: list[Job]) -> dict[str, Any]:
        arrays = [array for job in jobs for array in job.arrays]
        keywords: dict[str, Any] = {key: [x for job in jobs for x in job.columns[key]] for key in jobs[0].columns}
        keywords |= {"prompts": [prompt for job in jobs for prompt in job.prompts], "completion_ids": None}
        rounded = arrays[0].dtype == np.uint8
        if jobs[0].floats and (self.exact or (takes_images(self.func) and not rounded)):
            images = np.empty((len(arrays), 3, *arrays[0].shape[:2]), np.float32)
            for image, array in zip(images, arrays, strict=True):
                np.divide(array.transpose(2, 0, 1), 255 if rounded else 1, out=image, casting="unsafe")
            keywords["images"] = torch.from_numpy(images)
        if not rounded:
            arrays = [to_arrays(torch.from_numpy(array.copy())[None].permute(0, 3, 1, 2))[0] for array in arrays]
        return keywords | {"completions": [Image.fromarray(array) for array in arrays]}
