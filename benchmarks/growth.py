"""How the cost of an iteration grows with objectives, group size, resolution and processes.

    python benchmarks/growth.py [--smoke] [--rounds 3] [--out benchmarks/results]

Processor seconds of whole `APEXTrainer` iterations (apex rule), all sizes in turns. The rewards cost next to nothing, so
that what is seen is the trainer's share: a real reward adds its own time, once per objective and image. With two
processes the same images are shared out, and the processor time of both is added up. `exponent` is the slope of log
seconds over log size, with the standard error of the fit; 0 is constant, 1 linear.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from _bench import arguments, machine, slope, table, write
from _loops import Work
from _speed import Model, TrainerRun, prompts, quiet, timed
from matplotlib.figure import Figure
from torch import Tensor

SMALL = Work(groups=1, group=8, batch=8, side=32, steps=4, guidance=1.0, rank=16)
FINE = Work(groups=1, group=2, batch=2, side=32, steps=3, guidance=1.0, rank=32)
WORKERS = "TRL_APEX_GROWTH_WORKER"  # set in the processes that this script starts


def objectives(count: int) -> list[Callable]:
    """As many different reward functions that cost next to nothing."""

    def brightness_of(part: int) -> Callable:
        def score(prompts: list[str], completions: Any, images: Tensor, **columns: Any) -> list[float]:
            return images[:, part % 3].flatten(1)[:, part::16].mean(1).tolist()

        score.__name__ = f"brightness_{part}"
        return score

    return [brightness_of(part) for part in range(count)]


def in_turns(runs: dict[int, TrainerRun], rounds: int) -> dict[int, list[float]]:
    """Processor seconds of an iteration of each run, `rounds` times, after one to warm up."""
    for run in runs.values():
        run.iteration()
    seconds: dict[int, list[float]] = {size: [] for size in runs}
    for _ in range(rounds):
        for size, run in runs.items():
            seconds[size].append(timed(run.iteration)[0])
    for run in runs.values():
        run.close()
    return seconds


def started(model: Model, work: Work, rewards: int = 4, **options: Any) -> TrainerRun:
    options["multi_objective_aggregation"] = "apex"
    return TrainerRun(model.fresh(), objectives(rewards), prompts(16), work, seed=0, **options)


def in_processes(count: int, rounds: int) -> list[float]:
    """Processor seconds of an iteration, of all processes together."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        command += [__file__, "--rounds", str(rounds)]
        environment = {**os.environ, WORKERS: folder, "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(command, env=environment, check=True, timeout=600)
        each = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank*.json"))]
    assert len(each) == count, f"{len(each)} of {count} processes reported"
    return [sum(turn) for turn in zip(*each, strict=True)]


def worker(folder: Path, rounds: int) -> None:
    """One of the processes: its share of the images."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    work = replace(SMALL, batch=SMALL.batch // world)
    run = started(Model("tiny"), work, generation_batch_size=SMALL.samples)
    (folder / f"rank{rank}.json").write_text(json.dumps(in_turns({0: run}, rounds)[0]))


def fit(seconds: dict[int, list[float]]) -> tuple[float, float | None]:
    """Slope of log seconds over log size, and its standard error (None without rounds to judge by)."""
    points = [(math.log(size), math.log(value)) for size, values in seconds.items() for value in values]
    found, error = slope(*zip(*points, strict=True))
    return found, error if len(points) > len(seconds) else None


def row(what: str, unit: str, seconds: dict[int, list[float]]) -> dict[str, Any]:
    exponent, error = fit(seconds)
    cost = [{"size": size, "cpu_seconds": statistics.median(each), "each": each} for size, each in seconds.items()]
    return {"what": what, "unit": unit, "exponent": exponent, "exponent_se": error, "cost": cost}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = []
    for found in rows:
        error = "" if found["exponent_se"] is None else f" ± {found['exponent_se']:.2f}"
        cost = ", ".join(f"{point['size']}: {point['cpu_seconds']:.3f}" for point in found["cost"])
        lines.append([f"{found['what']} ({found['unit']})", f"{found['exponent']:.2f}{error}", cost])
    return table(["grows with", "exponent", "processor seconds of an iteration"], lines) + "\n"


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(3.2 * len(rows), 3), layout="constrained")
    axes = figure.subplots(1, len(rows), sharey=True)
    for axis, found in zip(axes, rows, strict=True):
        sizes = [point["size"] for point in found["cost"]]
        for point in found["cost"]:
            axis.plot([point["size"]] * len(point["each"]), point["each"], ".", color="#8aa8c8")
        axis.plot(sizes, [point["cpu_seconds"] for point in found["cost"]], color="#1f4e79")
        axis.set(xscale="log", yscale="log", xlabel=found["unit"], title=f"{found['what']}: {found['exponent']:.2f}")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
        axis.minorticks_off()
    axes[0].set_ylabel("processor seconds of an iteration")
    figure.savefig(path, dpi=110)


def main() -> None:
    rounds = {"type": int, "default": 3}
    given = arguments(__doc__, "two sizes each, one round, one process", rounds=rounds).parse_args()
    quiet()
    if WORKERS in os.environ:
        worker(Path(os.environ[WORKERS]), given.rounds)
        return
    rounds = 1 if given.smoke else given.rounds
    counts = [1, 4] if given.smoke else [1, 2, 4, 8, 16]
    groups = [2, 4] if given.smoke else [2, 4, 8, 16, 32]
    small = replace(SMALL, group=2, batch=2) if given.smoke else SMALL
    settings = {"machine": machine(), "threads": 1, "seed": 0, "rounds": rounds}
    settings |= {"work": {"tiny": vars(small), "resolution": vars(FINE)}}
    rows: list[dict[str, Any]] = []

    def add(what: str, unit: str, seconds: dict[int, list[float]]) -> None:
        rows.append(row(what, unit, seconds))
        write(given.out / "growth.json", {"settings": settings, "rows": rows}, markdown(rows))
        print(markdown(rows[-1:]), flush=True)

    tiny = Model("tiny")
    runs = {count: started(tiny, small, count) for count in counts}
    add("objectives", "number", in_turns(runs, rounds))
    runs = {size: started(tiny, replace(small, group=size, batch=size)) for size in groups}
    add("group size", "images of a prompt", in_turns(runs, rounds))
    if not given.smoke:
        add("processes", "number", {count: in_processes(count, rounds) for count in (1, 2)})
        mid = Model("mid")
        runs = {side: started(mid, replace(FINE, side=side)) for side in (32, 64, 96)}
        add("resolution", "pixels", {side * side: values for side, values in in_turns(runs, rounds).items()})
    picture(rows, given.out / "growth.png")


if __name__ == "__main__":
    main()
