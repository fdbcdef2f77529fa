"""Fine-tune Stable Diffusion 3.5 on OCR, PickScore, DeQA and aesthetics at once: LoRA and APEX.

    accelerate launch examples/train_sd35_apex.py --config examples/configs/sd35_lora_1gpu_24gb.yaml
    accelerate launch examples/train_sd35_apex.py --config examples/configs/sd35_lora_1gpu_80gb.yaml
    accelerate launch --num_processes 8 examples/train_sd35_apex.py --config examples/configs/sd35_lora_8gpu.yaml

    python examples/train_sd35_apex.py --config examples/configs/sd35_tiny.yaml     # the same code, on a CPU

A flag overrides the file: `--learning_rate 1e-4`. Every option of `APEXConfig` is a flag; unknown ones are errors.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from peft import LoraConfig
from trl import TrlParser

from trl_apex import AestheticReward, APEXConfig, APEXTrainer, DeQAReward, OCRReward, PickScoreReward


@dataclass
class ScriptArguments:
    """What the trainer's configuration does not hold."""

    model: str = field(
        default="stabilityai/stable-diffusion-3.5-medium",
        metadata={"help": "Hub id or folder of a pipeline; 'tiny' for the one that ships with the package."},
    )
    prompts: str = field(
        default="tiny",
        metadata={
            "help": "Hub id, or a .json, .csv, .parquet or .txt file, of a dataset with a `prompt` column (a .txt file "
            "holds one prompt a line); 'tiny' for the tiny world's."
        },
    )
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    deqa: str | None = field(
        default=None,
        metadata={
            "help": "Where DeQA-Score runs: URL of a reward server, or a model id or folder; None leaves it out."
        },
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the newest checkpoint in `output_dir`."})
    lora_r: int = field(default=32, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale of the adapter, times its rank."})


def load_prompts(name: str, split: str) -> Dataset:
    """A dataset with a `prompt` column; its other columns reach the rewards by name."""
    if name == "tiny":
        from trl_apex.tiny.prompts import tiny_prompts

        return tiny_prompts("train", 64)
    kinds = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
    kind = kinds.get(Path(name).suffix)
    dataset = load_dataset(kind, data_files=name, split="train") if kind else load_dataset(name, split=split)
    return dataset.rename_column("text", "prompt") if kind == "text" else dataset


def load_rewards(model: str, deqa: str | None) -> list[Any]:
    """The paper's four objectives; on the tiny world's weights where its pipeline trains."""
    if model == "tiny":
        from trl_apex.tiny.world import tiny_rewards

        return tiny_rewards()
    rewards: list[Any] = [OCRReward(), PickScoreReward(), AestheticReward()]
    if deqa is not None and deqa.startswith(("http://", "https://")):
        from trl_apex.rewards import RemoteReward

        rewards.append(RemoteReward(deqa, "deqa"))
    elif deqa is not None:
        rewards.append(DeQAReward(deqa))
    return rewards


def main(arguments: list[str] | None = None) -> APEXTrainer:
    script, args = TrlParser((ScriptArguments, APEXConfig)).parse_args_and_config(arguments)
    model: Any = script.model
    if model == "tiny":
        from trl_apex.tiny.world import load_tiny_pipeline

        model = load_tiny_pipeline()
    trainer = APEXTrainer(
        model=model,
        reward_funcs=load_rewards(script.model, script.deqa),
        args=args,
        train_dataset=load_prompts(script.prompts, script.split),
        # Without target_modules the adapter goes on the attention layers of both streams, as in Flow-GRPO.
        peft_config=LoraConfig(r=script.lora_r, lora_alpha=script.lora_alpha, init_lora_weights="gaussian"),
    )
    trainer.train(resume_from_checkpoint=script.resume or None)
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub()
    return trainer


if __name__ == "__main__":
    main()
