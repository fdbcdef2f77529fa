"""What a run directory holds. What is missing is named, and is no error."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..redact import redacted

TEXTS = 4  # prompts of a language model's run that are kept, first and last


@dataclass(frozen=True)
class Sample:
    """One prompt with its images before and after training, and their rewards by name."""

    prompt: str
    base: Path
    tuned: Path
    base_rewards: dict[str, float]
    tuned_rewards: dict[str, float]


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path
    name: str  # in the report
    history: list[dict[str, Any]]  # Trainer's log
    state: dict[str, Any]  # the rest of Trainer's state
    summary: dict[str, Any]  # results on held-out prompts: "objectives", "held_out", "domination" and "seconds"
    samples: list[Sample]
    texts: list[dict[str, Any]]  # completions of a language model at the first and the last log
    config: dict[str, Any]  # arguments, without secrets
    environment: dict[str, Any]  # versions, date, and the names of the arguments that were set
    warnings: list[str]
    missing: list[str]  # a sentence for each part that was not found

    @property
    def objectives(self) -> list[str]:
        """Names of the trained rewards, in the run's order."""
        names = dict.fromkeys(self.summary.get("objectives", {}))
        for entry in self.history:
            names |= {found[1]: None for key in entry if (found := re.fullmatch(r"rewards/(.+)/mean", key))}
        return list(names)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Optimizer steps and values of one logged number, leaving out what is not finite."""
        entries = [entry for entry in self.history if "step" in entry and finite(entry.get(key)) is not None]
        return [float(entry["step"]) for entry in entries], [float(entry[key]) for entry in entries]


def read_run(path: Path) -> Run:
    """Read the `output_dir` of a run; a FileNotFoundError if it holds nothing that a report could show."""
    if not path.is_dir():
        raise FileNotFoundError(
            f"A run directory must exist. Found no directory {path}. Pass the `output_dir` of a training run."
        )
    missing: list[str] = []
    states = [path / "trainer_state.json", *path.glob("checkpoint-*/trainer_state.json")]
    kinds: dict[str, type] = {"global_step": int, "log_history": list}
    found = [_read_json(state, kinds=kinds) for state in states if state.is_file()]
    state = max(found, key=lambda content: content.get("global_step", 0), default={})
    if not state:
        _read_json(states[0], missing, "the training curves", kinds)
    kinds = dict.fromkeys(("objectives", "held_out", "domination", "seconds"), dict)
    summary = _read_json(path / "summary.json", missing, "the results on held-out prompts", kinds)
    for part in {"objectives", "held_out"} & summary.keys():
        summary[part] = {name: entry for name, entry in summary[part].items() if isinstance(entry, dict)}
    config = _read_json(path / "config.json", missing, "the arguments of the run")
    if {"_class_name", "architectures", "model_type"} & set(config):  # a model's configuration, not the run's
        config = {}
    texts = _read_texts(path / "completions")
    samples = _read_samples(path / "samples", [] if texts else missing)
    if not (state or summary or samples or texts):
        raise FileNotFoundError(
            "A run directory must hold trainer_state.json, summary.json, samples/ or completions/. "
            f"Found none of them in {path}. Pass the `output_dir` of a training run."
        )
    return Run(
        path=path,
        name=path.resolve().name,
        history=[entry for entry in state.pop("log_history", []) if isinstance(entry, dict)],
        state=state,
        summary=summary,
        samples=samples,
        texts=texts,
        config=redacted(config),
        environment=_read_json(path / "environment.json"),
        warnings=_read_warnings(path / "warnings.jsonl"),
        missing=missing,
    )


def _read_json(
    path: Path, missing: list[str] | None = None, gives: str = "", kinds: Mapping[str, type] = {}
) -> dict[str, Any]:
    """The object in a file, with entries of these kinds; without one, a sentence for `missing` about what it would give."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key, kind()), kind)]
            if not wrong:
                return content
            problem = f"has no proper {', '.join(wrong)}"
        else:
            problem = "holds no JSON object"
    except FileNotFoundError:
        problem = "was not found"
    except (OSError, ValueError) as error:
        problem = f"could not be read ({error})"
    if missing is not None:
        missing.append(f"{path.name} {problem}, so this report cannot show {gives}.")
    return {}


def _read_samples(folder: Path, missing: list[str]) -> list[Sample]:
    """The pairs of images by their number, with what `prompts.json` says of each."""
    found = {path: re.search(r"_(\d+)$", path.stem) for path in folder.glob("base_*.png")}
    bases = sorted((int(number[1]), path) for path, number in found.items() if number)
    pairs = [(i, base, base.with_name(base.name.replace("base_", "tuned_", 1))) for i, base in bases]
    pairs = [pair for pair in pairs if pair[2].is_file()]
    if not pairs:
        missing.append("samples/ holds no pair of images base_*.png and tuned_*.png, so there is nothing to compare.")
        return []
    try:
        entries = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        entries = []
        missing.append("samples/prompts.json was not found, so the images have no prompts and no rewards.")
    samples = []
    for i, base, tuned in pairs:
        entry = entries[i] if i < len(entries) else {}
        rewards = (entry.get("base") or {}, entry.get("tuned") or {})
        samples.append(Sample(entry.get("prompt", f"sample {i}"), base, tuned, *rewards))
    return samples


def _read_texts(folder: Path) -> list[dict[str, Any]]:
    """Step, prompt, completion and rewards of a few rows of the tables that `log_completions=True` writes, first and last."""
    import pyarrow.parquet

    tables = sorted(folder.glob("completions_*.parquet"))
    found = []
    for path in dict.fromkeys([*tables[:1], *tables[-1:]]):
        by_prompt: dict[str, dict[str, Any]] = {}
        try:
            for row in pyarrow.parquet.read_table(path).to_pylist():
                numbers = {key: value for key in row if key != "step" and (value := finite(row[key])) is not None}
                text = {"step": row["step"], "completion": _plain(row["completion"]) or "(empty)", "rewards": numbers}
                by_prompt.setdefault(_plain(row["prompt"]), text)  # the first completion of each
        except (OSError, ValueError, KeyError):
            continue
        found += [{"prompt": prompt, **text} for prompt, text in list(by_prompt.items())[:TEXTS]]
    return found


def _plain(text: Any) -> str:
    """A prompt or completion as text; of a conversation, the text of its messages."""
    if isinstance(text, list):
        return "\n".join(filter(None, map(_plain, text)))
    if isinstance(text, dict):
        return _plain(text.get("content") or text.get("text"))
    return "" if text is None else str(text)


def _read_warnings(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return list(dict.fromkeys(f"Step {entry['step']}: {entry['text']}" for entry in map(json.loads, lines)))
    except (OSError, ValueError, KeyError, TypeError):
        return []


def finite(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
