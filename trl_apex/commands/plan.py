"""`trl-apex plan`."""

import argparse

HELP = """usage: trl-apex plan --config FILE.yaml [--ARGUMENT VALUE ...]

Memory by part and GPU, and compute per iteration, of the configuration that `trl-apex train` would run, without loading
weights. Takes the arguments of `trl-apex train`, and

  --gpus N            GPUs; generation_batch_size counts the images of all of them
  --zero_stage 0..3   of DeepSpeed; 0, the default, for none
  --gpu_memory_gb X   of one GPU; a plan that does not fit is an error that tells what to change
  --num_prompts N     distinct prompts, for the size of their embeddings
  --rewards_gb X      memory of reward networks on each GPU

--model may be sd3.5-medium, sd3.5-large, flux.1-dev, sd1.5 or sdxl where the Hub cannot be reached."""


def run(arguments: list[str]) -> None:
    """Print the plan of a configuration; a plan that cannot fit is an error."""
    if "-h" in arguments or "--help" in arguments:
        print(HELP)
        return
    parser = argparse.ArgumentParser(prog="trl-apex plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--zero_stage", type=int, default=0)
    parser.add_argument("--gpu_memory_gb", type=float)
    parser.add_argument("--num_prompts", type=int, default=0)
    parser.add_argument("--rewards_gb", type=float, default=0.0)
    given, arguments = parser.parse_known_args(arguments)

    import torch

    from .train_arguments import TrainParser, _keys

    if not torch.cuda.is_available():  # a plan for a GPU is made where there may be none
        file = arguments[arguments.index("--config") + 1] if "--config" in arguments[:-1] else None
        named = {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in arguments}
        named |= set(_keys(file)) if file else set()
        if "use_cpu" not in named:
            arguments = [*arguments, "--use_cpu", "true", *([] if named & {"bf16", "fp16"} else ["--bf16", "true"])]
    model, _, _, lora, config = TrainParser().read(arguments)
    if not model.model:
        raise ValueError("`model` must be given. Found nothing. Pass --model, or set it in the YAML file.")
    name = model.model
    if name == "tiny":
        from ..tiny.world import weights_path

        name = str(weights_path("pipeline"))

    from ..plan import plan_text

    print(
        plan_text(
            name,
            config,
            revision=model.revision,
            lora_rank=lora.lora_r,
            lora_targets=lora.lora_target_modules,
            gpus=given.gpus,
            zero_stage=given.zero_stage,
            gpu_memory_gb=given.gpu_memory_gb,
            prompts=given.num_prompts,
            rewards_gb=given.rewards_gb,
        )
    )
