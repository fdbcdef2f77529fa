"""What all benchmarks share: their arguments, the machine, processor time, and the compact files of results."""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl", "onnxruntime", "rapidocr", "numpy")


def arguments(description: str | None, smoke: str, **options: dict[str, Any]) -> argparse.ArgumentParser:
    """The parser of a benchmark: `--smoke`, whose help is `smoke`, `--out`, and for each of `options` what `add_argument` takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help=smoke)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    for name, option in options.items():
        parser.add_argument(f"--{name}", **option)
    return parser


def write(path: Path, result: dict[str, Any], table: str | None = None, digits: int = 6) -> None:
    """Write results as JSON, one entry of each list and dict a line, floats with `digits` digits; and the table beside it.

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
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n " + ",\n ".join(map(json.dumps, value)) + "]"
        elif isinstance(value, dict):
            text = "{\n " + ",\n ".join(f"{json.dumps(key)}: {json.dumps(one)}" for key, one in value.items()) + "}"
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


def table(head: list[str], rows: Iterable[list[str]], align: str = "---") -> str:
    """A Markdown table; `align` is the rule under every column but the first.

    Example:
        >>> print(table(["rule", "ms"], [["apex", "3.1"]], "---:"))
        | rule | ms |
        | --- | ---: |
        | apex | 3.1 |
    """
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error, which is NaN for a single value."""
    found = list(values)
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return statistics.mean(found), error


def slope(x: list[float], y: list[float]) -> tuple[float, float | None]:
    """Least-squares slope and its standard error, which is None for two points.

    Example:
        >>> slope([0, 1, 2], [1, 3, 5])
        (2.0, 0.0)
    """
    rise, start = statistics.linear_regression(x, y)
    if len(x) < 3:
        return rise, None
    left = sum((b - start - rise * a) ** 2 for a, b in zip(x, y, strict=True))
    return rise, math.sqrt(left / (len(x) - 2) / sum((a - statistics.mean(x)) ** 2 for a in x))


def machine() -> dict[str, Any]:
    """Processor, cores, load and the versions of what was measured."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    installed = {found.metadata["Name"].lower(): found.version for found in importlib.metadata.distributions()}
    versions = {name: installed.get(name) for name in PACKAGES}
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
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


class Phases:
    """Processor time of an iteration by phase: each mark closes the phase that it names.

    Phases are of the thread that marks. `reward` is what other threads took meanwhile, which score the rewards.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._whole, self._last = cpu_seconds(), time.thread_time()

    def mark(self, phase: str) -> None:
        now = time.thread_time()
        self.seconds[phase] += now - self._last
        self._last = now

    def stop(self, phase: str) -> None:
        """The last mark of an iteration."""
        self.mark(phase)
        self.seconds["reward"] = cpu_seconds() - self._whole - sum(self.seconds.values())


def status_mb(key: str) -> float:
    """Megabytes of this process: `VmRSS` is resident now, `VmHWM` the most so far."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"no {key} in the process status"
    return int(found[1]) / 1024


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
