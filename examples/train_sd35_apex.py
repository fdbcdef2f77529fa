"""Fine-tune Stable Diffusion 3.5 on OCR, PickScore, DeQA and aesthetics at once: LoRA and APEX.

    accelerate launch examples/train_sd35_apex.py --config examples/configs/sd35_lora_1gpu_24gb.yaml
    accelerate launch examples/train_sd35_apex.py --config examples/configs/sd35_lora_1gpu_80gb.yaml
    accelerate launch --num_processes 8 examples/train_sd35_apex.py --config examples/configs/sd35_lora_8gpu.yaml

    python examples/train_sd35_apex.py --config examples/configs/sd35_tiny.yaml     # the same code, on a CPU

A flag overrides the file: `--learning_rate 1e-4`. Every option of `APEXConfig` is a flag; unknown ones are errors. The
files also serve `trl-apex train` and `trl-apex plan`.
"""

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from trl import TrlParser

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.prompts import load_prompts
from trl_apex.rewards.registry import load_rewards


@dataclass
class ScriptArguments:
    """What the trainer's configuration does not hold."""

    model: str = field(
        default="stabilityai/stable-diffusion-3.5-medium",
        metadata={"help": "Hub id or folder of a pipeline; 'tiny' for the one that ships with the package."},
    )
    dataset: str = field(
        default="tiny",
        metadata={
            "help": "Hub id, or a .json, .csv, .parquet or .txt file, of a dataset with a `prompt` column (a .txt file "
            "holds one prompt a line); 'tiny' for the tiny world's."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Prompts to evaluate on, as `dataset`; None for no evaluation."}
    )
    eval_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    rewards: list[str] = field(
        default_factory=lambda: ["ocr", "pickscore", "aesthetic"],
        metadata={"help": "Objectives: names, or names with arguments; 'tiny' for the four of the tiny world."},
    )
    monitors: list[str] = field(
        default_factory=list, metadata={"help": "Rewards that evaluation reports and training never sees."}
    )
    lora_r: int = field(default=32, metadata={"help": "Rank of the adapter; 0 trains every weight instead."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scale of the adapter; None for twice the rank."})


def train(script: ScriptArguments, args: APEXConfig) -> APEXTrainer:
    """Train, save and, with `push_to_hub`, upload."""
    model: Any = script.model
    if model == "tiny":
        from trl_apex.tiny.world import load_tiny_pipeline

        model = load_tiny_pipeline()
    # Without target_modules the adapter goes on the attention layers of both streams, as in Flow-GRPO.
    alpha = script.lora_alpha or 2 * script.lora_r
    adapter = LoraConfig(r=script.lora_r, lora_alpha=alpha, init_lora_weights="gaussian") if script.lora_r else None
    trainer = APEXTrainer(
        model=model,
        # A reward of your own is any function that takes `prompts` and `completions`; columns of the dataset reach it by name.
        reward_funcs=load_rewards(script.rewards),
        args=args,
        train_dataset=load_prompts(script.dataset, script.dataset_split),
        eval_dataset=load_prompts(script.eval_dataset, script.eval_split) if script.eval_dataset else None,
        peft_config=adapter,
        monitor_funcs=load_rewards(script.monitors),
    )
    resume = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if str(resume).lower() == "true" else resume)
    trainer.save_model()  # with `push_to_hub`, uploads it as well
    return trainer


def main(arguments: list[str] | None = None) -> APEXTrainer:
    script, args = TrlParser((ScriptArguments, APEXConfig)).parse_args_and_config(arguments)
    return train(script, args)


if __name__ == "__main__":
    main()
