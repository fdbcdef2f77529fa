"""A run's state: saved to a checkpoint, checked, and loaded again.

A checkpoint `checkpoint-N` holds Trainer's files (weights, optimizer, schedule, random state, `trainer_state.json`),
`apex_state.json` with the state of this package's objects, `ema.safetensors` with `ema_decay`, `anchor.safetensors` with
`anchor_decay`, what a diffusers pipeline loads, and a manifest with the hash of each file.
"""

import json
import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from ..distributed import check_equal, failing_together, full_trainable_weights, gather_list, wait_for_all
from . import manifest
from .manifest import PARTIAL, SaveError, clear_partial, defects, saving
from .publishing import push_checkpoint
from .weights import difference, save_denoiser, save_diffusers_lora, stored_shapes

logger = logging.getLogger(__name__)

STATE_FILE, AGGREGATOR_FILE = "apex_state.json", "aggregator_state.json"
FILES_OF_0_1_0 = {
    "aggregator": AGGREGATOR_FILE,
    "population": "population_conflict.json",
    "monitor": "first_evaluation.json",
}
PROGRESS: dict[str, Any] = {
    "global_step": int,
    "max_steps": int,
    "log_history": list,
    "epoch": int | float | None,
    "best_metric": int | float | None,
    "best_global_step": int | None,
    "best_model_checkpoint": str | None,
    "stateful_callbacks": dict | None,
    "train_batch_size": int | None,
}
SETTINGS = ("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
"""Of the optimizer, whose state brings them along."""
ADAPTER, FULL = "adapter_model.safetensors", "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "optimizer.bin")


# State, to and from a directory


def save(trainer: Any, directory: str | Path, *, for_resume: bool) -> None:
    """Write a run's weights, and with `for_resume` all that [`load`] needs; every rank must call it, the main one writes.

    With `ema_decay` the files for diffusers hold the average; a run resumes from its own weights.
    """
    directory = str(directory)
    averaged = trainer._ema.save(directory)
    if for_resume:
        trainer._anchor.save(directory)
    weights = _gathered_weights(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    states = {name: owner.state_dict() for name, owner in trainer._stateful().items()}
    if trainer.args.should_save:
        shown = averaged or weights
        if isinstance(model, PeftModel):
            Trainer._save(trainer, directory, weights if for_resume else shown)
            Path(directory, "README.md").unlink(missing_ok=True)  # PEFT's, an empty form
            save_diffusers_lora(model, trainer.policy, directory, shown)
        elif for_resume:
            Trainer._save(trainer, directory, weights)
        else:
            full = {**(weights or model.state_dict()), **(averaged or {})}
            save_denoiser(model, Path(directory, trainer.policy.denoiser_name), full)
        if "aggregator" in states:  # for readers and the Hub
            Path(directory, AGGREGATOR_FILE).write_text(json.dumps(states["aggregator"], indent=1))
    if for_resume and not trainer.args.save_only_model:
        trainer._save_optimizer_and_scheduler(directory)
        trainer._save_scaler(directory)
        trainer._save_rng_state(directory)
    if for_resume and trainer.args.should_save:
        Path(directory, STATE_FILE).write_text(json.dumps(states, indent=1))
        exportable = [*trainer.callback_handler.callbacks, trainer.control]
        exportable = [owner for owner in exportable if isinstance(owner, ExportableState)]
        trainer.state.stateful_callbacks = TrainerState(stateful_callbacks=exportable).stateful_callbacks
        trainer.state.save_to_json(str(Path(directory, "trainer_state.json")))


def load(trainer: Any, checkpoint: str) -> None:
    """Give a run the state that [`save`] wrote. Trainer loads weights, scaler, random state and `trainer_state.json`."""
    with refusing_other_states(checkpoint, "optimizer.pt", "scheduler.pt"):
        Trainer._load_optimizer_and_scheduler(trainer, checkpoint)
    restore(trainer._stateful(), checkpoint)
    for copy in trainer._copies:
        copy.load(checkpoint)


def _gathered_weights(trainer: Any) -> dict[str, Tensor] | None:
    """Full weights by name, on the main process, where an engine may shard them; None where the model has them."""
    if trainer.is_fsdp_enabled:
        return trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_deepspeed_enabled:
        return None
    buffers, state = dict(trainer.model.named_buffers()), trainer.model.state_dict()
    return {n: state[n] for n in buffers.keys() & state.keys()} | full_trainable_weights(trainer.model, main_only=True)


def restore(stateful: dict[str, Any], checkpoint: str | Path) -> None:
    """Give each object its state from a checkpoint, if there is one; ValueError names the file whose state does not fit."""
    for name, (file, state) in _read_states(checkpoint).items():
        if name not in stateful:
            continue
        try:
            stateful[name].load_state_dict(state)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"{file} must hold the state of this run's {name}. Found {type(error).__name__}: {error} Take another checkpoint."
            ) from error


def _read_states(checkpoint: str | Path) -> dict[str, tuple[Path, Any]]:
    """The states in a checkpoint by name, each with the file that holds it. Version 0.1.0 wrote a file for each."""
    together = Path(checkpoint, STATE_FILE)
    if together.is_file():
        return {name: (together, state) for name, state in _read_object(together).items()}
    files = {name: Path(checkpoint, file) for name, file in FILES_OF_0_1_0.items()}
    return {name: (file, _read_object(file)) for name, file in files.items() if file.is_file()}


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError if it holds anything else."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be a JSON file. Found {error}. Take another checkpoint.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object. Found {type(content).__name__}. Take another checkpoint.")
    return content


