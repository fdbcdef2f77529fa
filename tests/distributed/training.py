"""One small training run, as every rank of a test makes it."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from engines import on_cpu
from families import build
from peft import LoraConfig
from tiny_runs import tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.distributed import full_trainable_weights
from trl_apex.tiny.world import load_tiny_pipeline

PROMPTS = [
    f'a {colour} {shape} with " C A T "' for colour in ("red", "blue") for shape in ("circle", "square", "cross")
]
GLOBAL_BATCH = 8
BLOCKS = 2


def red(images, **kwargs):
    """Mean of the red channel."""
    return images[:, 0].mean((1, 2)).tolist()


def red_circles(images, prompts, **kwargs):
    """Mean of the red channel where the prompt asks for a circle; the images of the other prompts do not differ."""
    return [float(i[0].mean()) if "circle" in prompt else 0.5 for i, prompt in zip(images, prompts, strict=True)]


def dark(images, **kwargs):
    """Darkness, in a unit of its own."""
    return (-10 * images.mean((1, 2, 3))).tolist()


def make_trainer(
    output_dir: str,
    *,
    lora: bool = True,
    rewards=(red, dark),
    trained: bool = False,
    family: str | None = None,
    eval_prompts=None,
    columns: dict[str, list] | None = None,
    **overrides: Any,
) -> APEXTrainer:
    """The trainer of these tests: two groups of four images, however many processes share them."""
    # Before the arguments: ZeRO-3 would cut it up.
    pipeline = build(family) if family else load_tiny_pipeline() if trained else tiny_pipeline(BLOCKS)
    on_cpu()
    values: dict[str, Any] = {
        "output_dir": output_dir,
        "per_device_train_batch_size": GLOBAL_BATCH // int(os.environ["WORLD_SIZE"]),
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
        "adam_epsilon": 1e-5,  # Adam moves an element whose gradient is rounding alone by the whole learning rate
        "warmup_iterations": 1,
        "ramp_iterations": 1,
        "ddp_backend": "gloo",
        "dataloader_pin_memory": False,
        "use_cpu": os.environ.get("ACCELERATE_USE_CPU") == "true",
    }
    return APEXTrainer(
        pipeline,
        list(rewards),
        APEXConfig(**(values | overrides)),
        Dataset.from_dict({"prompt": PROMPTS, "kind": [prompt.split()[1] for prompt in PROMPTS], **(columns or {})}),
        eval_dataset=Dataset.from_dict({"prompt": eval_prompts}) if eval_prompts else None,
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
    return {name: value.float().numpy() for name, value in full_trainable_weights(trainer.model).items()}


def _count_gathers(trainer) -> list[int]:
    """The list will hold, for each rollout, how many all-gathers of tensors it made."""
    counted: list[int] = []
    rollout = trainer._generate_and_score_completions

    class Gathers(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted[-1] += "allgather" in func.__name__ or "all_gather" in func.__name__
            return func(*args, **(kwargs or {}))

    def generate(inputs):
        counted.append(0)
        with Gathers():
            return rollout(inputs)

    trainer._generate_and_score_completions = generate
    return counted


def train(
    rank: int,
    output_dir: str,
    *,
    resume=None,
    save: str | None = None,
    evaluate: bool = False,
    evaluate_first: bool = False,
    count_gathers: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Train, and return what a test compares between engines and numbers of processes."""
    trainer = make_trainer(output_dir, **kwargs)
    torch.manual_seed(1000 + rank)  # ranks agree on nothing that they need not agree on
    seen: list[dict[str, Any]] = []
    compute = trainer._compute_advantages

    def record(rewards, group_ids):
        advantages, normalized = compute(rewards, group_ids)
        priorities = dict(trainer.aggregator.priorities)
        seen.append({"rewards": rewards.tolist(), "advantages": advantages.tolist(), "priorities": priorities})
        return advantages, normalized

    trainer._compute_advantages = record
    gathers = _count_gathers(trainer) if count_gathers else None
    first = trainer.evaluate() if evaluate_first else None
    trainer.train(resume_from_checkpoint=resume)
    result = {
        "world": PartialState().num_processes,
        "engine": engine_of(trainer),
        "iterations": seen,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "weights": weights_of(trainer),
        "aggregator": trainer.aggregator.state_dict(),
        "step": trainer.state.global_step,
        "resumed_from": trainer.resumed_from,
        "gathers": gathers,
        "output_dir": output_dir,
    }
    result["evaluation_before"] = first
    if evaluate:
        result["evaluation"] = trainer.evaluate()
        records = trainer.eval_records
        result["evaluated"] = [(r["row"], r["prompt"], r["rewards"]) for r in records]
    if save:
        trainer.save_model(save)
    result["files"] = sorted(str(p.relative_to(output_dir)) for p in Path(output_dir).rglob("*") if p.is_file())
    return result
