"""The losses against each other on the tiny world: what the same images and the same processor time buy.

    python benchmarks/losses.py --part scan        # learning rates, on the development seeds 0 and 100
    python benchmarks/losses.py                    # five other seeds with the chosen rates: time to quality
    python benchmarks/losses.py --smoke --out runs/smoke
    python benchmarks/losses.py --redraw           # the tables again, from the results

    python benchmarks/losses.py --part guards      # `grpo` at a rate that breaks it, with each guard of the ratio
    python benchmarks/losses.py --part step_size   # `nft` from a third and three times its rate, with `target_movement`

Every finished run is kept under `runs/`, so that the command can be stopped and started again. The plan is in
docs/benchmarks.md, "The losses against each other".
"""

import json
from pathlib import Path
from typing import Any

from _bench import arguments, machine, mean_and_error, table, write
from _tradeoff_run import BUDGET, DEVELOPMENT, FINAL, FRESH, OBJECTIVES, PROMPTS, UPDATES, WATCHED, execute

from trl_apex.demo import HELD_OUT

GOAL = 0.25  # base standard deviations

OLD_START = {"baseline_prompts": 0}  # progress counts from the end of the warm-up, as when the kept results were made
SDE = {"loss_type": "grpo", "epsilon": 1e-3, "noise_level": 0.7, "num_iterations": UPDATES, **OLD_START}
# By name: the rule of the aggregator, and the loss. The budget is that of the comparison of the rules.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    # Flow-GRPO's loop: every step stochastic and trained, rewards summed and normalized.
    "plain": ("sum_then_normalize", {**SDE, "timestep_batch_size": 5, "timesteps_per_image": None}),
    "grpo": (
        "apex",
        {
            **SDE,
            "timestep_batch_size": 2,
            "timesteps_per_image": None,
            "sde_window_size": 2,
            "sde_window_range": [0, 4],
        },
    ),
    "awm": ("apex", {"loss_type": "awm", **FINAL, **OLD_START}),
    "nft": ("apex", {"loss_type": "nft", **FINAL, **OLD_START}),
    "fpo": ("apex", {"loss_type": "fpo", **FINAL, **OLD_START}),
}
SCANNED = {name: (1e-4, 3e-4) if name in ("plain", "grpo") else (1e-4, 2e-4) for name in METHODS}
MOVEMENT = 3.5e-4  # that of `nft` at its rate, seed 0: its mean over the run with `target_movement=inf`
CHOSEN = dict.fromkeys(METHODS, 1e-4)  # by the scan

Row = dict[str, Any]


def cost(row: Row, names: tuple[str, ...], kind: str) -> float | None:
    """What it had cost until the worst of `names` was `GOAL` above the base, between evaluations by a line; None if never."""
    column = ("images", "cpu_seconds", "rows").index(kind)
    before, low = 0.0, 0.0
    for gains, spent in zip(row["curve"][1:], row["cost"], strict=True):
        worst = min(gains[OBJECTIVES.index(name)] for name in names)
        if worst >= GOAL:
            share = (GOAL - low) / (worst - low)
            return before + share * (spent[column] - before)
        before, low = spent[column], worst
    return None


GUARDS: dict[str, tuple[float, dict[str, Any]]] = {  # learning rate, and what is added to `grpo`
    "clip": (3e-4, {}),
    "kl_mask": (3e-4, {"ratio_guard": "kl_mask"}),
    "grpo_guard": (3e-4, {"ratio_guard": "grpo_guard", "epsilon": 2e-6}),
}
STEP_SIZES: dict[str, tuple[float, dict[str, Any]]] = {  # learning rate, and what is added to `nft`
    "plain third": (3.3e-5, {}),
    "target third": (3.3e-5, {"target_movement": MOVEMENT}),
    "target tuned": (1e-4, {"target_movement": MOVEMENT}),
    "target triple": (3e-4, {"target_movement": MOVEMENT}),
    "plain triple": (3e-4, {}),
    # The same target for the demo's LoRA adapter, whose own rate is ten times as high.
    "plain lora": (1e-3, {"adapter": True}),
    "target lora third": (3.3e-4, {"adapter": True, "target_movement": MOVEMENT}),
    "target lora triple": (3e-3, {"adapter": True, "target_movement": MOVEMENT}),
}


