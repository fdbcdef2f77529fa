"""Checkpoints: written as a whole or not at all, checked before a run resumes from them.

A checkpoint `checkpoint-N` holds Trainer's files (weights, optimizer, schedule, random state, `trainer_state.json`),
`apex_state.json` with the state of this package's objects, `ema.safetensors` with `ema_decay`, what a diffusers pipeline
loads, and a manifest with the hash of each file.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from ..distributed import check_equal, failing_together, full_trainable_weights, gather_list, wait_for_all
from .publishing import push_checkpoint
from .weights import save_denoiser, save_diffusers_lora

logger = logging.getLogger(__name__)

MANIFEST, PARTIAL, STATE_FILE = "manifest.json", ".partial", "apex_state.json"
AGGREGATOR_FILE = "aggregator_state.json"
FILES_OF_0_1_0 = {
    "aggregator": AGGREGATOR_FILE,
    "population": "population_conflict.json",
    "monitor": "first_evaluation.json",
}
ADAPTER, FULL = "adapter_model.safetensors", "model.safetensors"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "optimizer.bin")
_NAME = re.compile(r"checkpoint-(\d+)")


class SaveError(RuntimeError):
    """A checkpoint could not be written. Those before it are as they were."""

    exit_code = 1


# A run's state, to and from a directory


def save(trainer: Any, directory: str | Path, *, for_resume: bool) -> None:
    """Write a run's weights, and with `for_resume` all that [`load`] needs; every rank must call it, the main one writes.

    A plain diffusers pipeline loads the adapter, or the fully trained model under `transformer/`. With `ema_decay` that is
    the average, which `evaluate` draws with too; a run resumes from its own weights.
    """
    directory = str(directory)
    averaged = trainer._ema.save(directory) if trainer._ema is not None else None
    weights = _gathered_weights(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    states = {name: owner.state_dict() for name, owner in trainer._stateful().items()}
    if trainer.args.should_save:
        shown = averaged or weights
        if isinstance(model, PeftModel):
            Trainer._save(trainer, directory, weights if for_resume else shown)
            save_diffusers_lora(model, trainer.policy, directory, shown)
        elif for_resume:
            Trainer._save(trainer, directory, weights)
        else:
            whole = {**(weights or model.state_dict()), **(averaged or {})}
            save_denoiser(model, Path(directory, trainer.policy.denoiser_name), whole)
        if "aggregator" in states:  # for readers and the Hub
            Path(directory, AGGREGATOR_FILE).write_text(json.dumps(states["aggregator"], indent=1))
    if for_resume and not trainer.args.save_only_model:
        trainer._save_optimizer_and_scheduler(directory)
        trainer._save_scaler(directory)
        trainer._save_rng_state(directory)
    if for_resume and trainer.args.should_save:
        Path(directory, STATE_FILE).write_text(json.dumps(states, indent=1))
        callbacks = [
            c for c in [*trainer.callback_handler.callbacks, trainer.control] if isinstance(c, ExportableState)
        ]
        trainer.state.stateful_callbacks = TrainerState(stateful_callbacks=callbacks).stateful_callbacks
        trainer.state.save_to_json(str(Path(directory, "trainer_state.json")))


def load(trainer: Any, checkpoint: str) -> None:
    """Give a run the state that [`save`] wrote. Trainer loads weights, scaler, random state and `trainer_state.json`."""
    with nothing_but_tensors(checkpoint):
        Trainer._load_optimizer_and_scheduler(trainer, checkpoint)
    restore(trainer._stateful(), checkpoint)
    if trainer._ema is not None:
        trainer._ema.load(checkpoint)


def _gathered_weights(trainer: Any) -> dict[str, Tensor] | None:
    """Whole weights by name, on the main process, where an engine may shard them; None where the model has them."""
    if trainer.is_fsdp_enabled:
        return trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_deepspeed_enabled:
        return None
    buffers, state = dict(trainer.model.named_buffers()), trainer.model.state_dict()
    return {n: state[n] for n in buffers.keys() & state.keys()} | full_trainable_weights(trainer.model, main_only=True)


def save_model(trainer: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
    """Write what a plain diffusers pipeline loads: an adapter, or all weights under `transformer/`.

    With `ema_decay`, these are the averaged weights, which `evaluate` uses too. Every rank must call it; the main process
    writes.
    """
    directory = output_dir or str(trainer.args.output_dir)
    save(trainer, directory, for_resume=False)
    if trainer.args.should_save and Path(directory) == Path(trainer.args.output_dir):
        trainer.create_model_card()  # in place of PEFT's
    if trainer.args.push_to_hub and not _internal_call:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)
    wait_for_all()


def save_checkpoint(trainer: Any, model: Any = None, trial: Any = None) -> None:
    """Write a checkpoint in a place that no resume looks at, and give it its name once it is whole."""
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
            publish(partial, final, engine=trainer._engine, world_size=trainer.accelerator.num_processes)
            clear_partial(run)
            rotate(run, trainer.args.save_total_limit, state.best_model_checkpoint)
    if trainer.args.push_to_hub:
        push_checkpoint(trainer, final)


def save_before_failing(trainer: Any) -> None:
    """Save the step that the run has come to, where it is about to end with an error between two iterations."""
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


def resume_point(trainer: Any, wanted: str | bool | None) -> str | None:
    """The whole checkpoint behind `resume_from_checkpoint`, the same on every rank; None to start anew.

    Raises:
        ValueError: if there is none, or this run cannot go on from it; before anything is loaded.
    """
    if wanted is None or wanted is False:
        return None
    found = None
    with failing_together("the choice of a checkpoint"):
        if trainer.accelerator.is_main_process:
            found = str(to_resume_from(wanted, trainer.args.output_dir))
            check_engine(found, trainer._engine, trainer.accelerator.num_processes)
            check_state(trainer._stateful(), found)
            if trainer._engine == "ddp":
                check_weights_match(found, trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False))
            if trainer._ema is not None:
                trainer._ema.check(found)
            clear_partial(trainer.args.output_dir)
    return gather_list([found])[0]


def determine_best_metric(trainer: Any, metrics: dict[str, float], trial: Any) -> bool:
    """Trainer's own; with `load_best_model_at_end` a new best is saved, whatever `save_steps` says."""
    name = f"eval_{(trainer.args.metric_for_best_model or '').removeprefix('eval_')}"
    if trainer.args.metric_for_best_model and name not in metrics:
        logger.warning("%s could not be measured at step %d: no score is there.", name, trainer.state.global_step)
        return False
    best = Trainer._determine_best_metric(trainer, metrics, trial)
    if best and trainer.args.load_best_model_at_end:
        trainer.control.should_save = True
    return best


