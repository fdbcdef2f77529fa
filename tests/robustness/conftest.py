"""Figures that the tests measure: printed at the end, and kept where RELIABILITY_JSON says."""

import json
import os
import platform
from pathlib import Path

import pytest
import torch

_FIGURES: dict = {}


@pytest.fixture
def figure():
    """A function that notes a measured figure under a name."""

    def note(name: str, value) -> None:
        _FIGURES[name] = value

    return note


def pytest_terminal_summary(terminalreporter) -> None:
    outcomes = [
        (kind, report.nodeid) for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])
    ]
    outcomes = [(kind, node) for kind, node in outcomes if "tests/robustness/" in node]
    if not outcomes:
        return
    _FIGURES["cases"] = {"tried": len(outcomes), "held": sum(kind == "passed" for kind, _ in outcomes)}
    terminalreporter.section("figures")
    for name, value in sorted(_FIGURES.items()):
        terminalreporter.write_line(f"{name}: {json.dumps(value)}")
    if os.environ.get("RELIABILITY_JSON"):
        file = Path(os.environ["RELIABILITY_JSON"])
        before = json.loads(file.read_text())["figures"] if file.exists() else {}  # of tests that were not run now
        settings = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
        content = {"settings": settings, "figures": dict(sorted({**before, **_FIGURES}.items()))}
        file.write_text(json.dumps(content, indent=1) + "\n")
