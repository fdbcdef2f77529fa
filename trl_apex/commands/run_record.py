"""What a run directory keeps about how the run was made: its arguments, its command, and its warnings."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..redact import redacted
from .env import versions


def write_arguments(output_dir: Path, arguments: dict[str, Any], command: str) -> None:
    """Write `config.json` and `environment.json`, without secrets.

    Args:
        output_dir (`Path`): the run directory; made if needed.
        arguments (`dict`): every argument by name.
        command (`str`): the command line.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", arguments),
        ("environment.json", {"command": command, "versions": versions()}),
    ):
        (output_dir / name).write_text(
            json.dumps(redacted(content), indent=1, default=str, sort_keys=name == "config.json")
        )


@contextmanager
def recorded_warnings(output_dir: Path | None, trainer: Any) -> Iterator[None]:
    """Append this package's warnings to `warnings.jsonl`, each once, while they are shown as usual.

    Args:
        output_dir (`Path`, *optional*): None records nothing.
        trainer: whose step is recorded with each.
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

    show = warnings.showwarning

    def show_and_record(message, category, filename, lineno, file=None, line=None):
        if "trl_apex" in filename or category.__module__.startswith("trl_apex"):
            record(str(message))
        show(message, category, filename, lineno, file, line)

    handler = _Recorder(record)
    logger = logging.getLogger("trl_apex")
    logger.addHandler(handler)
    warnings.showwarning = show_and_record
    try:
        yield
    finally:
        warnings.showwarning = show
        logger.removeHandler(handler)


class _Recorder(logging.Handler):
    def __init__(self, record: Any) -> None:
        super().__init__(logging.WARNING)
        self._record = record

    def emit(self, record: logging.LogRecord) -> None:
        self._record(record.getMessage())
