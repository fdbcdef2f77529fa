"""Fine-tune all weights of Stable Diffusion 3.5's transformer with APEX, sharded by DeepSpeed ZeRO.

    accelerate launch --config_file examples/accelerate_configs/zero2.yaml examples/train_sd35_full.py \\
        --config examples/configs/sd35_full_zero2.yaml

    python examples/train_sd35_full.py --config examples/configs/sd35_full_tiny.yaml     # the same code, on a CPU

The result is a whole transformer in diffusers' format in `output_dir`. For a model that differs from the base by an
adapter of some megabytes, use `train_sd35_apex.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from trl import TrlParser

from trl_apex import AestheticReward, APEXConfig, APEXTrainer, OCRReward, PickScoreReward


@dataclass
class ScriptArguments:
    """What the trainer's configuration does not hold."""

    model: str = field(
        default="stabilityai/stable-diffusion-3.5-medium",
        metadata={"help": "Hub id or folder of a pipeline; 'tiny' for the one that ships with the package."},
    )
    prompts: str = field(
        default="tiny",
        metadata={"help": "A .txt file with one prompt a line, a .json, .csv or .parquet file, or 'tiny'."},
    )
    deqa_url: str | None = field(
        default=None, metadata={"help": "Reward server that runs DeQA-Score; None leaves it out."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the newest checkpoint in `output_dir`."})


def load_prompts(name: str) -> Dataset:
    if name == "tiny":
        from trl_apex.tiny.prompts import tiny_prompts

        return tiny_prompts("train", 64)
    kind = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}[Path(name).suffix]
    dataset = load_dataset(kind, data_files=name, split="train")
    return dataset.rename_column("text", "prompt") if kind == "text" else dataset


def load_rewards(model: str, deqa_url: str | None) -> list[Any]:
    if model == "tiny":
        from trl_apex.tiny.world import tiny_rewards

        return tiny_rewards()
    rewards: list[Any] = [OCRReward(), PickScoreReward(), AestheticReward()]
    if deqa_url is not None:
        from trl_apex.rewards import RemoteReward

        rewards.append(RemoteReward(deqa_url, "deqa"))
    return rewards


def main(arguments: list[str] | None = None) -> APEXTrainer:
    script, args = TrlParser((ScriptArguments, APEXConfig)).parse_args_and_config(arguments)
    model: Any = script.model
    if model == "tiny":
        from trl_apex.tiny.world import load_tiny_pipeline

        model = load_tiny_pipeline()
    trainer = APEXTrainer(
        model=model,
        reward_funcs=load_rewards(script.model, script.deqa_url),
        args=args,
        train_dataset=load_prompts(script.prompts),
        # No peft_config: every weight of the transformer trains.
    )
    trainer.train(resume_from_checkpoint=script.resume or None)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