@contextmanager
def refusing_other_states(checkpoint: str | Path, *files: str) -> Iterator[None]:
    """Turn what PyTorch and Trainer raise while they read these files into a ValueError that names them."""
    where = f"{' and '.join(files)} in {checkpoint}"
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"A checkpoint must hold tensors and numbers only. Found something else in {where}, which was not run: "
            f"{str(error).splitlines()[0]}. The file was not written by this trainer: do not use the checkpoint."
        ) from error
    except (KeyError, TypeError, AttributeError, IndexError, EOFError) as error:
        raise ValueError(
            f"{where} must hold what this run saves there. Found {type(error).__name__}: {error}. Take another checkpoint."
        ) from error


# When a run saves


def save_checkpoint(trainer: Any) -> None:
    """Write a checkpoint under `.partial/`, and move it to its place once it is complete."""
    for name, owner in trainer._stateful().items():
        check_equal(f"The state of the {name}", owner.state_dict())
    run, name = Path(trainer.args.output_dir), f"checkpoint-{trainer.state.global_step}"
    partial, final, state = run / PARTIAL / name, run / name, trainer.state
    trainer.store_flos()
    if trainer.args.should_save:
        clear_partial(run)
        best = run / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and (best.exists() or best == final):
            state.best_model_checkpoint = str(best)
    wait_for_all()
    with saving(name, run):
        save(trainer, partial, for_resume=True)
    wait_for_all()
    with failing_together(f"saving {name}"), saving(name, run):
        if trainer.args.should_save:
            world_size = trainer.accelerator.num_processes
            settings = {name: getattr(trainer.args, name) for name in (*SETTINGS, "seed")}
            manifest.finalize(partial, final, engine=trainer._engine, world_size=world_size, settings=settings)
            clear_partial(run)
            manifest.rotate(run, trainer.args.save_total_limit, state.best_model_checkpoint)
    if trainer.args.push_to_hub:
        push_checkpoint(trainer, final)


def save_before_failing(trainer: Any) -> None:
    """Save the current step of a run that is about to fail between two iterations."""
    step = trainer.state.global_step
    if trainer._scorer is None or step == 0 or step % trainer.updates_per_iteration:
        return
    saved = not defects(Path(trainer.args.output_dir, f"checkpoint-{step}"))
    if gather_list([saved])[0]:
        return
    try:
        trainer._save_checkpoint(trainer.model, None)
    except SaveError as error:
        logger.error("%s", error)


# Whether this run can resume from a checkpoint


