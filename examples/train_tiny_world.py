"""APEX on the tiny world: the four production rewards, on a CPU, in minutes.

    python examples/train_tiny_world.py                       # about a hundred updates
    python examples/train_tiny_world.py --max_steps 2         # does it run?
    python examples/train_tiny_world.py --multi_objective_aggregation sum_then_normalize

Every option of `APEXConfig` is a flag. The pipeline is a real StableDiffusion3Pipeline with 32 x 32 images and about 1.6 M
parameters, the rewards are the classes OCRReward, PickScoreReward, DeQAReward and AestheticReward on tiny weights that
ship with the package.
"""

from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from trl import TrlParser

from trl_apex import APEXConfig, APEXTrainer
from trl_apex.tiny.prompts import tiny_prompts
from trl_apex.tiny.world import load_tiny_pipeline, tiny_rewards


@dataclass
class ScriptArguments:
    """What the trainer's configuration does not hold."""

    num_prompts: int = field(default=256, metadata={"help": "Prompts to train on."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter."})
    threads: int = field(default=2, metadata={"help": "Threads of the CPU."})


DEFAULTS = {
    "output_dir": "runs/tiny_world",
    "use_cpu": True,
    "max_steps": 120,
    "learning_rate": 3e-4,
    "epsilon": 1e-3,  # clip range of a ratio of mean log-probabilities, wide for so small a latent
    "num_generations": 8,
    "generation_batch_size": 64,  # 8 prompts x 8 images an iteration
    "per_device_train_batch_size": 32,
    "num_inference_steps": 6,
    "sde_window_size": 3,  # 3 of the 6 steps are stochastic and trained
    "gradient_accumulation_steps": 3,  # 64 x 3 rows / 32 / 3 = 2 updates an iteration
    "guidance_scale": 1.0,
    "max_sequence_length": 12,  # tokens of a prompt; the default is for the full-size model
    "warmup_iterations": 6,
    "ramp_iterations": 6,
    "logging_steps": 2,
    "save_strategy": "no",
}


def main(arguments: list[str] | None = None) -> APEXTrainer:
    parser = TrlParser((ScriptArguments, APEXConfig))
    parser.set_defaults_with_config(**DEFAULTS)
    script, args = parser.parse_args_and_config(arguments)
    torch.set_num_threads(script.threads)
    trainer = APEXTrainer(
        model=load_tiny_pipeline(),
        reward_funcs=tiny_rewards(),
        args=args,
        train_dataset=tiny_prompts("train", script.num_prompts),
        peft_config=LoraConfig(r=script.lora_rank, lora_alpha=2 * script.lora_rank, init_lora_weights="gaussian"),
    )
    before = trainer.aggregator.priorities
    trainer.train()
    trainer.save_model()
    print("priorities before", before)
    print("priorities after ", trainer.aggregator.priorities)
    return trainer


if __name__ == "__main__":
    main()