def jobs_of(
    part: str, seeds: list[int] | None, prompts: int = PROMPTS, **changes: Any
) -> dict[str, tuple[tuple, dict[str, Any]]]:
    """Seed by seed, so that a run that is stopped early holds whole seeds."""
    if part in ("guards", "step_size"):
        variants, loss = (GUARDS, "grpo") if part == "guards" else (STEP_SIZES, "nft")
        rule, settings = METHODS[loss]
        return {
            f"{name}-{rate}-{seed}": (("natural", rule, rate, seed, prompts), {**settings, **added})
            for seed in seeds or FRESH[:3]
            for name, (rate, added) in variants.items()
        }
    if part == "scan":
        jobs = [(m, rate, seed) for seed in seeds or DEVELOPMENT for m in METHODS for rate in SCANNED[m]]
        prompts, changes = min(prompts, 96), {"max_steps": 80, "eval_steps": 20, **changes}
    else:
        jobs = [(method, CHOSEN[method], seed) for seed in seeds or FRESH for method in METHODS]
    found = {}
    for method, rate, seed in jobs:
        rule, loss = METHODS[method]
        found[f"{method}-{rate}-{seed}"] = ("natural", rule, rate, seed, prompts), {**loss, **changes}
    return found


def rows_of(jobs: dict[str, tuple[tuple, dict[str, Any]]], workers: int, folder: Path) -> list[Row]:
    """The finished runs, by the name of their loss."""
    dropped = ("condition", "specialist_share", "priorities")
    rows = zip(jobs, execute(jobs, workers, folder), strict=True)
    return [
        {**{k: v for k, v in row.items() if k not in dropped}, "method": name.partition("-")[0]} for name, row in rows
    ]


def cell(values: list[float | None], digits: int = 2, sign: str = "+", none: str = "never") -> str:
    """Mean and standard error; of costs, how many of the runs reached the goal where not all did, and `none` if no run did."""
    known = [value for value in values if value is not None]
    if not known:
        return none
    mean, error = mean_and_error(known)
    text = f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if len(known) > 1 else "")
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def summary(rows: list[Row]) -> str:
    """A line a method and rate: gains at the end, what the goal cost, and what the logs say of the updates."""
    lines, watched = [], [name for name in WATCHED if any(row.get("logs", {}).get(name) for row in rows)]
    for key in dict.fromkeys((row["method"], row["rate"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["rate"]) == key]
        lines.append(
            [
                key[0],
                f"{key[1]:g}",
                str(len(mine)),
                cell([r["worst_gain"] for r in mine]),
                cell([r["mean_gain"] for r in mine]),
            ]
            + [cell([row["gains"][name] for row in mine]) for name in OBJECTIVES]
            + [cell([row["held_out"][name] for row in mine]) for name in HELD_OUT]
            + [cell([cost(row, names, "cpu_seconds") for row in mine], 0, "") for names in (("ocr",), OBJECTIVES)]
            + [cell([cost(row, OBJECTIVES, kind) for row in mine], 0, "") for kind in ("images", "rows")]
            + [cell([row["logs"].get(name) for row in mine], 5, "", none="") for name in watched]
        )
    head = ["loss", "rate", "seeds", "worst", "mean", *OBJECTIVES, "exact word", "attributes"]
    head += ["CPU-s, OCR +.25", "CPU-s, all +.25", "images, all +.25", "rows, all +.25", *watched]
    return table(head, lines, "---:") + "\n"


def main() -> None:
    given = arguments(
        __doc__,
        "two short runs, to see that it works",
        part={"choices": ("scan", "compare", "guards", "step_size"), "default": "compare"},
        seeds={"type": int, "nargs": "*"},
        workers={
            "type": int,
            "default": 1,
            "help": "processes; times are of the processor, but two disturb each other",
        },
        redraw={"action": "store_true", "help": "only write the tables again"},
        runs={"type": Path, "default": Path("runs/losses"), "help": "where finished runs are kept"},
    ).parse_args()
    path = given.out / ("losses.json" if given.part == "compare" else f"losses_{given.part}.json")
    if given.redraw:
        found = json.loads(path.read_text())
    elif given.smoke:
        small = {"max_steps": 4, "eval_steps": 2, "per_device_train_batch_size": 8, "generation_batch_size": 8}
        jobs = jobs_of("scan", [0], 8, **small)
        jobs = {name: job for name, job in jobs.items() if name.startswith(("plain-0.0001", "fpo-0.0001"))}
        found = {"settings": small, "rows": rows_of(jobs, 1, given.out / "runs")}
    else:
        rows = rows_of(jobs_of(given.part, given.seeds), given.workers, given.runs)
        found = {"machine": machine(), "budget": BUDGET, "methods": METHODS, "rows": rows}
    write(path, found, summary(found["rows"]), digits=4)
    if given.part == "compare":
        times = [
            {
                "method": row["method"],
                "seed": row["seed"],
                "cpu_seconds_ocr": cost(row, ("ocr",), "cpu_seconds"),
                "cpu_seconds_all": cost(row, OBJECTIVES, "cpu_seconds"),
            }
            for row in found["rows"]
        ]
        write(given.out / "time_to_quality.json", {"rows": times}, digits=4)


if __name__ == "__main__":
    main()
