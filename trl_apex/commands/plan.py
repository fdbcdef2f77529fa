"""`trl-apex plan`."""

HELP = """usage: trl-apex plan --config FILE.yaml [--ARGUMENT VALUE ...]

Memory by part and rank, and compute per iteration, of the configuration that `trl-apex train` would run, without loading
weights. Takes the arguments of `trl-apex train`."""


def run(arguments: list[str]) -> None:
    """Print the plan of a configuration; a plan that cannot fit is an error."""
    if "-h" in arguments or "--help" in arguments:
        print(HELP)
        return
    import torch

    from .train_arguments import TrainParser

    if not torch.cuda.is_available() and not any("use_cpu" in a.replace("-", "_") for a in arguments):
        arguments = [*arguments, "--use_cpu", "true"]  # a plan for a GPU is made where there may be none
    model, _, rewards, lora, config = TrainParser().read(arguments)
    if not model.model:
        raise ValueError("`model` must be given. Found nothing. Pass --model, or set it in the YAML file.")

    from ..evaluation.plan import plan_text

    print(
        plan_text(
            model=model.model, revision=model.revision, lora=lora, config=config, num_rewards=len(rewards.rewards)
        )
    )
