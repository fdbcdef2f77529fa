"""Directories of checkpoints: complete or absent, and which of them a run resumes from.

A checkpoint is written under `.partial/`. It gets a manifest with the size and SHA-256 of each file, and then its name.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

logger = logging.getLogger(__name__)

MANIFEST, PARTIAL = "manifest.json", ".partial"


class SaveError(RuntimeError):
    """A checkpoint could not be written. Earlier ones are unchanged."""

    exit_code = 1


# Writing


def finalize(partial: str | Path, final: str | Path, **facts: Any) -> None:
    """Give the checkpoint written in `partial` its manifest, with the `facts`, then rename it to `final`, which it replaces.

    Example:
        >>> run = Path(tempfile.mkdtemp())
        >>> (run / PARTIAL / "checkpoint-4").mkdir(parents=True)
        >>> _ = (run / PARTIAL / "checkpoint-4" / "weights").write_bytes(b"1234")
        >>> finalize(run / PARTIAL / "checkpoint-4", run / "checkpoint-4", world_size=2)
        >>> defects(run / "checkpoint-4"), read(run / "checkpoint-4")["world_size"]
        ([], 2)
        >>> _ = (run / "checkpoint-4" / "weights").write_bytes(b"12")
        >>> defects(run / "checkpoint-4")
        ['weights has 2 of 4 bytes']
    """
    partial, final = Path(partial), Path(final)
    names = sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {
        name: {"size": (partial / name).stat().st_size, "sha256": h} for name, h in _hashes(partial, names).items()
    }
    content = {**facts, "files": files}
    (partial / MANIFEST).write_text(json.dumps({**content, "sha256": _own_hash(content)}, indent=1))
    written = [partial / name for name in (*names, MANIFEST)]
    for path in (*written, *{path.parent for path in written}):
        _sync(path)
    replaced = partial.with_name(final.name + ".replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync(final.parent)


@contextmanager
def saving(name: str, run: Path) -> Iterator[None]:
    """Turn a failure of the disk, while the checkpoint `name` of a run is written, into a SaveError."""
    try:
        yield
    except Exception as error:
        if not _is_of_the_disk(error):
            raise
        clear_partial(run)
        valid = last_valid(run)
        raise SaveError(
            f"{name} must be written completely to {run}. Found that it cannot: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]} ({shutil.disk_usage(run).free / 2**20:.0f} MB free). Make room or mend "
            "the permissions, then "
            + (f"resume from {valid}, the last valid checkpoint, which is unchanged." if valid else "start anew.")
        ) from error


def clear_partial(run: str | Path) -> None:
    """Delete what a killed save left behind, and say so."""
    partial = Path(run, PARTIAL)
    left = sorted(p.name for p in partial.glob("*"))
    if left:
        logger.warning("A save was cut off before it was complete; what it left is deleted: %s.", ", ".join(left))
    shutil.rmtree(partial, ignore_errors=True)


def rotate(run: str | Path, limit: int | None, keep: str | Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`, but not `keep` (the best one) nor the last that can be resumed from."""
    if not limit or limit < 0:
        return
    found = checkpoints(run)
    resumable = [c for c in found if read(c) and not missing_state(c)]
    spared = {c for c in found if keep and c.name == Path(keep).name} | set(resumable[:1] or found[:1])
    others = [c for c in found if c not in spared]
    for checkpoint in others[max(limit - len(spared), 0) :]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def check_writable(folder: str | Path) -> None:
    """Make the folder where it is missing; ValueError if no file can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"test")
    except OSError as error:
        raise ValueError(
            f"`output_dir` must be a folder that can be written to. Found {folder}: {error.strerror or error}. Pass another "
            "folder, or mend its permissions or the space on its disk."
        ) from error


# Choosing one to resume from


def to_resume_from(wanted: str | Path | Literal[True], run: str | Path) -> Path:
    """The checkpoint that `resume_from_checkpoint` names, or the run's last one for True; ValueError if it is not valid."""
    if wanted is True:
        valid = last_valid(run)
        if valid is not None:
            return valid
        there = checkpoints(run)
        if not there:
            raise ValueError(
                f"`resume_from_checkpoint=True` needs a checkpoint in {run}. Found none. Start anew without it."
            )
        wanted = there[0]  # the errors below say why not
    wanted = Path(wanted)
    broken = defects(wanted)
    if broken:
        valid = last_valid(wanted) or last_valid(wanted.parent) or last_valid(run)
        remedy = f"Resume from {valid}, the last valid one." if valid else "There is no valid one; start anew."
        raise ValueError(
            f"A checkpoint to resume from must be valid. Found {wanted}: {'; '.join(broken[:3])}. {remedy}"
        )
    missing = missing_state(wanted)
    if missing:
        raise ValueError(
            f"A checkpoint to resume from must hold the run's whole state. Found {wanted}, saved with `save_only_model` "
            f"or by another program: {'; '.join(missing)}. To go on from its weights, load its adapter as the "
            "model and start a new run."
        )
    return wanted


