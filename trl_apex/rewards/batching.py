"""Join waiting requests of one reward into batches."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from trl_apex.rewards.calling import as_numbers, describe, is_async, takes_images
from trl_apex.rewards.images import to_pil
from trl_apex.rewards.lane import Lane


class QueueFull(Exception):
    """As many images wait for a reward as may."""


@dataclass
class Job:
    """One request's samples.

    Args:
        prompts (`list[str]`): The prompts.
        images (`list[PIL.Image.Image]` or `Tensor` of shape `[B, 3, H, W]`): Pictures, or floats in [0, 1].
        columns (`dict[str, list]`): Further columns.
    """

    prompts: list[str]
    images: list[Image.Image] | Tensor
    columns: dict[str, list]
    done: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def kind(self) -> tuple:
        """Jobs of one kind can be scored in one call."""
        form = tuple(self.images.shape[1:]) if isinstance(self.images, Tensor) else None
        return form, tuple(sorted(self.columns))


@dataclass(frozen=True)
class Scored:
    """One request's rewards, the cause of each missing one, and the seconds that its batch took."""

    rewards: list[float]
    errors: list[str | None]
    seconds: float


class RequestBatcher:
    """Scores the requests for one reward, waiting ones of several clients together.

    Args:
        name (`str`): Name of the objective.
        func (`Callable`): The reward function, blocking or async.
        max_batch (`int`, *optional*, defaults to `64`): Images joined into one call.
        wait (`float`, *optional*, defaults to `0.002`): Seconds to wait for further requests.
        max_queue (`int`, *optional*, defaults to `512`): Images that may wait.
        side_by_side (`int`, *optional*, defaults to `8`): Calls at the same time, for an async function.
    """

    def __init__(
        self,
        name: str,
        func: Callable,
        max_batch: int = 64,
        wait: float | int = 0.002,
        max_queue: int = 512,
        side_by_side: int = 8,
    ) -> None:
        self.name, self.func, self.max_batch, self.wait, self.max_queue = name, func, max_batch, wait, max_queue
        self.lane = None if is_async(func) else Lane(name)
        self.waiting = 0
        self._gate = asyncio.Semaphore(side_by_side if self.lane is None else 1)
        self._queue: asyncio.Queue[Job] = asyncio.Queue()
        self._held: Job | None = None
        self._calls: set[asyncio.Task] = set()
        self._worker: asyncio.Task | None = None

    async def score(self, job: Job) -> Scored:
        """Queue a job and wait for its rewards.

        Raises:
            QueueFull: If too many images wait already.
        """
        if self.waiting + len(job.prompts) > self.max_queue:
            raise QueueFull
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        self.waiting += len(job.prompts)
        try:
            self._queue.put_nowait(job)
            return await job.done
        finally:
            self.waiting -= len(job.prompts)

    async def load(self) -> None:
        """Load the reward's weights in its own thread."""
        load = getattr(self.func, "load", None)
        if callable(load) and self.lane is not None:
            async with self.lane.turn(None):
                await self.lane.run(load, {}, None)

    async def close(self) -> None:
        """Stop; jobs that still wait are cancelled."""
        tasks = [task for task in (self._worker, *self._calls) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.lane is not None:
            self.lane.close()

    async def _work(self) -> None:
        while True:
            await self._gate.acquire()
            jobs = await self._next_jobs()
            call = asyncio.create_task(self._score_jobs(jobs))
            self._calls.add(call)
            call.add_done_callback(self._finished)

    def _finished(self, call: asyncio.Task) -> None:
        self._calls.discard(call)
        self._gate.release()

    async def _next_jobs(self) -> list[Job]:
        """The jobs that have waited longest and fit into one call."""
        first, self._held = self._held or await self._queue.get(), None
        jobs, size = [first], len(first.prompts)
        deadline = time.monotonic() + self.wait
        while size < self.max_batch:
            try:
                job = await asyncio.wait_for(self._queue.get(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                break
            if job.kind != first.kind or size + len(job.prompts) > self.max_batch:
                self._held = job
                break
            jobs.append(job)
            size += len(job.prompts)
        return jobs

    async def _score_jobs(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if not job.done.done()]  # the others' clients have gone
        if not jobs:
            return
        started = time.perf_counter()
        try:
            rewards, errors = await self._call(join(jobs))
        except Exception as error:
            if len(jobs) > 1:  # one client's samples must not cost another's
                for job in jobs:
                    await self._score_jobs([job])
                return
            size = len(jobs[0].prompts)
            rewards, errors = [float("nan")] * size, [describe(error)] * size
        seconds = time.perf_counter() - started
        for job in jobs:
            size = len(job.prompts)
            if not job.done.done():
                job.done.set_result(Scored(rewards[:size], errors[:size], seconds))
            rewards, errors = rewards[size:], errors[size:]

    async def _call(self, job: Job) -> tuple[list[float], list[str | None]]:
        keywords: dict[str, Any] = {**job.columns, "prompts": job.prompts, "completion_ids": None}
        if isinstance(job.images, Tensor):
            keywords["completions"] = to_pil(job.images)
            if takes_images(self.func):
                keywords["images"] = job.images
        else:
            keywords["completions"] = job.images
        if self.lane is None:
            returned = await self.func(**keywords)
        else:
            async with self.lane.turn(None):
                returned = await self.lane.run(self.func, keywords, None)
        return as_numbers(returned, self.name, len(job.prompts))


def join(jobs: list[Job]) -> Job:
    """One job with the samples of several of one kind."""
    if len(jobs) == 1:
        return jobs[0]
    images: Any = [job.images for job in jobs]
    tensors = isinstance(images[0], Tensor)
    return Job(
        prompts=[prompt for job in jobs for prompt in job.prompts],
        images=torch.cat(images) if tensors else [image for batch in images for image in batch],
        columns={key: [value for job in jobs for value in job.columns[key]] for key in jobs[0].columns},
    )
