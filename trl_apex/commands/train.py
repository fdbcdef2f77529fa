"""`trl-apex train`."""

import logging
import shlex
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

HELP = """usage: trl-apex train --config FILE.yaml [--ARGUMENT VALUE ...]

Trains a text-to-image model on several rewards. A YAML file holds arguments by name; flags override it.

  --model NAME              hub id or folder of a diffusers pipeline, or 'tiny'
  --dataset NAME            .json, .jsonl, .csv, .parquet or .txt file of prompts, folder, hub id, or 'tiny'
  --rewards NAME [NAME ...] ocr pickscore deqa aesthetic clip_score image_reward hpsv2 vlm_judge remote
                            jpeg_compressibility jpeg_incompressibility, 'name(key=value)', module:attribute
  --output_dir DIR          where checkpoints, adapter, logs and report go
  --lora_r N                rank of the adapter; 0 trains all weights
  --num_generations N       images per prompt in a group
  --max_steps N             optimizer steps
  --resume_from_checkpoint true|DIR
                            continue an interrupted run
  --help-all                every argument, with its default

Ctrl-C finishes the iteration and saves a checkpoint; a second Ctrl-C stops at once.
On several devices: accelerate launch -m trl_apex train --config FILE.yaml"""


def run(arguments: list[str]) -> None:
    """Train, save the adapter, and write the report."""
    if "-h" in arguments or "--help" in arguments:
        print(HELP)
        return
    from .train_arguments import TrainParser

    parser = TrainParser()
    if "--help-all" in arguments:
        parser.print_help()
        return
    model, data, rewards, lora, config = parser.read(arguments)
    for name, value in (("model", model.model), ("dataset", data.dataset), ("rewards", rewards.rewards)):
        if not value:
            raise ValueError(f"`{name}` must be given. Found nothing. Pass --{name}, or set it in the YAML file.")
    train(model, data, rewards, lora, config, "trl-apex train " + shlex.join(arguments))


def train(model: Any, data: Any, rewards: Any, lora: Any, config: Any, command: str) -> None:
    """Build the trainer, run it, and leave a complete run directory.

    Args:
        model, data, rewards, lora: the groups of `train_arguments`.
        config ([`APEXConfig`]): the trainer's own arguments.
        command (`str`): the command line, for the record and for what to type to resume.
    """
    from ..trainer.apex_trainer import APEXTrainer
    from .interrupt import InterruptCallback, Interrupted
    from .prompt_files import load_prompts
    from .rewards_by_name import load_rewards
    from .run_record import recorded_warnings, write_arguments

    functions, monitors = load_rewards(rewards.rewards), load_rewards(rewards.monitors)
    prompts = load_prompts(data.dataset, data.dataset_split, data.dataset_config, data.prompt_column, data.max_prompts)
    held_out = data.eval_dataset and load_prompts(data.eval_dataset, data.eval_split, None, data.prompt_column)
    resume = config.resume_from_checkpoint
    resume = True if str(resume).lower() == "true" else resume
    interrupt = InterruptCallback()
    trainer = APEXTrainer(
        _pipeline(model, config),
        functions,
        config,
        prompts,
        held_out or None,
        callbacks=[interrupt],
        peft_config=_lora_config(lora),
        monitor_funcs=monitors,
    )
    interrupt.trainer = trainer
    main_process = trainer.is_world_process_zero()
    output_dir = Path(config.output_dir)
    if main_process:
        groups = [vars(group) for group in (model, data, rewards, lora)]
        write_arguments(output_dir, {k: v for group in groups for k, v in group.items()} | config.to_dict(), command)
    with recorded_warnings(output_dir if main_process else None, trainer), interrupt.listening():
        try:
            trainer.train(resume_from_checkpoint=resume)
        except RuntimeError:
            if not interrupt.requested:
                raise
            raise Interrupted(output_dir, command) from None
    trainer.save_state()
    trainer.save_model(_internal_call=True)  # before the report, and not uploaded yet
    if main_process:
        from ..report import write_report

        try:
            report = f"Report: {write_report([output_dir])}"
        except Exception as error:  # a page about the run must not make the run fail
            logger.warning("The report could not be written: %s: %s", type(error).__name__, error)
            report = f"No report; `trl-apex report {output_dir}` tries again."
    if config.push_to_hub:
        trainer.save_model()  # uploads, the report included
    if main_process:
        print(f"Saved in {output_dir}. {report}")


def _pipeline(model: Any, config: Any) -> Any:
    if model.model == "tiny":
        from ..tiny.world import load_tiny_pipeline

        return load_tiny_pipeline()
    if model.revision:
        config.model_init_kwargs = {**(config.model_init_kwargs or {}), "revision": model.revision}
    return model.model


def _lora_config(lora: Any) -> Any:
    if lora.lora_r < 0:
        raise ValueError(
            f"`lora_r` must not be negative. Found {lora.lora_r}. Use e.g. 32, or 0 to train all weights."
        )
    if lora.lora_r == 0:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha or 2 * lora.lora_r,
        target_modules=lora.lora_target_modules,
        use_rslora=lora.use_rslora,
    )
