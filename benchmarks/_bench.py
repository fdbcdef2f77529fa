"""What all benchmarks share: their arguments, the machine, processor time, and the compact files of results."""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl", "onnxruntime", "rapidocr", "numpy")


def arguments(description: str | None, smoke: str, **options: dict[str, Any]) -> argparse.ArgumentParser:
    """The parser of a benchmark: `--smoke`, `--out`, and its own options by name.

    Args:
        description (`str`): The module's docstring.
        smoke (`str`): What `--smoke` runs.
        **options: Keyword arguments of `add_argument` for `--NAME`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help=smoke)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    for name, option in options.items():
        parser.add_argument(f"--{name}", **option)
    return parser


def write(path: Path, result: dict[str, Any], table: str | None = None, digits: int = 6) -> None:
    """Writes results as JSON with one row a line and rounded numbers, and the Markdown table beside it.

    Args:
        path (`Path`): The JSON file; its folder is made. The table gets the same name with `.md`.
        result (`dict`): Lists and dicts at the first level are written one entry a line.
        table (`str`, *optional*): Markdown.
        digits (`int`, *optional*, defaults to 6): Significant digits of floats.

    Example:
        >>> path = getfixture("tmp_path") / "found.json"
        >>> write(path, {"seed": 0, "rows": [{"x": 1 / 3}, {"x": 2.0}]})
        >>> print(path.read_text())
        {
        "seed": 0,
        "rows": [
         {"x": 0.333333},
         {"x": 2.0}]
        }
    """
    parts = []
    for name, value in rounded(result, digits).items():
        if isinstance(value, list):
            text = "[\n " + ",\n ".join(map(json.dumps, value)) + "]"
        elif isinstance(value, dict):
            text = "{\n " + ",\n ".join(f"{json.dumps(key)}: {json.dumps(one)}" for key, one in value.items()) + "}"
        else:
            text = json.dumps(value)
        parts.append(f"{json.dumps(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    if table is not None:
        path.with_suffix(".md").write_text(table, encoding="utf-8")


def rounded(value: Any, digits: int) -> Any:
    """The same structure with floats of so many significant digits."""
    if isinstance(value, dict):
        return {key: rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def machine() -> dict[str, Any]:
    """Processor, cores, load and the versions of what was measured."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def cpu_seconds() -> float:
    """Processor time of this process so far, all its threads and the children that have ended (e.g. a compiler)."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def ratio(base: list[float], mine: list[float]) -> tuple[float, float | None]:
    """How many times faster than `base`: ratio of medians, and its standard error.

    The runs are paired (one of each kind a round), so the error is that of the paired log ratios' median, 1.2533 times that
    of their mean for normal noise; None where there is one round only.
    """
    logs = [math.log(b / m) for b, m in zip(base, mine, strict=True)]
    found = statistics.median(base) / statistics.median(mine)
    if len(logs) < 2:
        return found, None
    return found, found * 1.2533 * statistics.stdev(logs) / math.sqrt(len(logs))