def load_best_model(trainer: Any) -> None:
    """Trainer's own at the end of training, with `load_best_model_at_end`; from a whole checkpoint only."""
    best = str(trainer.state.best_model_checkpoint)
    with failing_together("loading the best model"):
        found = defects(best) if trainer.accelerator.is_main_process else []
        if found:
            raise ValueError(
                f"The best checkpoint must be whole to be loaded. Found {best}: {'; '.join(found[:3])}. The trained "
                f"weights are those of the last step; {last_whole(trainer.args.output_dir)} holds them too."
            )
    Trainer._load_best_model(trainer)
    if trainer._ema is not None:
        trainer._ema.load(best)


# Directories: whole or not


def publish(partial: str | Path, final: str | Path, **facts: Any) -> None:
    """Give the finished checkpoint in `partial` its manifest and its name, in one step that either happens or does not.

    Both directories are on one file system; a broken checkpoint at `final` is replaced. The manifest keeps the `facts`:
    `engine`, `world_size`.

    Example:
        ```python
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> (run / PARTIAL / "checkpoint-4").mkdir(parents=True)
        >>> _ = (run / PARTIAL / "checkpoint-4" / "weights").write_bytes(b"1234")
        >>> publish(run / PARTIAL / "checkpoint-4", run / "checkpoint-4", world_size=2)
        >>> defects(run / "checkpoint-4"), manifest(run / "checkpoint-4")["world_size"]
        ([], 2)
        >>> _ = (run / "checkpoint-4" / "weights").write_bytes(b"12")
        >>> defects(run / "checkpoint-4")
        ['weights has 2 of 4 bytes']

        ```
    """
    partial, final = Path(partial), Path(final)
    names = sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file() and p.name != MANIFEST)
    for name in names:
        _sync(partial / name)
    files = {n: {"size": (partial / n).stat().st_size, "sha256": h} for n, h in _hashes(partial, names).items()}
    content = {**facts, "files": files}
    (partial / MANIFEST).write_text(json.dumps({**content, "sha256": _own_hash(content)}, indent=1))
    _sync(partial / MANIFEST)
    for directory in {partial, *((partial / name).parent for name in names)}:
        _sync(directory)
    replaced = partial.with_name(final.name + ".replaced")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync(final.parent)


