"""The plain loop of `examples/plain_loop.py` with the noise of the trainer, phases to time, and single parts exchanged."""

import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _bench import Phases
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from plain_loop import PlainLoop, Text, Work, lora

from trl_apex.aggregation.normalize import group_rows
from trl_apex.aggregation.rules import sum_then_normalize
from trl_apex.diffusion.rollout import INITIAL_NOISE, STEP_NOISE, keyed_noise

__all__ = ["ExchangedLoop", "Parts", "Work", "lora"]


@dataclass(frozen=True)
class Parts:
    """Parts of the loop that are exchanged; by default none."""

    cache_prompts: bool = False  # encoded once, before the first iteration
    encode_distinct: bool = False  # of equal prompts in a batch, one is encoded
    separate_guidance: bool = False  # one forward per branch: slower, as some scripts do it
    rewards_last: bool = False  # scored after all sampling, not beside it: slower, as some scripts do it
    timesteps_at_once: int = 1
    window: range | None = None  # the stochastic, trained steps; None for all but the last
    shared_prefix: bool = False  # one start per group, and the steps before the window once
    half_precision: bool = False  # the frozen base in bfloat16
    compiled: bool = False


def static_rule(rewards: Tensor, groups: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The package's own rule: the last digits of another would differ where a group's rewards hardly do."""
    return sum_then_normalize(rewards, torch.ones(rewards.shape[1]), group_rows(groups))[1], {}


class AfterSampling:
    """Starts its calls only when the first result is waited for."""

    def __init__(self, thread: ThreadPoolExecutor):
        self.thread = thread

    def submit(self, *call: Any) -> "AfterSampling":
        later = AfterSampling(self.thread)
        later.call = call
        return later

    def result(self) -> Any:
        future: Future = self.thread.submit(*self.call)
        return future.result()


class ExchangedLoop(PlainLoop):
    """The plain loop, comparable with the trainer, with `parts` exchanged and its phases timed."""

    def __init__(self, pipeline: Any, rewards: list, prompts: list[str], work: Work, parts: Parts, seed: int):
        self.parts = parts
        self.phases = Phases()
        self.cache: dict[str, Text] = {}
        self.alike = 1  # how many rows of the steps before the window are one and the same
        if parts.half_precision:
            pipeline.transformer.to(torch.bfloat16)
        if parts.compiled:
            for block in pipeline.transformer.transformer_blocks:
                block.compile()
        super().__init__(pipeline, rewards, prompts, work, static_rule, seed)
        self.window = parts.window or self.window
        if parts.rewards_last:
            self.thread = AfterSampling(self.thread)
        if parts.cache_prompts:
            self.cache = {prompt: super(ExchangedLoop, self).encode([prompt]) for prompt in dict.fromkeys(prompts)}

    @property
    def network(self) -> Any:
        return self.pipeline.transformer

    def iteration(self, number: int = 0) -> None:
        self.phases.start()
        super().iteration(number)

    def close(self) -> None:
        """Nothing is open."""

    def encode(self, prompts: list[str]) -> Text:
        if self.cache:
            rows = [self.cache[prompt] for prompt in prompts]
            text = torch.cat([embeds for embeds, _ in rows]), torch.cat([pooled for _, pooled in rows])
        elif self.parts.encode_distinct:
            distinct = list(dict.fromkeys(prompts))
            embeds, pooled = super().encode(distinct)
            place = torch.tensor([distinct.index(prompt) for prompt in prompts])
            text = embeds[place], pooled[place]
        else:
            text = super().encode(prompts)
        self.phases.mark("encode")
        return text

    def noise(self, number: int, samples: range) -> tuple[Tensor, Tensor]:
        group, shared = self.work.group, self.parts.shared_prefix
        starts = [(self.seed, INITIAL_NOISE, number, i // group if shared else i) for i in samples]
        draws = [(self.seed, STEP_NOISE, number, i) for i in samples]
        return keyed_noise(starts, self.shape), keyed_noise(draws, (len(self.window), *self.shape))

    def sample(self, text: Text, number: int, samples: range) -> tuple[Tensor, Tensor, Tensor]:
        # How many rows are one and the same before the window: a group, or the part of it in this batch.
        alike = min(self.work.group, len(samples)) if self.parts.shared_prefix and self.window.start else 1
        self.alike = alike
        found = super().sample(text, number, samples)
        self.phases.mark("rollout")
        return found

    def velocity(self, x: Tensor, step: Tensor, text: Text) -> Tensor:
        if not self.model.training and self.alike > 1 and int(step[0]) < self.window.start:
            every = self.alike
            found = self._guided(x[::every], step[::every], (text[0][::every], text[1][::every]))
            return found.repeat_interleave(every, 0)
        return self._guided(x, step, text)

    def _guided(self, x: Tensor, step: Tensor, text: Text) -> Tensor:
        if not self.parts.separate_guidance:
            return super().velocity(x, step, text)
        none = [value.expand(len(x), *value.shape[1:]) for value in self.no_text]
        without, conditional = (self.forward(x, self.timesteps[step], *branch) for branch in (none, text))
        return without + self.work.guidance * (conditional - without)

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.work.samples, self.work.batch):
            for first in range(0, len(self.window), self.parts.timesteps_at_once):
                last = min(first + self.parts.timesteps_at_once, len(self.window))
                images = torch.arange(start, min(start + self.work.batch, self.work.samples))
                image, position = torch.cartesian_prod(images, torch.arange(first, last)).unbind(1)
                yield image, position

    def update(self, text: Text) -> None:
        self.phases.mark("rollout")  # until the last reward
        super().update(text)
        self.phases.stop("update")
