"""Checkpoints that are whole or not there.

A checkpoint is written under `.partial/` beside its final place, a manifest with the size and hash of every file is
added, and the directory is renamed. A process that is killed on the way leaves nothing that looks like a checkpoint, and
a file that is cut short or changed later no longer matches the manifest. Resuming takes whole checkpoints only.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PARTIAL = ".partial"
STATE_FILE = "apex_state.json"
FILES_OF_0_1_0 = {
    "aggregator": "aggregator_state.json",
    "population": "population_conflict.json",
    "monitor": "first_evaluation.json",
}
_NAME = re.compile(r"checkpoint-(\d+)")


def publish(partial: str | Path, final: str | Path, **facts: Any) -> None:
    """Give a finished checkpoint its manifest and its name, in one step that either happens or does not.

    Args:
        partial (`str` or `Path`): directory that holds all files, on the same file system as `final`.
        final (`str` or `Path`): where it belongs. What is there (a broken checkpoint of an earlier run) is replaced.
        facts: kept in the manifest: `engine`, `world_size`.

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
    with ThreadPoolExecutor(8) as pool:
        hashes = list(pool.map(lambda name: _sha256(partial / name), names))
    files = {n: {"size": (partial / n).stat().st_size, "sha256": h} for n, h in zip(names, hashes, strict=True)}
    content = {**facts, "files": files}
    (partial / MANIFEST).write_text(json.dumps({**content, "sha256": _own_hash(content)}, indent=1))
    _sync(partial / MANIFEST)
    for directory in {partial, *((partial / name).parent for name in names)}:
        _sync(directory)
    if final.exists():
        replaced = partial.with_name(final.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        partial.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        partial.rename(final)
    _sync(final.parent)


def manifest(checkpoint: str | Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None where it has none that can be read."""
    try:
        content = json.loads(Path(checkpoint, MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("files"), dict) else None


def defects(checkpoint: str | Path) -> list[str]:
    """What keeps a checkpoint from being whole, one line a file; empty for a whole one.

    Files that the manifest does not list were added later, and are no defect.
    """
    checkpoint, content = Path(checkpoint), manifest(checkpoint)
    if content is None:
        return [f"{MANIFEST} is missing or unreadable"]
    if "sha256" in content and _own_hash(content) != content["sha256"]:
        return [f"{MANIFEST} has another hash"]
    found = []
    for name, entry in content["files"].items():
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            found.append(f"{name} has {path.stat().st_size} of {entry['size']} bytes")
    if found:
        return found
    with ThreadPoolExecutor(8) as pool:
        hashes = list(pool.map(lambda name: _sha256(checkpoint / name), content["files"]))
    expected = [entry["sha256"] for entry in content["files"].values()]
    return [f"{n} has another hash" for n, a, b in zip(content["files"], hashes, expected, strict=True) if a != b]


def lacks(checkpoint: str | Path) -> list[str]:
    """Which parts of a run's state a checkpoint does not hold, one line each; empty for one that can be resumed from.

    A run with `save_only_model` writes the weights alone: the learning rate and AdamW would start again.
    """
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
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: str | Path) -> int:
    """The step in a checkpoint's name, -1 for another name."""
    match = _NAME.fullmatch(Path(checkpoint).name)
    return int(match[1]) if match else -1


def last_whole(run: str | Path) -> Path | None:
    """The latest checkpoint that can be resumed from; says which later ones it passes over, and why."""
    for checkpoint in checkpoints(run):
        found = defects(checkpoint) or lacks(checkpoint)
        if not found:
            return checkpoint
        logger.warning("%s is not whole and is passed over: %s.", checkpoint, "; ".join(found[:3]))
    return None


def to_resume_from(wanted: str | Path | Literal[True], run: str | Path) -> Path:
    """The checkpoint that `resume_from_checkpoint` means.

    Args:
        wanted (`str`, `Path` or `True`): a checkpoint, or True for the last whole one of the run.
        run (`str` or `Path`): the output directory.

    Raises:
        ValueError: where there is no whole checkpoint, or the one asked for is not whole.
    """
    if wanted is True:
        found = last_whole(run)
        if found is None:
            _refuse_partial_state([c for c in checkpoints(run) if not defects(c)])
            raise ValueError(
                f"`resume_from_checkpoint=True` needs a whole checkpoint in {run}. Found "
                f"{[c.name for c in checkpoints(run)] or 'none'}, none of them whole. Start anew without it."
            )
        later = [c.name for c in checkpoints(run) if step_of(c) > step_of(found)]
        if later:
            logger.warning("Resuming from %s, the last whole checkpoint; %s cannot be used.", found, ", ".join(later))
        return found
    found_defects = defects(wanted)
    if found_defects:
        whole = last_whole(Path(wanted).parent)
        raise ValueError(
            f"A checkpoint to resume from must be whole. Found {wanted}: {'; '.join(found_defects[:3])}. "
            + (
                f"Resume from {whole}, the last whole one."
                if whole
                else "There is no whole one beside it; start anew."
            )
        )
    _refuse_partial_state([Path(wanted)])
    return Path(wanted)


def _refuse_partial_state(found: list[Path]) -> None:
    """Raise for the first of these whole checkpoints if it holds a part of the state only."""
    if found and lacks(found[0]):
        raise ValueError(
            f"A checkpoint to resume from must hold the run's whole state. Found {found[0]}, saved with `save_only_model` or "
            f"by another program: {'; '.join(lacks(found[0]))}. To go on from its weights, load its adapter as the model and "
            "start a new run."
        )


def read_object(file: str | Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: if the file holds anything else; names it.
    """
    try:
        content = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} must be a JSON file. Found {error}. Take another checkpoint.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object. Found {type(content).__name__}. Take another checkpoint.")
    return content


def read_state(checkpoint: str | Path) -> dict[str, tuple[Path, Any]]:
    """The states of a checkpoint beside Trainer's own, by name, each with the file that holds it.

    Version 0.1.0 wrote a file for each.
    """
    checkpoint = Path(checkpoint)
    if (checkpoint / STATE_FILE).is_file():
        return {name: (checkpoint / STATE_FILE, state) for name, state in read_object(checkpoint / STATE_FILE).items()}
    files = {name: checkpoint / file for name, file in FILES_OF_0_1_0.items()}
    return {name: (file, read_object(file)) for name, file in files.items() if file.is_file()}


def restore(stateful: dict[str, Any], checkpoint: str | Path) -> None:
    """Give each object its state from a checkpoint; those without one there stay as they are.

    Args:
        stateful (`dict`): objects with `load_state_dict`, by name.
        checkpoint (`str` or `Path`): a directory.

    Raises:
        ValueError: names the file, where a state is not in the form that its object writes.
    """
    states = read_state(checkpoint)
    for name, owner in stateful.items():
        if name not in states:
            continue
        file, state = states[name]
        try:
            owner.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"{file} must hold the state of the {name} as this trainer writes it. Found {type(error).__name__}: {error}. "
                "Take another checkpoint."
            ) from error


def check_state(stateful: dict[str, Any], checkpoint: str | Path, needed: tuple[str, ...] = ()) -> None:
    """Raise, before anything is loaded, if a checkpoint's states cannot be restored.

    Args:
        stateful (`dict`): objects with `state_dict` and `load_state_dict`, by name. They keep their states.
        checkpoint (`str` or `Path`): a directory.
        needed (`tuple[str, ...]`): names that must be there.

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
    missing = sorted(set(needed) - read_state(checkpoint).keys())
    if missing:
        raise ValueError(
            f"A checkpoint of this trainer must hold the state of the {missing[0]}, in {STATE_FILE} or, from version 0.1.0, "
            f"{FILES_OF_0_1_0[missing[0]]}. Found none in {checkpoint}. It was saved by another trainer: load its adapter as the "
            "model and start anew instead of resuming."
        )
    before = {name: owner.state_dict() for name, owner in stateful.items()}
    try:
        restore(stateful, checkpoint)
    finally:
        for name, owner in stateful.items():
            owner.load_state_dict(before[name])


def check_engine(checkpoint: str | Path, engine: str, world_size: int) -> None:
    """Refuse a checkpoint that this engine, or this number of processes, cannot read.

    Args:
        checkpoint (`str` or `Path`): with a manifest.
        engine (`str`): "ddp" (also one process), "zero1" to "zero3", or "fsdp".
        world_size (`int`): processes now.

    Raises:
        ValueError: names both engines, or both numbers of processes.

    Example:
        ```python
        >>> import tempfile
        >>> run = Path(tempfile.mkdtemp())
        >>> (run / PARTIAL).mkdir()
        >>> publish(run / PARTIAL, run / "checkpoint-1", engine="zero2", world_size=4)
        >>> check_engine(run / "checkpoint-1", "zero2", 4)
        >>> check_engine(run / "checkpoint-1", "zero2", 2)
        Traceback (most recent call last):
        ValueError: A checkpoint of zero2 resumes on the number of processes that saved it, 4. Found 2. ...

        ```
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
    """Of a manifest, leaving out the entry that holds it."""
    plain = json.dumps({key: value for key, value in content.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
