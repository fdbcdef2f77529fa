"""What a run directory holds, read leniently: whatever is missing is named, not an error."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..redact import redacted


@dataclass(frozen=True)
class Sample:
    """One prompt with its two images.

    Args:
        prompt (`str`): what was asked for.
        base (`Path`): image of the model before training.
        tuned (`Path`): image after training, from the same noise.
        base_rewards (`dict[str, float]`): reward by name, of `base`.
        tuned_rewards (`dict[str, float]`): likewise of `tuned`.
    """

    prompt: str
    base: Path
    tuned: Path
    base_rewards: dict[str, float] = field(default_factory=dict)
    tuned_rewards: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run directory.

    Args:
        path (`Path`): the directory.
        name (`str`): how the report calls it.
        history (`list[dict]`): Trainer's `log_history`.
        state (`dict`): the rest of Trainer's state.
        summary (`dict`): held-out results, under "objectives", "held_out" and "seconds".
        samples (`list[Sample]`): images before and after.
        config (`dict`): arguments of the run, secrets removed.
        warnings (`list[str]`): what was warned about while it ran.
        missing (`list[str]`): one sentence for each part that was not found.
    """

    path: Path
    name: str
    history: list[dict[str, Any]]
    state: dict[str, Any]
    summary: dict[str, Any]
    samples: list[Sample]
    config: dict[str, Any]
    warnings: list[str]
    missing: list[str]

    @property
    def objectives(self) -> list[str]:
        """Names of the trained rewards, in the run's order."""
        names = list(self.summary.get("objectives", {}))
        for entry in self.history:
            for key in entry:
                found = re.fullmatch(r"rewards/(.+)/mean", key)
                if found and found[1] not in names:
                    names.append(found[1])
        return names

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Optimizer steps and values of one logged number, leaving out what is not finite."""
        points = [(entry["step"], entry[key]) for entry in self.history if key in entry and "step" in entry]
        points = [(step, value) for step, value in points if isinstance(value, int | float) and math.isfinite(value)]
        return [float(step) for step, _ in points], [float(value) for _, value in points]


def read_run(path: Path) -> Run:
    """Read a run directory.

    Args:
        path (`Path`): what `output_dir` was.

    Raises:
        FileNotFoundError: if it does not exist, or holds nothing that a report could show.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"A run directory must exist. Found no directory {path}. Pass the `output_dir` of a training run."
        )
    missing: list[str] = []
    state = _read_json(_state_file(path), missing, "trainer_state.json", "the training curves")
    summary = _read_json(path / "summary.json", missing, "summary.json", "the results on held-out prompts")
    config = _read_json(path / "config.json", missing, "config.json", "the arguments of the run")
    if "_class_name" in config:  # a model's configuration, not ours
        config = {}
    samples = _read_samples(path / "samples", missing)
    if not (state or summary or samples):
        raise FileNotFoundError(
            f"A run directory must hold trainer_state.json, summary.json or samples/. Found none of them in {path}. "
            "Pass the `output_dir` of a training run."
        )
    history = [entry for entry in state.pop("log_history", []) if isinstance(entry, dict)]
    name = path.resolve().name
    return Run(path, name, history, state, summary, samples, redacted(config), _read_warnings(path), missing)


def _state_file(path: Path) -> Path:
    checkpoints = [p for p in path.glob("checkpoint-*/trainer_state.json") if p.parent.name[11:].isdigit()]
    newest = max(checkpoints, key=lambda p: int(p.parent.name[11:]), default=path / "trainer_state.json")
    return path / "trainer_state.json" if (path / "trainer_state.json").is_file() else newest


def _read_json(path: Path, missing: list[str], name: str, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append(f"{name} was not found, so this report cannot show {what}.")
        return {}
    except (OSError, ValueError) as error:
        missing.append(f"{name} could not be read ({error}), so this report cannot show {what}.")
        return {}
    if not isinstance(content, dict):
        missing.append(f"{name} holds no JSON object, so this report cannot show {what}.")
        return {}
    return content


def _read_samples(folder: Path, missing: list[str]) -> list[Sample]:
    pairs = []
    for base in sorted(folder.glob("base_*.png"), key=_index):
        tuned = base.with_name(base.name.replace("base_", "tuned_", 1))
        if tuned.is_file():
            pairs.append((_index(base), base, tuned))
    if not pairs:
        missing.append("samples/ holds no pair of images base_*.png and tuned_*.png, so there is nothing to compare.")
        return []
    try:
        entries = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        entries = []
        missing.append("samples/prompts.json was not found, so the images have no prompts and no rewards.")
    samples = []
    for index, base, tuned in pairs:
        entry = entries[index] if index < len(entries) else {}
        samples.append(
            Sample(
                entry.get("prompt", f"sample {index}"), base, tuned, entry.get("base") or {}, entry.get("tuned") or {}
            )
        )
    return samples


def _index(path: Path) -> int:
    digits = re.search(r"(\d+)$", path.stem)
    return int(digits[1]) if digits else 0


def _read_warnings(path: Path) -> list[str]:
    try:
        lines = (path / "warnings.jsonl").read_text(encoding="utf-8").splitlines()
        return [f"Step {entry['step']}: {entry['text']}" for entry in map(json.loads, lines)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
