"""A trainer of two prompts at 16 pixels, for tests of adapters and saved weights."""

import sys
from pathlib import Path

from datasets import Dataset

from trl_apex import DiffusionGRPOConfig, DiffusionGRPOTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "diffusion"))
from families import build, draw, longest, plain_call, sources  # noqa: F401

PROMPTS = Dataset.from_dict({"prompt": ['a red circle with "CAT"', 'a blue star with "HUT"']})


def redness(images, **columns):
    return images[:, 0].mean((1, 2)).tolist()


def make(pipeline, output_dir, peft_config=None, adapter=None, dataset=PROMPTS, rewards=(redness,), **overrides):
    values = {
        "output_dir": str(output_dir), "use_cpu": True, "per_device_train_batch_size": 4, "num_generations": 2,
        "num_inference_steps": 2, "guidance_scale": 1.0, "height": 16, "width": 16, "max_sequence_length": 12,
        "max_steps": 1, "learning_rate": 3e-2, "save_strategy": "no", "disable_tqdm": True, "seed": 5,
        "eval_num_inference_steps": 2, "gradient_accumulation_steps": 1, "logging_steps": 1,
    }  # fmt: skip
    args = DiffusionGRPOConfig(**{**values, **overrides})
    return DiffusionGRPOTrainer(
        pipeline, list(rewards), args, dataset, dataset, peft_config=peft_config, adapter=adapter
    )


def distance(first, second):
    return (first - second).abs().max().item()
