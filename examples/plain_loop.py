"""The whole method in one plain loop, from rollout to loss: GRPO with several rewards for Stable Diffusion 3.

    python examples/plain_loop.py --iterations 3

`APEXTrainer` computes the same (a benchmark compares the two before it times them) and adds what a long run needs: several
processes, checkpoints, evaluation, EMA, logs, other model families. The order of work is that of Flow-GRPO's `train_sd3.py`
(arXiv 2505.05470): one prompt encoding per image, both branches of the guidance in one forward, rewards scored in a thread
while the next batch is sampled, one timestep at a time in the update, LoRA on a frozen base.

Shapes: B images in a batch, N = groups x group images in an iteration, K rewards, W trained steps, C x H x W a latent.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn

from trl_apex import MultiObjectiveRewardAggregator

ATTENTION = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
ATTENTION += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]

Text = tuple[Tensor, Tensor]  # token embeddings and the pooled embedding


@dataclass(frozen=True)
class Work:
    """What one iteration computes."""

    groups: int  # prompts
    group: int  # images of a prompt, which are compared with one another
    batch: int  # images in a forward
    side: int  # pixels
    steps: int = 10  # denoising steps
    guidance: float = 4.5
    noise_level: float = 0.7  # how stochastic the sampling is
    rank: int = 32  # of LoRA
    text: int = 12  # tokens of a prompt
    learning_rate: float = 3e-4
    clip: float = 1e-4  # of the ratio; small, since log-probabilities are means over a latent's elements

    @property
    def samples(self) -> int:
        return self.groups * self.group


def lora(work: Work) -> LoraConfig:
    return LoraConfig(
        r=work.rank, lora_alpha=2 * work.rank, init_lora_weights="gaussian", target_modules=list(ATTENTION)
    )


class PlainLoop:
    """One run: an adapted transformer, an optimizer, and `iteration(number)`.

    Args:
        pipeline (`StableDiffusion3Pipeline`): The adapter is put on its transformer.
        rewards (`list`): Called with `prompts` and `completions` (PIL images), one after another.
        prompts (`list[str]`): Dealt to the iterations in order.
        work (`Work`): What is computed.
        aggregate (`Callable`): Rewards `[N, K]` and the group of each row to advantages `[N]` and metrics.
        seed (`int`): Of the adapter and the noise.
    """

    def __init__(
        self, pipeline: Any, rewards: list, prompts: list[str], work: Work, aggregate: Callable, seed: int = 0
    ):
        self.pipeline, self.rewards, self.prompts = pipeline, rewards, prompts
        self.work, self.aggregate, self.seed = work, aggregate, seed
        base = pipeline.transformer.requires_grad_(False)
        self.device, self.dtype = base.device, base.dtype
        torch.manual_seed(seed)
        self.model: nn.Module = get_peft_model(base, lora(work))  # the adapter is float32, whatever the base is
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=work.learning_rate, weight_decay=1e-4, eps=1e-15)
        pipeline.scheduler.set_timesteps(work.steps)
        self.sigmas = pipeline.scheduler.sigmas.float().to(self.device)  # 1 is noise, 0 is the image
        self.timesteps = pipeline.scheduler.timesteps.float().to(self.device)  # 1000 sigma
        self.window = range(work.steps - 1)  # the stochastic, trained steps: all but the last, which adds no noise
        size = work.side // pipeline.vae_scale_factor
        self.shape = (base.config.in_channels, size, size)
        self.thread = ThreadPoolExecutor(1)
        self.no_text = self.encode([""])

    def iteration(self, number: int) -> dict[str, float]:
        """Rollout, rewards, advantages, and one optimizer step over all rows."""
        work = self.work
        first = number * work.groups
        prompts = [prompt for prompt in self.prompts[first : first + work.groups] for _ in range(work.group)]

        rollouts, texts, pending = [], [], []
        self.model.eval()
        for start in range(0, work.samples, work.batch):
            batch = prompts[start : start + work.batch]
            texts.append(self.encode(batch))
            images, *rollout = self.sample(texts[-1], number, range(start, start + len(batch)))
            rollouts.append(rollout)
            pending.append(self.thread.submit(self.score, batch, images))
        self.latents, self.log_probs = (torch.cat(parts) for parts in zip(*rollouts, strict=True))
        text = torch.cat([embeds for embeds, _ in texts]), torch.cat([pooled for _, pooled in texts])

        self.scores = torch.cat([future.result() for future in pending])
        advantages, metrics = self.aggregate(self.scores, torch.arange(work.samples) // work.group)
        self.advantages = advantages.to(self.device)
        self.update(text)
        return metrics

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Text:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.work.text
        )
        return embeds, pooled

    def noise(self, number: int, samples: range) -> tuple[Tensor, Tensor]:
        """The start `[B, C, H, W]`, and the noise of the stochastic steps `[B, W, C, H, W]`."""
        draws = []
        for sample in samples:
            generator = torch.Generator().manual_seed(10**6 * (self.seed + 1) + self.work.samples * number + sample)
            draws.append(torch.randn(1 + len(self.window), *self.shape, generator=generator))
        noise = torch.stack(draws).to(self.device)
        return noise[:, 0], noise[:, 1:]

    @torch.no_grad()
    def sample(self, text: Text, number: int, samples: range) -> tuple[Tensor, Tensor, Tensor]:
        """Denoises a batch.

        Returns:
            `tuple`: images `[B, 3, side, side]` in [0, 1], the latents before and after each trained step
                `[B, W + 1, C, H, W]`, and the log-probability of each of these steps `[B, W]`.
        """
        x, noise = self.noise(number, samples)
        latents, log_probs = [x], []
        for i in range(self.work.steps):
            step = torch.full((len(x),), i, device=self.device)
            velocity = self.velocity(x, step, text)
            if i not in self.window:
                x = x + velocity * (self.sigmas[i + 1] - self.sigmas[i])  # Euler
                if i + 1 == self.window.start:
                    latents = [x]
                continue
            mean, std = self.transition(x, velocity, step)
            x = mean + std * noise[:, i - self.window.start]
            latents.append(x)
            log_probs.append(self.log_prob(x, mean, std))
        return self.decode(x), torch.stack(latents, 1), torch.stack(log_probs, 1)

    def velocity(self, x: Tensor, step: Tensor, text: Text) -> Tensor:
        """The prediction with classifier-free guidance: `v = v_none + guidance (v_text - v_none)`."""
        none = [value.expand(len(x), *value.shape[1:]) for value in self.no_text]
        embeds, pooled = (torch.cat(pair) for pair in zip(none, text, strict=True))
        time = self.timesteps[step]
        without, conditional = self.forward(torch.cat([x, x]), torch.cat([time, time]), embeds, pooled).chunk(2)
        return without + self.work.guidance * (conditional - without)

    def forward(self, x: Tensor, time: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        inputs = {"encoder_hidden_states": embeds.to(self.dtype), "pooled_projections": pooled.to(self.dtype)}
        return self.model(x.to(self.dtype), timestep=time, return_dict=False, **inputs)[0].float()

    def transition(self, x: Tensor, velocity: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a stochastic step: a Gaussian whose marginals are those of the Euler steps.

        `mean = x + (v + s^2 / (2 sigma) (x + (1 - sigma) v)) dt`, `std = s sqrt(-dt)`, `s = noise_level sqrt(sigma / (1 - sigma))`
        """
        sigma, after = (self.sigmas[at].reshape(-1, 1, 1, 1) for at in (step, step + 1))
        dt = after - sigma
        s = self.work.noise_level * torch.sqrt(sigma / (1 - torch.where(sigma == 1, self.sigmas[1], sigma)))
        mean = x * (1 + s**2 / (2 * sigma) * dt) + velocity * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, s * torch.sqrt(-dt)

    def log_prob(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Log-density of a step, the mean over the latent's elements."""
        density = -((x - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))
        return density.mean((1, 2, 3))

    def decode(self, x: Tensor) -> Tensor:
        vae = self.pipeline.vae
        x = x / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return (vae.decode(x.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def score(self, prompts: list[str], images: Tensor) -> Tensor:
        """All rewards of a batch, `[B, K]`, on the CPU."""
        arrays = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        pictures = [Image.fromarray(array) for array in arrays]
        return torch.tensor([reward(prompts=prompts, completions=pictures) for reward in self.rewards]).T

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of the update: which images, and which of the trained steps."""
        for start in range(0, self.work.samples, self.work.batch):
            images = torch.arange(start, min(start + self.work.batch, self.work.samples), device=self.device)
            for position in range(len(self.window)):
                yield images, torch.full_like(images, position)

    def update(self, text: Text) -> None:
        """One optimizer step on `mean of max(-A r, -A clip(r, 1 - clip, 1 + clip))`, `r = exp(log_prob - old_log_prob)`."""
        embeds, pooled = text
        rows, clip = self.work.samples * len(self.window), self.work.clip
        self.model.train()
        for image, position in self.micro_batches():
            x, after = self.latents[image, position], self.latents[image, position + 1]
            step = position + self.window.start
            velocity = self.velocity(x, step, (embeds[image], pooled[image]))
            mean, std = self.transition(x, velocity, step)
            ratio = torch.exp(self.log_prob(after, mean, std) - self.log_probs[image, position])
            advantage = self.advantages[image]
            loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
            (loss.sum() / rows).backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.gradients = [parameter.grad for parameter in self.trained]
        self.optimizer.step()
        self.optimizer.zero_grad()


def main(arguments: list[str] | None = None) -> PlainLoop:
    from trl_apex.tiny.prompts import tiny_prompts
    from trl_apex.tiny.world import load_tiny_pipeline, tiny_rewards

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--groups", type=int, default=4, help="prompts of an iteration")
    parser.add_argument("--group", type=int, default=4, help="images of a prompt")
    given = parser.parse_args(arguments)
    work = Work(groups=given.groups, group=given.group, batch=8, side=32, steps=6, guidance=1.5, rank=16)
    rewards = tiny_rewards()
    prompts = tiny_prompts("train", work.groups * given.iterations)["prompt"][:]
    aggregator = MultiObjectiveRewardAggregator([reward.__name__ for reward in rewards])
    loop = PlainLoop(load_tiny_pipeline(), rewards, prompts, work, aggregator)
    for number in range(given.iterations):
        loop.iteration(number)
        means = zip(aggregator.priorities, loop.scores.mean(0).tolist(), strict=True)
        print(number + 1, ", ".join(f"{name} {mean:.3f}" for name, mean in means), flush=True)
    return loop


if __name__ == "__main__":
    main()
