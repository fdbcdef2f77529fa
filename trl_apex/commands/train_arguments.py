"""The arguments of `trl-apex train` beside those of [`APEXConfig`], and how YAML and flags are read."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from trl import TrlParser

from ..trainer.apex_config import APEXConfig


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class ModelArguments:
    """What to train."""

    model: str | None = field(
        default=None, metadata=_help("Hub id or folder of a diffusers pipeline, or 'tiny' for the one in the package.")
    )
    revision: str | None = field(default=None, metadata=_help("Branch, tag or commit of a hub id."))


@dataclass
class DataArguments:
    """Which prompts to train on."""

    dataset: str | None = field(
        default=None,
        metadata=_help("Prompts: .json, .jsonl, .csv, .parquet or .txt (one a line), a folder, a hub id, or 'tiny'."),
    )
    dataset_config: str | None = field(default=None, metadata=_help("Configuration of a hub dataset."))
    dataset_split: str = field(default="train", metadata=_help("Split to train on."))
    prompt_column: str = field(default="prompt", metadata=_help("Column that holds the prompts."))
    max_prompts: int | None = field(default=None, metadata=_help("Train on the first so many prompts only."))
    eval_dataset: str | None = field(default=None, metadata=_help("Prompts to evaluate on, as `dataset`."))
    eval_split: str = field(default="test", metadata=_help("Split to evaluate on."))


@dataclass
class RewardArguments:
    """What to reward."""

    rewards: list[str] = field(
        default_factory=list,
        metadata=_help(
            "Names (ocr pickscore deqa aesthetic ...), calls ('deqa(model=\"path\")') or module:attribute."
        ),
    )
    monitors: list[str] = field(
        default_factory=list, metadata=_help("Rewards that evaluation reports and training never sees.")
    )


@dataclass
class LoraArguments:
    """The adapter."""

    lora_r: int = field(default=32, metadata=_help("Rank of the LoRA adapter; 0 trains all weights instead."))
    lora_alpha: int | None = field(default=None, metadata=_help("Scale of the adapter; None for twice the rank."))
    lora_target_modules: list[str] | None = field(
        default=None, metadata=_help("Layers to adapt; None for the attention layers of the model family.")
    )
    use_rslora: bool = field(default=False, metadata=_help("Scale by alpha / sqrt(r) instead of alpha / r."))


class TrainParser(TrlParser):
    """[`trl.TrlParser`] whose complaints are errors of one line."""

    def __init__(self) -> None:
        types = [ModelArguments, DataArguments, RewardArguments, LoraArguments, APEXConfig]
        super().__init__(types, prog="trl-apex train", allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}. `trl-apex train --help-all` lists all arguments.")

    def read(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """The five groups of arguments.

        Args:
            arguments (`Sequence[str]`): flags, with `--config FILE` for a YAML file.

        Raises:
            ValueError: for an unknown flag or key, or a value of the wrong type.
            FileNotFoundError: if there is no such YAML file.
        """
        given = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
        flags, unknown = list(given), []
        if "--config" in given:
            index = given.index("--config")
            if index + 1 == len(given):
                self.error("argument --config: expected a file")
            del flags[index : index + 2]
            unknown = [key for key in _keys(given[index + 1]) if key not in {action.dest for action in self._actions}]
        unknown += [flag.split("=")[0] for flag in self.parse_known_args(flags)[1] if flag.startswith("-")]
        if unknown:
            hints = "; ".join(self._hint(name) for name in unknown)
            raise ValueError(f"Every argument must be known. Found {hints}. Correct or remove it.")
        return self.parse_args_and_config(given)

    def _hint(self, name: str) -> str:
        plain = name.lstrip("-").replace("-", "_")
        close = difflib.get_close_matches(plain, [action.dest for action in self._actions], 1)
        return f"{name} (did you mean {close[0]}?)" if close else name


def _keys(path: str) -> list[str]:
    """The keys of a YAML file, `env` apart."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The configuration {path} must be valid YAML. Found: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"The configuration {path} must hold arguments as `name: value`. Found {type(content).__name__}."
        )
    return [str(key) for key in content if key != "env"]
