"""Rewards of your own: a function, an async function, and a class that owns a network.

    python examples/custom_reward.py --max_steps 20

Trains the tiny world's pipeline (a real StableDiffusion3Pipeline of 1.5 M parameters) on a CPU.
"""

import asyncio
from argparse import ArgumentParser
from typing import Any

import torch
from peft import LoraConfig

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.rewards import Reward
from trl_apex.tiny.prompts import tiny_prompts
from trl_apex.tiny.world import load_tiny_pipeline


def right_colour(prompts, images, colour, **kwargs):
    """A plain function. `colour` is a column of the dataset; `images` are floats in [0, 1], `completions` PIL images."""
    target = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
    scores = []
    for image, name in zip(images, colour, strict=True):
        if name not in target:
            scores.append(None)  # does not apply: masked, which is not the same as a score of 0
        else:
            saturation = image - image.mean(0, keepdim=True)
            scores.append(float((saturation * torch.tensor(target[name], device=image.device)[:, None, None]).mean()))
    return scores


async def calm(completions, log_metric, **kwargs):
    """An async function, as one would write for a judge behind an API; several of these run at the same time."""
    await asyncio.sleep(0)
    edges = [
        float(torch.tensor(list(image.convert("L").tobytes())).float().diff().abs().mean()) for image in completions
    ]
    log_metric("edges", sum(edges) / len(edges))  # shows up beside the trainer's own metrics
    return [-edge / 255 for edge in edges]


class Balance(Reward):
    """A class: loads its network at the first call, scores in batches, frees it with `.unload()`."""

    default_name = "balance"
    range = "-1 to 0, larger is better"

    def _load(self) -> torch.nn.Module:
        return torch.nn.AdaptiveAvgPool2d((1, 2)).to(self.device).eval()

    def _score(self, loaded: torch.nn.Module, images: Any, prompts: list[str], columns: dict[str, Any]):
        halves = loaded(images.mean(1, keepdim=True)).flatten(1)
        return (-(halves[:, 0] - halves[:, 1]).abs()).tolist()


def main(arguments: list[str] | None = None) -> APEXTrainer:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--output_dir", default="runs/custom_reward")
    options = parser.parse_args(arguments)
    args = APEXConfig(
        output_dir=options.output_dir,
        use_cpu=True,
        max_steps=options.max_steps,
        num_generations=8,
        generation_batch_size=32,
        per_device_train_batch_size=32,
        num_inference_steps=6,
        guidance_scale=1.0,
        max_sequence_length=12,  # tokens of a prompt; the default is for the full-size model
        gradient_accumulation_steps=5,  # 32 images x 5 trained steps = 5 micro-batches of 32 rows: one update
        epsilon=1e-3,
        logging_steps=5,
        save_strategy="no",
    )
    trainer = APEXTrainer(
        model=load_tiny_pipeline(),
        reward_funcs=[right_colour, calm, Balance(device="cpu")],
        args=args,
        train_dataset=tiny_prompts("train", 64),
        peft_config=LoraConfig(r=8, lora_alpha=16),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
