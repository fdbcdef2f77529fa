"""Runs files of checks by pytest on the simulated accelerator: `python run_checks.py FILE... [pytest's options]`."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:0] = [
        str(here),
        *(str(here.parent / name) for name in ("diffusion", "rewards", "robustness", "trainers")),
    ]
    os.environ["ACCELERATE_TORCH_DEVICE"] = "sim:0"

    import simulated_device

    simulated_device.install()

    import pytest

    status = pytest.main(["-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", *sys.argv[1:]])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
