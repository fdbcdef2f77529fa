"""`trl-apex demo`."""

import argparse
from pathlib import Path


def run(arguments: list[str]) -> None:
    """Train the tiny pipeline on its four rewards and write everything into a folder."""
    parser = argparse.ArgumentParser(
        prog="trl-apex demo",
        description="Trains a tiny Stable Diffusion 3 pipeline on four rewards, on a CPU, in minutes.",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    given = parser.parse_args(arguments)

    from ..demo import run_demo

    run_demo(output_dir=given.output_dir, seed=given.seed)
