"""The trainers and rewards on a simulated accelerator: each file of checks in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("checks", sorted(path.name for path in HERE.glob("checks_*.py")))
def test_all_checks_pass_on_the_simulated_accelerator(checks):
    command = [sys.executable, str(HERE / "run_checks.py"), str(HERE / checks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
