"""DDPO's two functions train every family of pipelines through the package's trainer."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from trl_apex import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_apex.prompts import dataset_from_prompt_function
from trl_apex.rewards import reward_from_ddpo

sys.path.insert(0, str(Path(__file__).parents[1] / "diffusion"))
from families import build

FLOWS = ("flux", "flux2", "flux2-klein", "qwen-image", "z-image")
TARGETS = {"sd1.5": "ddim", "sd2-v": "ddim", "sdxl": "ddim", **dict.fromkeys(FLOWS, "flow_sde")}


@pytest.mark.parametrize("name", TARGETS)
def test_two_iterations_start_on_policy_and_move_the_weights(name, tmp_path):
    words = itertools.cycle(["red", "blue"])
    seen = []

    def prompt_fn():
        word = next(words)
        return f"a {word} star", {"word": word}

    def reward_fn(images, prompts, metadata):
        seen.append((tuple(images.shape), images.min() >= 0 and images.max() <= 1, prompts, metadata))
        channel = torch.tensor([0 if row["word"] == "red" else 2 for row in metadata])
        return images.mean((2, 3))[torch.arange(len(images)), channel], {}

    config = DiffusionGRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=8, num_generations=4, generation_batch_size=8,
        num_inference_steps=4, guidance_scale=3.0, noise_level=1.0, max_sequence_length=12, height=16, width=16,
        gradient_accumulation_steps=3, max_steps=2, logging_steps=1, learning_rate=1e-2, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = DiffusionGRPOTrainer(
        build(name), reward_from_ddpo(reward_fn), config, dataset_from_prompt_function(prompt_fn, 4),
        peft_config=LoraConfig(r=2, init_lora_weights="gaussian"),
    )  # fmt: skip
    assert trainer.transition == TARGETS[name] and trainer.updates_per_iteration == 1
    before = {key: p.detach().clone() for key, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    history = trainer.state.log_history
    assert [row["ratio/max_deviation"] for row in history if "ratio/max_deviation" in row] == [0.0, 0.0]
    assert all(row["rewards/reward_fn/std"] > 0 and row["grad_norm"] > 0 for row in history if "loss" in row)
    moved = [key for key, p in trainer.model.named_parameters() if key in before and not torch.equal(p, before[key])]
    assert len(moved) == len(before)
    assert len(seen) == 2
    for shape, in_range, prompts, metadata in seen:
        assert shape == (8, 3, 16, 16) and in_range and len(prompts) == 8
        assert [f"a {row['word']} star" for row in metadata] == list(prompts)
