"""`trl-apex benchmark`: the scripts of the repository's `benchmarks/` folder."""

import argparse
import runpy
import sys
from pathlib import Path


def run(arguments: list[str]) -> None:
    """Run a benchmark by name, with the rest of the arguments.

    Raises:
        ValueError: if there is no such benchmark here.
    """
    parser = argparse.ArgumentParser(prog="trl-apex benchmark", description="Runs benchmarks/NAME.py of a checkout.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="without it, the names are listed")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="arguments of the benchmark")
    given = parser.parse_args(arguments)
    folders = [Path.cwd() / "benchmarks", Path(__file__).parents[2] / "benchmarks"]
    scripts = {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("[!_]*.py"))}
    if not scripts:
        raise ValueError(
            f"Benchmarks belong to the repository, not to the installed package. Found no folder {folders[0]}. "
            "Clone the repository and run this in it."
        )
    if given.name is None:
        print("\n".join(sorted(scripts)))
        return
    name = given.name.replace("-", "_")
    if name not in scripts:
        raise ValueError(f"A benchmark must be one of {', '.join(sorted(scripts))}. Found {given.name!r}.")
    sys.argv = [str(scripts[name]), *given.rest]
    sys.path.insert(0, str(scripts[name].parent))
    runpy.run_path(str(scripts[name]), run_name="__main__")
