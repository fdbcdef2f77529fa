"""One script, two trainers: the import is the only line that changes.

    python examples/switch_to_apex.py            # APEX
    python examples/switch_to_apex.py --static   # the same run with TRL's static sum of rewards

In a script of your own, replace

    from trl_apex import DiffusionGRPOConfig as Config, DiffusionGRPOTrainer as Trainer

by

    from trl_apex import APEXConfig as Config, APEXTrainer as Trainer

and, for language models, `from trl import GRPOConfig, GRPOTrainer` by
`from trl_apex import APEXGRPOConfig as GRPOConfig, APEXGRPOTrainer as GRPOTrainer`.
"""

from argparse import ArgumentParser
from typing import Any

from peft import LoraConfig

from trl_apex.tiny.prompts import tiny_prompts
from trl_apex.tiny.world import load_tiny_pipeline


def redness(images, **kwargs):
    """Loud: its spread within a group is many times the other's."""
    return (100 * (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))).tolist()


def brightness(images, **kwargs):
    return images.mean((1, 2, 3)).tolist()


def main(arguments: list[str] | None = None) -> Any:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--static", action="store_true", help="TRL's rule instead of APEX")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--output_dir", default="runs/switch")
    options = parser.parse_args(arguments)

    Config: Any
    Trainer: Any
    if options.static:
        from trl_apex import DiffusionGRPOConfig as Config
        from trl_apex import DiffusionGRPOTrainer as Trainer
    else:
        from trl_apex import APEXConfig as Config
        from trl_apex import APEXTrainer as Trainer

    trainer = Trainer(
        model=load_tiny_pipeline(),
        reward_funcs=[redness, brightness],
        args=Config(
            output_dir=options.output_dir,
            use_cpu=True,
            max_steps=options.max_steps,
            num_generations=8,
            generation_batch_size=32,
            per_device_train_batch_size=32,
            num_inference_steps=6,
            sde_window_size=3,
            gradient_accumulation_steps=3,
            guidance_scale=1.0,
            max_sequence_length=12,  # tokens of a prompt; the default is for the full-size model
            epsilon=1e-3,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=tiny_prompts("train", 32),
        peft_config=LoraConfig(r=8, lora_alpha=16),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()