def manifest(checkpoint: str | Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None where it has none that can be read."""
    try:
        content = json.loads(Path(checkpoint, MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("files"), dict) else None


def defects(checkpoint: str | Path) -> list[str]:
    """What keeps a checkpoint from being whole, one line a file. Files that the manifest does not list are no defect."""
    checkpoint, content = Path(checkpoint), manifest(checkpoint)
    if content is None:
        return [f"{MANIFEST} is missing or unreadable"]
    if "sha256" in content and _own_hash(content) != content["sha256"]:
        return [f"{MANIFEST} has another hash"]
    found, files = [], content["files"]
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            found.append(f"{name} has {path.stat().st_size} of {entry['size']} bytes")
    return found or [
        f"{n} has another hash" for n, value in _hashes(checkpoint, files).items() if value != files[n]["sha256"]
    ]


def lacks(checkpoint: str | Path) -> list[str]:
    """Which parts of a run's state a checkpoint does not hold: a run with `save_only_model` writes the weights alone."""
    checkpoint = Path(checkpoint)
    engine = (manifest(checkpoint) or {}).get("engine")
    if engine is None:
        return []
    optimizer = {"ddp": "optimizer.pt", "fsdp": "optimizer*"}.get(engine, "latest")
    parts = {"optimizer": optimizer, "random state": "rng_state*.pth", "progress": "trainer_state.json"}
    if not engine.startswith("zero"):
        parts["schedule"] = "scheduler.pt"
    return [f"no {part} ({pattern})" for part, pattern in parts.items() if not any(checkpoint.glob(pattern))]


def checkpoints(run: str | Path) -> list[Path]:
    """The directories `checkpoint-N` of a run, whole or not, the latest step first."""
    run = Path(run)
    found = [p for p in run.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)] if run.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def last_whole(run: str | Path) -> Path | None:
    """The latest checkpoint that can be resumed from; says which later ones it passes over, and why."""
    for checkpoint in checkpoints(run):
        found = defects(checkpoint) or lacks(checkpoint)
        if not found:
            return checkpoint
        logger.warning("%s is not whole and is passed over: %s.", checkpoint, "; ".join(found[:3]))
    return None


def to_resume_from(wanted: str | Path | Literal[True], run: str | Path) -> Path:
    """The checkpoint that `resume_from_checkpoint` means: the one named, or the last whole one of the run for True.

    Raises:
        ValueError: where there is no whole checkpoint, or the one asked for is not whole.
    """
    if wanted is True:
        there = checkpoints(run)
        found = last_whole(run)
        if found is None:
            _refuse_partial_state(c for c in there if not defects(c))
            raise ValueError(
                f"`resume_from_checkpoint=True` needs a whole checkpoint in {run}. Found "
                f"{[c.name for c in there] or 'none'}, none of them whole. Start anew without it."
            )
        later = [c.name for c in there[: there.index(found)]]
        if later:
            logger.warning("Resuming from %s, the last whole checkpoint; %s cannot be used.", found, ", ".join(later))
        return found
    wanted = Path(wanted)
    broken = defects(wanted)
    if broken:
        whole = last_whole(wanted.parent)
        remedy = (
            f"Resume from {whole}, the last whole one." if whole else "There is no whole one beside it; start anew."
        )
        raise ValueError(
            f"A checkpoint to resume from must be whole. Found {wanted}: {'; '.join(broken[:3])}. {remedy}"
        )
    _refuse_partial_state([wanted])
    return wanted


def _refuse_partial_state(found: Iterable[Path]) -> None:
    """Raise if the first of these whole checkpoints holds a part of the state only."""
    for checkpoint in found:
        if lacks(checkpoint):
            raise ValueError(
                f"A checkpoint to resume from must hold the run's whole state. Found {checkpoint}, saved with `save_only_model` "
                f"or by another program: {'; '.join(lacks(checkpoint))}. To go on from its weights, load its adapter as the "
                "model and start a new run."
            )
        return


