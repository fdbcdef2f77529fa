"""Fine-tune all weights of Stable Diffusion 3.5's transformer with APEX, sharded by DeepSpeed ZeRO.

    accelerate launch --config_file examples/accelerate_configs/zero2.yaml examples/train_sd35_full.py \\
        --config examples/configs/sd35_full_zero2.yaml

    python examples/train_sd35_full.py --config examples/configs/sd35_full_tiny.yaml     # the same code, on a CPU

The result is a whole transformer in diffusers' format in `output_dir`. For a model that differs from the base by an
adapter of some megabytes, use `train_sd35_apex.py`, which this script shares its set-up with.
"""

from dataclasses import replace

from train_sd35_apex import ScriptArguments, train
from trl import TrlParser

from trl_apex import APEXConfig, APEXTrainer


def main(arguments: list[str] | None = None) -> APEXTrainer:
    script, args = TrlParser((ScriptArguments, APEXConfig)).parse_args_and_config(arguments)
    return train(replace(script, lora_r=0), args)  # no adapter: every weight of the transformer trains


if __name__ == "__main__":
    main()
