"""Training runs small enough to be killed, resumed and repeated by the dozen."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.tiny.pipeline import build_pipeline

PROMPTS = ['a red circle with "CAT"', 'a blue star with "HEN"', "a green square", 'a "LOT" of yellow']


def redness(images, **others):
    """Mean of the red channel."""
    return images[:, 0].mean((1, 2)).tolist()


def contrast(images, **others):
    """Spread of all pixels, in a unit of its own."""
    return (100 * images.std((1, 2, 3))).tolist()


def tiny_pipeline(blocks: int = 2) -> Any:
    """The tiny pipeline before training, with so many of its blocks."""
    pipeline = build_pipeline(0)
    config = pipeline.transformer.config
    if blocks != config.num_layers:
        shallow = SD3Transformer2DModel.from_config({**config, "num_layers": blocks})
        pipeline.register_modules(transformer=shallow)
    with torch.no_grad():  # a fresh head predicts next to nothing, and would hide errors
        pipeline.transformer.proj_out.weight.mul_(20)
    return pipeline


def tiny_args(output_dir: Path | str, cls: type = APEXConfig, **overrides: Any) -> Any:
    """Two groups of two images, two denoising steps, one update an iteration."""
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "generation_batch_size": 4,
        "num_generations": 2,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "max_sequence_length": 12,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_num_inference_steps": 2,
        "disable_tqdm": True,
        "seed": 3,
    }
    if issubclass(cls, APEXConfig):
        values |= {"warmup_iterations": 1, "ramp_iterations": 1, "baseline_prompts": 0}
    return cls(**{**values, **overrides})


def tiny_trainer(
    output_dir: Path | str,
    rewards: Any = (redness, contrast),
    cls: type[APEXTrainer] = APEXTrainer,
    *,
    prompts: list[str] | None = None,
    columns: dict[str, list] | None = None,
    evaluate: bool = False,
    lora: Any = True,
    pipeline: Any = None,
    monitors: Any = None,
    **overrides: Any,
) -> Any:
    """A trainer with the settings of `tiny_args`."""
    dataset = Dataset.from_dict({"prompt": PROMPTS if prompts is None else prompts, **(columns or {})})
    if lora is True:
        lora = LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian")
    return cls(
        tiny_pipeline() if pipeline is None else pipeline,
        list(rewards),
        tiny_args(output_dir, cls.config_class, **overrides),
        dataset,
        eval_dataset=dataset if evaluate else None,
        peft_config=lora,
        monitor_funcs=monitors,
    )


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def equal_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def history(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def fingerprints(trainer: Any) -> dict[str, str]:
    """A hash of each part of a run's state: bit for bit what it is."""
    optimizer = trainer.optimizer.state_dict()
    logged = [
        {key: value for key, value in entry.items() if "time" not in key and "per_second" not in key}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]
    parts = {
        "weights": weights_of(trainer),
        "optimizer": {"state": optimizer["state"], "groups": optimizer["param_groups"]},
        "schedule": trainer.lr_scheduler.state_dict(),
        "aggregator": trainer.aggregator.state_dict(),
        "average": trainer._ema.copy or [],
        "random": [random.getstate(), np.random.get_state()[1]],
        "torch_random": torch.random.get_rng_state(),
        "logged": logged,
    }
    return {name: _hash(part) for name, part in parts.items()}


def _hash(part: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().contiguous().cpu().numpy().tobytes())
        elif isinstance(value, np.ndarray):
            digest.update(value.tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            digest.update(b"[")
            for item in value:
                add(item)
        else:
            digest.update(json.dumps(value, default=str).encode())

    add(part)
    return digest.hexdigest()[:16]
