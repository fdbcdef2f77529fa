"""The trainers, rewards and rules on a simulated accelerator, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_all_checks_pass_on_the_simulated_accelerator():
    command = [sys.executable, str(HERE / "run_checks.py"), *map(str, sorted(HERE.glob("checks_*.py")))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
