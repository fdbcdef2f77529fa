"""APEX in TRL's trainer of language models, as every rank of a test makes it."""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from engines import on_cpu

from trl_apex import APEXGRPOConfig, APEXGRPOTrainer


def train_language_model(rank: int, output_dir: str, steps: int = 3, resume: str | None = None) -> dict[str, Any]:
    """Two groups of four completions over two processes: each rank holds one group."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))
    from tiny_language_models import tiny_causal_lm, tiny_tokenizer

    def loud(completions, **kwargs):
        return [10.0 * text.split().count("a") for text in completions]

    def quiet(completions, **kwargs):
        return [0.01 * text.split().count("b") for text in completions]

    on_cpu()
    args = APEXGRPOConfig(
        output_dir=output_dir,
        bf16=False,
        ddp_backend="gloo",
        per_device_train_batch_size=4,
        generation_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        learning_rate=3e-3,
        max_steps=steps,
        save_steps=2.0,
        logging_steps=1.0,
        disable_tqdm=True,
        report_to="none",
        gradient_checkpointing=False,
        warmup_iterations=1,
        ramp_iterations=1,
    )
    data = Dataset.from_dict({"prompt": ["say c", "say d", "say e", "say f"] * 4})
    trainer = APEXGRPOTrainer(tiny_causal_lm(), [loud, quiet], args, data, processing_class=tiny_tokenizer())
    gathered: list[tuple[torch.Tensor, torch.Tensor]] = []
    used: list[torch.Tensor] = []

    class Recording(type(trainer.aggregator)):  # type: ignore[misc]
        def __call__(self, rewards, group_ids, **kwargs):
            result = super().__call__(rewards, group_ids, **kwargs)
            gathered.append((rewards.clone(), result[0].clone()))
            return result

    trainer.aggregator.__class__ = Recording
    generate = trainer._generate_and_score_completions

    def recording(inputs):
        output = generate(inputs)
        used.append(output["advantages"].clone())
        return output

    trainer._generate_and_score_completions = recording
    trainer.train(resume_from_checkpoint=resume)
    return {
        "world": PartialState().num_processes,
        "rewards": [rewards.tolist() for rewards, _ in gathered],
        "advantages": [advantages.tolist() for _, advantages in gathered],
        "used": [values.tolist() for values in used],
        "state": trainer.aggregator.state_dict(),
    }
