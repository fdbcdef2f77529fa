"""Fixtures of the checks, which only `run_checks.py` collects."""

import os

collect_ignore_glob = [] if "ACCELERATE_TORCH_DEVICE" in os.environ else ["checks_*.py"]
