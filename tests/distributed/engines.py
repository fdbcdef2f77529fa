"""Every shipped accelerate configuration, read by accelerate's own launcher, as the environment of CPU processes."""

import os
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"
SHARDED = ("zero3", "zero3_offload", "fsdp2")
OTHERS = ("zero1", "zero2", *SHARDED)
ENGINES = ("ddp", *OTHERS)
STAGE = {"zero3_offload": "zero3"}


def parse(name: str, world: int | None = None):
    """What `accelerate launch --config_file {name}.yaml` makes of a configuration.

    Returns:
        the launcher's arguments, and the environment variables that it would set.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    flags = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--main_process_port", "0"]
    if world is not None:
        flags += ["--num_processes", str(world)]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*flags, "train.py"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        env = prepare_deepspeed_cmd_env(args)[1]
    elif args.multi_gpu or args.use_fsdp:
        env = prepare_multi_gpu_env(args)
    else:
        env = prepare_simple_launcher_cmd_env(args)[1]
    return args, {key: value for key, value in env.items() if os.environ.get(key) != value and key != "PYTHONPATH"}


def environment(name: str, world: int = 2) -> dict[str, str]:
    """Environment of a rank that runs `{name}.yaml` on the CPU in float32."""
    args, env = parse(name, world)
    env = {key: value for key, value in env.items() if key.startswith(("ACCELERATE_", "FSDP_", "OMP"))}
    env |= {"ACCELERATE_MIXED_PRECISION": "no", "ENGINE": name, "TORCH_EXTENSIONS_DIR": f"/nonexistent/{name}"}
    if args.use_deepspeed:
        env["DS_ACCELERATOR"] = "cpu"
    elif args.use_fsdp:
        env["ACCELERATE_TORCH_DEVICE"] = "cpu"
    else:
        env["ACCELERATE_USE_CPU"] = "true"
    return env


def on_cpu() -> None:
    """In a rank, before the arguments are made: let an engine that wants a GPU start without one."""
    name = os.environ.get("ENGINE", "ddp")
    if name.startswith("zero"):
        import deepspeed
        from accelerate.utils import DeepSpeedPlugin

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
        make = DeepSpeedPlugin.__post_init__

        def post_init(plugin):
            make(plugin)
            config = plugin.hf_ds_config.config
            config["zero_force_ds_cpu_optimizer"] = False  # would be compiled
            config["zero_optimization"] |= {  # the defaults are buffers for GPUs
                "reduce_bucket_size": 100_000,
                "stage3_prefetch_bucket_size": 50_000,
                "stage3_param_persistence_threshold": 1_000,
                "stage3_max_reuse_distance": 100_000,
            }

        DeepSpeedPlugin.__post_init__ = post_init
    elif name.endswith("fsdp2"):
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
