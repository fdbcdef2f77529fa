"""One small training run, as every rank of a test makes it."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from engines import on_cpu
from peft import LoraConfig

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.tiny.pipeline import build_pipeline

PROMPTS = [
    f'a {colour} {shape} with " C A T "' for colour in ("red", "blue") for shape in ("circle", "square", "cross")
]
GLOBAL_BATCH = 8


def red(images, **kwargs):
    """Mean of the red channel."""
    return images[:, 0].mean((1, 2)).tolist()


def dark(images, **kwargs):
    """Darkness, in a unit of its own."""
    return (-10 * images.mean((1, 2, 3))).tolist()


def make_trainer(
    output_dir: str, *, lora: bool = True, rewards=(red, dark), trainer_class=APEXTrainer, **overrides: Any
) -> APEXTrainer:
    """The trainer of these tests: two groups of four images, however many processes share them."""
    on_cpu()
    world = int(os.environ["WORLD_SIZE"])
    values: dict[str, Any] = {
        "output_dir": output_dir,
        "per_device_train_batch_size": GLOBAL_BATCH // world,
        "generation_batch_size": GLOBAL_BATCH,
        "num_generations": 4,
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "gradient_accumulation_steps": 3,
        "max_steps": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_sequence_length": 12,
        "disable_tqdm": True,
        "bf16": False,
        "learning_rate": 1e-3 if lora else 1e-4,
        "ddp_backend": "gloo",
        "dataloader_pin_memory": False,
    }
    if os.environ.get("ACCELERATE_USE_CPU") == "true":
        values["use_cpu"] = True
    pipeline = overrides.pop("pipeline", None) or build_pipeline(0)  # before the arguments: ZeRO-3 would cut it up
    args = trainer_class.config_class(**(values | overrides))
    return trainer_class(
        pipeline,
        list(rewards),
        args,
        Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(r=4, lora_alpha=8) if lora else None,
    )


def engine_of(trainer) -> str:
    """What really wraps the model: a test that asked for an engine must have got it."""
    model = trainer.model_wrapped
    kinds = {type(module).__name__ for module in (model, getattr(model, "module", model))}
    if trainer.is_deepspeed_enabled:
        return f"zero{model.zero_optimization_stage()}"
    if any(name.startswith("FSDP") for name in kinds):
        return "fsdp2"
    if "DistributedDataParallel" in kinds:
        return "ddp"
    return "single"


def weights_of(trainer) -> dict[str, Any]:
    """Trained weights in full, by name, as numpy arrays."""
    from trl_apex.distributed import full_trainable_weights

    return {name: value.float().numpy() for name, value in full_trainable_weights(trainer.model).items()}


def train(rank: int, output_dir: str, *, resume=None, save: str | None = None, **kwargs: Any) -> dict[str, Any]:
    """Train, and return what a test compares between engines and numbers of processes."""
    torch.manual_seed(1000 + rank)  # ranks agree on nothing that they need not agree on
    trainer = make_trainer(output_dir, **kwargs)
    seen: list[dict[str, Any]] = []
    compute = trainer._compute_advantages

    def record(rewards, group_ids):
        advantages, normalized = compute(rewards, group_ids)
        priorities = dict(trainer.aggregator.priorities)
        seen.append({"rewards": rewards.tolist(), "advantages": advantages.tolist(), "priorities": priorities})
        return advantages, normalized

    trainer._compute_advantages = record
    trainer.train(resume_from_checkpoint=resume)
    if save:
        trainer.save_model(save)
    return {
        "world": PartialState().num_processes,
        "engine": engine_of(trainer),
        "iterations": seen,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "weights": weights_of(trainer),
        "aggregator": trainer.aggregator.state_dict(),
        "step": trainer.state.global_step,
        "resumed_from": trainer.resumed_from,
        "files": sorted(p.name for p in Path(output_dir).iterdir()) if Path(output_dir).is_dir() else [],
    }
