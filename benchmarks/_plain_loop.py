"""GRPO for a Stable Diffusion 3 pipeline as one plain loop, in Flow-GRPO's order of work, and with single parts exchanged.

Read from that project's `train_sd3.py`: the prompts of each sampling batch are encoded one per image; both branches of the
guidance go through one forward, in rollout and update; every step is stochastic; images become PIL images and go to a thread
that calls the rewards one after another while the next batch is sampled; the update takes one batch and one timestep at a
time, on a float32 base with LoRA. Nothing here is imported from the package's trainer, rollout, policy or loss, but for the
noise, which is keyed so that trajectories can be compared, and the static rule that turns rewards into advantages, whose
last digits would differ where a group's rewards hardly do.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn

from trl_apex.aggregation.normalize import group_rows
from trl_apex.aggregation.rules import sum_then_normalize
from trl_apex.rollout.noise import INITIAL_NOISE, STEP_NOISE, keyed_noise

CLIP = 1e-4
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
TARGETS += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]


@dataclass(frozen=True)
class Work:
    """What one iteration computes, whoever computes it."""

    groups: int
    group: int
    batch: int
    side: int
    steps: int = 10
    guidance: float = 4.5
    noise_level: float = 0.7
    rank: int = 32
    text: int = 12
    learning_rate: float = 3e-4

    @property
    def samples(self) -> int:
        return self.groups * self.group


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


def lora(work: Work) -> LoraConfig:
    return LoraConfig(
        r=work.rank, lora_alpha=2 * work.rank, init_lora_weights="gaussian", target_modules=list(TARGETS)
    )


class PlainLoop:
    """One run: an adapted transformer, an optimizer, and `iteration(number)`.

    Args:
        pipeline (`StableDiffusion3Pipeline`): the adapter is put on its transformer.
        rewards (`list`): called one after another.
        prompts (`list[str]`): dealt to iterations in order.
        work, parts: what is computed, and how.
        seed (`int`): of adapter and noise.
    """

    def __init__(self, pipeline: Any, rewards: list, prompts: list[str], work: Work, parts: Parts, seed: int):
        self.pipeline, self.rewards, self.prompts = pipeline, rewards, prompts
        self.work, self.parts, self.seed = work, parts, seed
        base = pipeline.transformer.requires_grad_(False)
        if parts.half_precision:
            base.to(torch.bfloat16)
        if parts.compiled:
            for block in base.transformer_blocks:
                block.compile()
        torch.manual_seed(seed)
        self.model: nn.Module = get_peft_model(base, lora(work))
        if parts.half_precision:  # the adapter stays in float32
            for parameter in self.model.parameters():
                parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=work.learning_rate, weight_decay=1e-4, eps=1e-15)
        pipeline.scheduler.set_timesteps(work.steps)
        self.sigmas, self.timesteps = pipeline.scheduler.sigmas.float(), pipeline.scheduler.timesteps.float()
        self.window = parts.window or range(work.steps - 1)
        size = work.side // pipeline.vae_scale_factor
        self.shape = (base.config.in_channels, size, size)
        self.executor = ThreadPoolExecutor(1)
        self.mark: Callable[[str], None] = lambda phase: None
        self.latents = self.log_probs = torch.empty(0)  # of the last iteration, to compare
        self.advantages = torch.empty(0)
        self.negative = self._encode([""])
        self._cache: dict[str, tuple[Tensor, Tensor]] = {}
        if parts.cache_prompts:
            for prompt in dict.fromkeys(prompts):
                self._cache[prompt] = self._encode([prompt])

    def iteration(self, number: int) -> None:
        """Rollout, rewards, and one optimizer step over all rows."""
        work = self.work
        first = number * work.groups
        prompts = [prompt for prompt in self.prompts[first : first + work.groups] for _ in range(work.group)]
        kept, pending, texts, images = [], [], [], []
        self.model.eval()
        for start in range(0, work.samples, work.batch):
            batch = prompts[start : start + work.batch]
            text = self._text(batch)
            self.mark("encode")
            decoded, latents, log_probs = self._sample(text, number, range(start, start + len(batch)))
            self.mark("rollout")
            kept.append((latents, log_probs))
            texts.append(text)
            images.append((batch, decoded))
            if not self.parts.rewards_last:
                pending.append(self.executor.submit(self._score, batch, decoded))
        if self.parts.rewards_last:
            pending = [self.executor.submit(self._score, *pair) for pair in images]
        rewards = torch.cat([future.result() for future in pending])
        self.mark("rollout")
        self.latents = torch.cat([latents for latents, _ in kept])
        self.log_probs = torch.cat([log_probs for _, log_probs in kept])
        groups = group_rows(torch.arange(work.samples) // work.group)
        _, self.advantages = sum_then_normalize(rewards, torch.ones(rewards.shape[1]), groups)
        self._update(torch.cat([e for e, _ in texts]), torch.cat([p for _, p in texts]))
        self.mark("update")

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.work.text
            )
        return embeds, pooled

    def _text(self, batch: list[str]) -> tuple[Tensor, Tensor]:
        if self._cache:
            rows = [self._cache[prompt] for prompt in batch]
            return torch.cat([e for e, _ in rows]), torch.cat([p for _, p in rows])
        if not self.parts.encode_distinct:
            return self._encode(batch)
        distinct = list(dict.fromkeys(batch))
        embeds, pooled = self._encode(distinct)
        rows = torch.tensor([distinct.index(prompt) for prompt in batch])
        return embeds[rows], pooled[rows]

    def _velocity(self, x: Tensor, step: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """The guided prediction for rows `x` at schedule positions `step`."""
        (embeds, pooled), rows = text, len(x)
        free, free_pooled = (value.expand(rows, *value.shape[1:]) for value in self.negative)
        time = self.timesteps[step]
        if self.parts.separate_guidance:
            without, conditional = self._forward(x, time, free, free_pooled), self._forward(x, time, embeds, pooled)
        else:
            both = torch.cat([free, embeds]), torch.cat([free_pooled, pooled])
            without, conditional = self._forward(torch.cat([x, x]), torch.cat([time, time]), *both).chunk(2)
        return without + self.work.guidance * (conditional - without)

    def _forward(self, x: Tensor, time: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        kind = torch.bfloat16 if self.parts.half_precision else torch.float32
        inputs = {"encoder_hidden_states": embeds.to(kind), "pooled_projections": pooled.to(kind)}
        return self.model(x.to(kind), timestep=time, return_dict=False, **inputs)[0].float()

    def _gaussian(self, x: Tensor, velocity: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the stochastic step (Flow-GRPO's)."""
        sigma, after = (self.sigmas[at].reshape(-1, 1, 1, 1) for at in (step, step + 1))
        dt = after - sigma
        s = self.work.noise_level * torch.sqrt(sigma / (1 - torch.where(sigma == 1, self.sigmas[1], sigma)))
        mean = x * (1 + s**2 / (2 * sigma) * dt) + velocity * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, s * torch.sqrt(-dt)

    @staticmethod
    def _log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        density = -((x - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
        return density.mean((1, 2, 3))

    @torch.no_grad()
    def _sample(self, text: tuple[Tensor, Tensor], number: int, samples: range) -> tuple[Tensor, Tensor, Tensor]:
        group = self.work.group
        shared = self.parts.shared_prefix
        starts = [(self.seed, INITIAL_NOISE, number, i // group if shared else i) for i in samples]
        draws = [(self.seed, STEP_NOISE, number, i) for i in samples]
        x = keyed_noise(starts, self.shape)
        noise = keyed_noise(draws, (len(self.window), *self.shape))
        kept, log_probs = [], []
        # How many rows are one and the same before the window: a group, or the part of it in this batch.
        every = min(group, len(x)) if shared and self.window.start else 1
        x = x[::every]
        for i in range(self.work.steps):
            if i == self.window.start:
                x, every = x.repeat_interleave(every, 0), 1
                kept.append(x)
            step = torch.full((len(x),), i)
            velocity = self._velocity(x, step, (text[0][::every], text[1][::every]))
            if i not in self.window:
                x = x + velocity * (self.sigmas[i + 1] - self.sigmas[i])
                continue
            mean, std = self._gaussian(x, velocity, step)
            x = mean + std * noise[:, i - self.window.start]
            kept.append(x)
            log_probs.append(self._log_prob(x, mean, std))
        vae = self.pipeline.vae
        images = vae.decode(x / vae.config.scaling_factor + (vae.config.shift_factor or 0.0), return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1), torch.stack(kept, 1), torch.stack(log_probs, 1)

    def _score(self, prompts: list[str], images: Tensor) -> Tensor:
        arrays = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        pictures = [Image.fromarray(array) for array in arrays]
        return torch.tensor([reward(prompts=prompts, completions=pictures) for reward in self.rewards]).T

    def _update(self, embeds: Tensor, pooled: Tensor) -> None:
        work, at_once, window = self.work, self.parts.timesteps_at_once, self.window
        self.model.train()
        rows = work.samples * len(window)
        for start in range(0, work.samples, work.batch):
            for first in range(0, len(window), at_once):
                own = torch.cartesian_prod(
                    torch.arange(start, start + work.batch), torch.arange(first, min(first + at_once, len(window)))
                )
                sample, position = own.unbind(1)
                step = position + window.start
                x = self.latents[sample, position]
                velocity = self._velocity(x, step, (embeds[sample], pooled[sample]))
                mean, std = self._gaussian(x, velocity, step)
                log_prob = self._log_prob(self.latents[sample, position + 1], mean, std)
                ratio = torch.exp(log_prob - self.log_probs[sample, position])
                advantages = self.advantages[sample]
                unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
                (torch.maximum(unclipped, clipped).sum() / rows).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.gradients = [parameter.grad for parameter in self.trained]
        self.optimizer.step()
        self.optimizer.zero_grad()