def rotate(run: str | Path, limit: int | None, keep: str | Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`, but not `keep` (the best one) nor the last that can be resumed from."""
    if not limit or limit < 0:
        return
    found = checkpoints(run)
    resumable = [c for c in found if manifest(c) and not lacks(c)]
    spared = {c for c in found if keep and c.name == Path(keep).name} | set(resumable[:1] or found[:1])
    for checkpoint in found:
        if len(spared) < limit:
            spared.add(checkpoint)
    for checkpoint in set(found) - spared:
        shutil.rmtree(checkpoint, ignore_errors=True)


def clear_partial(run: str | Path) -> None:
    """Delete what a killed save left behind, and say so."""
    partial = Path(run, PARTIAL)
    left = sorted(p.name for p in partial.iterdir()) if partial.is_dir() else []
    if left:
        logger.warning("A save was cut off before it was whole; what it left is deleted: %s.", ", ".join(left))
    shutil.rmtree(partial, ignore_errors=True)


def _own_hash(content: dict[str, Any]) -> str:
    """Of a manifest, without the entry that holds it."""
    plain = json.dumps({key: value for key, value in content.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    def sha256(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(sha256, names), strict=True))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Whether this run can go on from a checkpoint


def check_engine(checkpoint: str | Path, engine: str, world_size: int) -> None:
    """Refuse a checkpoint that this engine ("ddp", "zero1" to "zero3", "fsdp") or this number of processes cannot read.

    Raises:
        ValueError: names both engines, or both numbers of processes.
    """
    facts = manifest(checkpoint) or {}
    saved_engine, saved_world = facts.get("engine"), facts.get("world_size")
    remedy = (
        f'To go on with other settings, start a new run from its adapter with `adapter="{checkpoint}"`, or from the '
        "fully trained weights that `save_model` wrote, loaded into the pipeline."
    )
    if saved_engine is not None and saved_engine != engine:
        raise ValueError(
            f"A checkpoint resumes under the engine that saved it, {saved_engine}. Found {engine}. {remedy}"
        )
    if engine.startswith("zero") and saved_world is not None and saved_world != world_size:
        raise ValueError(
            f"A checkpoint of {engine} resumes on the number of processes that saved it, {saved_world}. Found "
            f"{world_size}. Its optimizer state is split in that many parts. {remedy}"
        )


def check_weights_match(checkpoint: str | Path, model: nn.Module) -> None:
    """Refuse a checkpoint of one process or DDP whose weights are not those of `model`, by name and shape.

    Trainer would load what fits and go on, and it would take a pickle where there are no safetensors.

    Raises:
        ValueError: names the file and the first weight that differs.
    """
    adapter = isinstance(model, PeftModel)
    file = Path(checkpoint, ADAPTER if adapter else FULL)
    kind = "an adapter" if adapter else "all weights"
    if not file.is_file():
        raise ValueError(
            f"A checkpoint must hold what is trained here, {kind} in {file.name}. Found no such file in {checkpoint}. It "
            "was saved by a run with other settings of `peft_config`, or by another program."
        )
    strange = [name for name in (*PICKLED, *([FULL] if adapter else [])) if Path(checkpoint, name).exists()]
    if strange:  # Trainer would read them first
        raise ValueError(
            f"A checkpoint must hold the files that this trainer wrote. Found {', '.join(strange)} beside them in "
            f"{checkpoint}. Something else put them there: remove them, or do not use the checkpoint."
        )
    wanted = get_peft_model_state_dict(model) if adapter else model.state_dict()
    expected = {name: list(value.shape) for name, value in wanted.items()}
    try:
        with safe_open(file, "pt") as content:
            found = {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Weights must be a safetensors file. Found {file}, which is none: {error}. Take another checkpoint."
        ) from error
    names = sorted(found.keys() ^ expected.keys()) or sorted(n for n in found if found[n] != expected[n])
    if names:
        raise ValueError(
            f"A checkpoint must be of the same model and adapter. Found {len(names)} weights in {file} that differ from "
            f"this model's, e.g. {names[0]}: {found.get(names[0], 'none')} in the checkpoint, "
            f"{expected.get(names[0], 'none')} in the model. Use the settings that it was saved with, or start anew."
        )
    if isinstance(model, PeftModel):  # an adapter's scale is in none of its weights
        config: Any = model.peft_config[model.active_adapter]
        settings = file.with_name("adapter_config.json")
        saved = read_object(settings) if settings.is_file() else {}
        for name in ("lora_alpha", "use_rslora"):
            if name in saved and saved[name] != getattr(config, name):
                raise ValueError(
                    f"An adapter resumes with the `{name}` that it was saved with, {saved[name]}. Found "
                    f"{getattr(config, name)}. Correct `peft_config`."
                )


def check_state(stateful: dict[str, Any], checkpoint: str | Path) -> None:
    """Raise, before anything is loaded, if a checkpoint's states cannot be restored. The objects keep theirs.

    Raises:
        ValueError: names the file.
    """
    progress = read_object(Path(checkpoint, "trainer_state.json"))
    steps = [progress.get(key) for key in ("global_step", "max_steps")]
    if not all(isinstance(step, int) for step in steps) or not isinstance(progress.get("log_history"), list):
        raise ValueError(
            f"{checkpoint}/trainer_state.json must hold a run's steps and logs. Found {sorted(progress)[:5]}. Take another "
            "checkpoint."
        )
    if "aggregator" in stateful and "aggregator" not in read_state(checkpoint):
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


def restore(stateful: dict[str, Any], checkpoint: str | Path) -> None:
    """Give each object its state from a checkpoint; those without one there stay as they are.

    Raises:
        ValueError: names the file, where a state is not in the form that its object writes.
    """
    for name, (file, state) in read_state(checkpoint).items():
        if name not in stateful:
            continue
        try:
            stateful[name].load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"{file} must hold the state of the {name} as this trainer writes it. Found {type(error).__name__}: {error}. "
                "Take another checkpoint."
            ) from error


def read_state(checkpoint: str | Path) -> dict[str, tuple[Path, Any]]:
    """The states in a checkpoint by name, each with the file that holds it. Version 0.1.0 wrote a file for each."""
    together = Path(checkpoint, STATE_FILE)
    if together.is_file():
        return {name: (together, state) for name, state in read_object(together).items()}
    files = {name: Path(checkpoint, file) for name, file in FILES_OF_0_1_0.items()}
    return {name: (file, read_object(file)) for name, file in files.items() if file.is_file()}


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file; ValueError if it holds anything else."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} must be a JSON file. Found {error}. Take another checkpoint.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object. Found {type(content).__name__}. Take another checkpoint.")
    return content


@contextmanager
def nothing_but_tensors(checkpoint: str | Path) -> Iterator[None]:
    """While PyTorch reads the optimizer and random states, which it refuses to unpickle beyond tensors and numbers.

    Raises:
        ValueError: instead of PyTorch's advice to load the file nevertheless.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ValueError(
            f"A checkpoint must hold tensors and numbers only. Found something else in {checkpoint}, which was not run: "
            f"{str(error).splitlines()[0]}. The file was not written by this trainer: do not use the checkpoint."
        ) from error


# The disk


def check_writable(folder: str | Path) -> None:
    """Make the folder where it is missing, and see whether a file can be written there; ValueError if not."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"probe")
    except OSError as error:
        raise ValueError(
            f"`output_dir` must be a folder that can be written to. Found {folder}: {error.strerror or error}. Pass another "
            "folder, or mend its permissions or the space on its disk."
        ) from error


@contextmanager
def saving(name: str, run: Path) -> Iterator[None]:
    """While the checkpoint `name` of a run is written: a failure of the disk becomes a SaveError; other errors pass."""
    try:
        yield
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        clear_partial(run)
        whole = last_whole(run)
        try:
            free = f"{shutil.disk_usage(run).free / 2**20:.0f}"
        except OSError:
            free = "unknown"
        raise SaveError(
            f"{name} must be written whole to {run}. Found that it cannot: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]} ({free} MB free). Make room or mend the permissions, then "
            + (f"resume from {whole}, the last whole checkpoint, which is as it was." if whole else "start anew.")
        ) from error


def _is_of_the_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, ConnectionError | TimeoutError)
    # PyTorch's writer of zip files reports a failed write as a RuntimeError.
    of_torch = "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    return of_torch or isinstance(error, SafetensorError)
