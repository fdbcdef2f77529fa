"""What a run directory keeps about how the run was made: its arguments, its command, and its warnings."""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..redact import redacted

PACKAGES = (
    *("trl_apex", "torch", "trl", "transformers", "diffusers", "accelerate", "peft", "datasets", "huggingface_hub"),
    *("safetensors", "numpy", "pillow", "deepspeed", "torchjd", "rapidocr", "onnxruntime", "fastapi", "matplotlib"),
)


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter; optional ones may be missing."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def record_arguments(output_dir: Path, groups: Sequence[Any], command: str) -> None:
    """Write `config.json` (every argument) and `environment.json`, without secrets.

    `environment.json` holds the command, the date, the versions, and the names of the arguments that differ from their
    defaults.

    Args:
        output_dir (`Path`): the run directory; made if needed.
        groups (`Sequence`): dataclass instances, such as an [`APEXConfig`].
        command (`str`): the command line.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {}
    changed = []
    for group in groups:
        arguments |= group.to_dict() if hasattr(group, "to_dict") else vars(group)
        for f in fields(group):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if getattr(group, f.name, default) != default:
                changed.append(f.name)
    date = datetime.now().astimezone().isoformat(" ", "minutes")
    record = {"command": command, "date": date, "changed": changed, "versions": versions()}
    for name, content in (("config.json", dict(sorted(arguments.items()))), ("environment.json", record)):
        (output_dir / name).write_text(json.dumps(redacted(content), indent=1, default=str))


@contextmanager
def recorded_warnings(output_dir: Path | None, trainer: Any) -> Iterator[None]:
    """Append this package's warnings to `warnings.jsonl`, each once, and show them as usual.

    Args:
        output_dir (`Path`, *optional*): None records nothing.
        trainer: its step is recorded with each warning.
    """
    if output_dir is None:
        yield
        return
    seen: set[str] = set()

    def record(text: str) -> None:
        text = str(redacted(" ".join(text.split())))
        if text not in seen:
            seen.add(text)
            with (output_dir / "warnings.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": trainer.state.global_step, "text": text}) + "\n")

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: record(entry.getMessage())  # type: ignore[method-assign, assignment, misc]
    package = logging.getLogger("trl_apex")
    with warnings.catch_warnings():  # puts `showwarning` back at the end
        show = warnings.showwarning

        def show_and_record(message, category, filename, lineno, file=None, line=None):
            if "trl_apex" in filename or category.__module__.startswith("trl_apex"):
                record(str(message))
            show(message, category, filename, lineno, file, line)

        warnings.showwarning = show_and_record
        package.addHandler(handler)
        try:
            yield
        finally:
            package.removeHandler(handler)
