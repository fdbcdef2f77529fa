"""On what a benchmark ran, and the processor time that it took."""

import importlib.metadata
import math
import os
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl", "onnxruntime", "rapidocr", "numpy")


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