def checkpoints(run: str | Path) -> list[Path]:
    """The directories `checkpoint-N` of a run, valid or not, the latest step first."""
    found = [p for p in Path(run).glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def last_valid(run: str | Path) -> Path | None:
    """The latest checkpoint that can be resumed from; says which later ones it passes over, and why."""
    for checkpoint in checkpoints(run):
        found = defects(checkpoint) or missing_state(checkpoint)
        if not found:
            return checkpoint
        logger.warning("%s is not valid and is passed over: %s.", checkpoint, "; ".join(found[:3]))
    return None


def defects(checkpoint: str | Path) -> list[str]:
    """What is damaged in a checkpoint, one line a file. Files that the manifest does not list are no defect."""
    checkpoint, content = Path(checkpoint), read(checkpoint)
    if content is None:
        return [f"{MANIFEST} is missing or unreadable"]
    if "sha256" in content and _own_hash(content) != content["sha256"]:
        return [f"{MANIFEST} has another hash"]
    found, same_size = [], []
    for name, entry in content["files"].items():
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            found.append(f"{name} has {path.stat().st_size} of {entry['size']} bytes")
        else:
            same_size.append(name)
    hashes = _hashes(checkpoint, same_size)
    return found + [f"{n} has another hash" for n in same_size if hashes[n] != content["files"][n]["sha256"]]


def missing_state(checkpoint: str | Path) -> list[str]:
    """What a checkpoint lacks for a resume, one line each: `save_only_model` writes the weights alone."""
    engine = (read(checkpoint) or {}).get("engine")
    if engine is None:
        return []
    optimizer = {"ddp": "optimizer.pt", "fsdp": "optimizer*"}.get(engine, "latest")
    parts = {"optimizer": optimizer, "random state": "rng_state*.pth", "progress": "trainer_state.json"}
    if not engine.startswith("zero"):
        parts["schedule"] = "scheduler.pt"
    return [f"no {part} ({pattern})" for part, pattern in parts.items() if not any(Path(checkpoint).glob(pattern))]


def read(checkpoint: str | Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None where it has none that can be read."""
    try:
        content = json.loads(Path(checkpoint, MANIFEST).read_text())
        facts = {"engine": str, "world_size": int, "settings": dict, "sha256": str}
        known = all(isinstance(content.get(name, kind()), kind) for name, kind in facts.items())
        entries = [(entry["size"], entry["sha256"]) for entry in content["files"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return content if known and all(isinstance(size, int) for size, _ in entries) else None


def _own_hash(content: dict[str, Any]) -> str:
    """Hash of a manifest, without the entry that holds it."""
    plain = json.dumps({key: value for key, value in content.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
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


def _is_of_the_disk(error: Exception) -> bool:
    """Whether an error is one of the file system; PyTorch's writer of zip files raises a RuntimeError for those."""
    if isinstance(error, OSError):
        return not isinstance(error, ConnectionError | TimeoutError)
    of_torch = "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    return of_torch or isinstance(error, SafetensorError)