def resume_point(trainer: Any, wanted: str | bool | None) -> str | None:
    """The valid checkpoint behind `resume_from_checkpoint`, the same on every rank; None to start anew.

    ValueError if there is none, or this run cannot go on from it.
    """
    if wanted is None or wanted is False:
        return None
    found = None
    with failing_together("the choice of a checkpoint"):
        if trainer.accelerator.is_main_process:
            found = str(manifest.to_resume_from(wanted, trainer.args.output_dir))
            check_engine(found, trainer._engine, trainer.accelerator.num_processes)
            check_state(trainer._stateful(), found)
            if trainer._engine == "ddp":
                check_weights_match(found, trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
            for copy in trainer._copies:
                copy.check(found)
            check_settings(found, trainer.args)
            clear_partial(trainer.args.output_dir)
    return gather_list([found])[0]


def check_engine(checkpoint: str | Path, engine: str, world_size: int) -> None:
    """Raise ValueError for a checkpoint that this engine ("ddp", "zero1" to "zero3", "fsdp") or number of processes cannot read."""
    facts = manifest.read(checkpoint) or {}
    saved = facts.get("engine", engine), facts.get("world_size", world_size)
    if saved[0] != engine or (engine.startswith("zero") and saved[1] != world_size):
        raise ValueError(
            "A checkpoint resumes under the engine that saved it, and of ZeRO also on as many processes: "
            f"{saved[0]} on {saved[1]}. Found {engine} on {world_size}. To go on with other settings, start a new run from its "
            f'adapter with `adapter="{checkpoint}"`, or from the fully trained weights that `save_model` wrote, loaded into '
            "the pipeline."
        )


def check_settings(checkpoint: str | Path, args: Any) -> None:
    """Raise ValueError for another optimizer than the checkpoint's; warn of another seed and of settings that it replaces."""
    saved = (manifest.read(checkpoint) or {}).get("settings", {})
    changed = {name: value for name, value in saved.items() if getattr(args, name, value) != value}
    if "optim" in changed:
        raise ValueError(
            f"A run resumes with the `optim` that its checkpoint was saved with, {saved['optim']!r}. Found {args.optim.value!r}. "
            f'Correct it, or start a new run from the adapter with `adapter="{checkpoint}"`.'
        )
    if "seed" in changed:
        logger.warning(
            "The run that saved %s had the seed %d. It goes on with %d: other prompts and other noise.",
            checkpoint, changed.pop("seed"), args.seed,
        )  # fmt: skip
    if changed:
        names = ", ".join(f"{name} {value} instead of {getattr(args, name)}" for name, value in changed.items())
        logger.warning("The optimizer goes on with the settings of %s: %s.", checkpoint, names)


def check_state(stateful: dict[str, Any], checkpoint: str | Path) -> None:
    """Raise ValueError, with the name of the file, if a checkpoint's states cannot be restored. Nothing is changed."""
    file = Path(checkpoint, "trainer_state.json")
    progress = _read_object(file)
    wrong = [name for name, kind in PROGRESS.items() if not isinstance(progress.get(name), kind)]
    wrong += [name for name in ("global_step", "epoch") if name not in wrong and (progress.get(name) or 0) < 0]
    if wrong or not all(isinstance(entry, dict) for entry in progress["log_history"]):
        raise ValueError(
            f"{file} must hold a run's steps and logs. Found no proper {', '.join(wrong) or 'log_history'}. Take another "
            "checkpoint."
        )
    try:
        TrainerState.load_from_json(str(file))
    except (TypeError, ValueError, AttributeError) as error:  # an entry that this release does not know
        raise ValueError(
            f"{file} must hold what this release of transformers reads. Found {error}. Take another checkpoint."
        ) from error
    if "aggregator" in stateful and "aggregator" not in _read_states(checkpoint):
        raise ValueError(
            f"A checkpoint of this trainer must hold the state of the aggregator, in {STATE_FILE} or, from version 0.1.0, "
            f"{AGGREGATOR_FILE}. Found none in {checkpoint}. It was saved by another trainer: load its adapter as the "
            "model and start anew instead of resuming."
        )
    before = {name: owner.state_dict() for name, owner in stateful.items()}
    try:
        restore(stateful, checkpoint)
    finally:
        for name, owner in stateful.items():
            owner.load_state_dict(before[name])


def check_weights_match(checkpoint: str | Path, model: nn.Module) -> None:
    """Raise ValueError for a checkpoint of one process or DDP whose weights are not those of `model`, by name and shape.

    Trainer would load what fits and go on, and it would take a pickle where there is one.
    """
    adapter = isinstance(model, PeftModel)
    file = Path(checkpoint, ADAPTER if adapter else FULL)
    present = [name for name in (ADAPTER, FULL, *PICKLED) if Path(checkpoint, name).exists()]
    if present != [file.name]:
        raise ValueError(
            f"A checkpoint must hold what is trained here, {'an adapter' if adapter else 'all weights'}, in {file.name} alone. "
            f"Found {', '.join(present) or 'none'} in {checkpoint}. It was saved with another `peft_config`, or something else "
            "put files there: do not use it."
        )
    wanted = get_peft_model_state_dict(model) if adapter else model.state_dict()
    differs = difference(stored_shapes(file), {name: list(value.shape) for name, value in wanted.items()})
    if differs:
        raise ValueError(
            f"A checkpoint must be of the same model and adapter. Found {differs} in {file}. Use the settings that it was saved "
            "with, or start anew."
        )
    if isinstance(model, PeftModel):  # an adapter's scale is in none of its weights
        config: Any = model.peft_config[model.active_adapter]
        settings = file.with_name("adapter_config.json")
        saved = _read_object(settings) if settings.is_file() else {"peft_type": config.peft_type}
        if "peft_type" not in saved:
            raise ValueError(
                f"{settings} must hold an adapter's settings. Found no peft_type. Take another checkpoint."
            )
        for name in ("lora_alpha", "use_rslora"):
            if name in saved and saved[name] != getattr(config, name):
                raise ValueError(
                    f"An adapter resumes with the `{name}` that it was saved with, {saved[name]} in {settings}. Found "
                    f"{getattr(config, name)}. Correct `peft_config`."
                )
