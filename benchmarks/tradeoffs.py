"""The rules against each other on the tiny world: same base, same budget, same seeds.

    python benchmarks/tradeoffs.py [--part tradeoffs|ablation] [--workers 2]
    python benchmarks/tradeoffs.py --smoke --out runs/smoke     # three short runs, to see that it works
    python benchmarks/tradeoffs.py --redraw                     # tables and figures again, from the results

Every finished run is kept under `runs/` and then in the results, so that the command can be stopped and started again. No
setting was chosen on the seeds 1 to 5; seeds 0 and 100 were used for that.
"""

import json
import math
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _bench import arguments, machine, mean_and_error, table, write
from _tradeoff_figure import SHOWN, draw, objectives, shown_condition
from _tradeoff_run import ABLATIONS, APEX, BUDGET, CONDITIONS, OBJECTIVES, run

from trl_apex.aggregation import RULES

ONLY = [f"only_{name}" for name in OBJECTIVES]
# What a user tries by hand: more and more weight on the two objectives that lag, in the order of OBJECTIVES.
GRID = ["2_1_1_1", "4_1_1_1", "1_2_1_1", "1_4_1_1", "2_2_1_1", "4_4_1_1", "4_8_1_1", "8_4_1_1"]
TUNED = [f"tuned_{weights}" for weights in GRID]
SENSITIVE = ["apex", "sum_then_normalize", "dvao", "normalize_then_sum"]
SEEDS = range(1, 6)
PROMPTS = 64

SETTINGS: dict[str, Any] = {"budget": BUDGET, "apex": APEX, "test_prompts": PROMPTS}

COURSE = ("curve", "priorities")  # kept for the runs of the picture alone

Job = tuple[str, str, int]
Row = dict[str, Any]


def plan(part: str, seeds: Iterable[int]) -> list[Job]:
    """All runs of a part, seed by seed, so that a run that is stopped early holds whole seeds."""
    if part == "ablation":
        return [("long", f"apex:{name}" if name != "apex" else name, s) for s in seeds for name in ABLATIONS]
    methods: dict[str, list[str]] = {
        "natural": [*RULES, *ONLY, *TUNED],
        "field_units": SENSITIVE,
        "scaled": SENSITIVE,
        "conflict": list(RULES),
        "kl": ["apex", "sum_then_normalize", "normalize_then_sum", "mgda"],
        "long": ["apex", "sum_then_normalize", "normalize_then_sum", "tuned_4_8_1_1"],
    }
    return [(condition, method, seed) for seed in seeds for condition in methods for method in methods[condition]]


def key(row: Row) -> Job:
    return row["condition"], row["method"], row["seed"]


def finished(part: str, results: Path, folder: Path) -> list[Row]:
    """The rows of a part that are there, in the plan's order: in the results, if of the same settings, and in files."""
    order = {(condition, method): place for place, (condition, method, _) in enumerate(plan(part, [1]))}
    rows = {}
    if results.exists() and (kept := json.loads(results.read_text()))["settings"] == SETTINGS:
        rows = {key(row): row for row in unpacked(kept)}
    for path in sorted(folder.glob("*/*/*.json")):
        row = json.loads(path.read_text())
        rows[key(row)] = row
    mine = [row for row in rows.values() if key(row)[:2] in order]
    return sorted(mine, key=lambda row: (order[key(row)[:2]], row["seed"]))


def packed(rows: list[Row]) -> dict[str, Any]:
    """The rows as one table, and the course of the runs that the picture shows."""
    shown = shown_condition(row["condition"] for row in rows)
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in COURSE))
    courses = []
    for row in rows:
        if row["method"] in SHOWN and row["condition"] == shown and "curve" in row:
            priorities = row["priorities"] if row["method"] == "apex" else {}
            names = ("condition", "method", "seed", "curve")
            courses.append({**{name: row[name] for name in names}, "priorities": priorities})
    return {"columns": columns, "rows": [[row.get(name) for name in columns] for row in rows], "courses": courses}


def unpacked(found: dict[str, Any]) -> list[Row]:
    """The rows that [`packed`] made a table of."""
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    courses = {key(course): course for course in found["courses"]}
    return [row | courses.get(key(row), {}) for row in rows]


def execute(jobs: list[Job], workers: int, folder: Path, prompts: int, **changes: Any) -> None:
    """Run jobs; every row goes to a file of its own as soon as it is there."""
    context = get_context("forkserver")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(run, *job, prompts, folder, **changes): job for job in jobs}
        for done, future in enumerate(as_completed(futures), start=1):
            condition, method, seed = futures[future]
            row = future.result()
            path = folder / condition / method.replace(":", "-") / f"{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row))
            gains = ", ".join(f"{name} {row[f'gain/{name}']:+.2f}" for name in objectives(row))
            print(f"[{done}/{len(jobs)}] {condition} {method} {seed}: {gains} ({row['cpu_seconds']} s)", flush=True)


def summarize(rows: list[Row], reference: str = "apex") -> list[Row]:
    """A line a condition and method: every measure as (mean, standard error), and paired differences to `reference`."""
    lines = []
    for condition in CONDITIONS:
        here = [row for row in rows if row["condition"] == condition]
        reference_rows = {row["seed"]: row for row in here if row["method"] == reference}
        for method in dict.fromkeys(row["method"] for row in here):
            mine = [row for row in here if row["method"] == method]
            line: Row = {"condition": condition, "method": method, "seeds": len(mine)}
            for name in mine[0]:
                values = [row[name] for row in mine if row.get(name) is not None]
                if name not in ("condition", "method", "seed", *COURSE):
                    line[name] = mean_and_error(values) if values else None
            pairs = [(reference_rows[row["seed"]], row) for row in mine if row["seed"] in reference_rows]
            for name in ("worst_gain", "hypervolume_below_base"):
                if pairs and method != reference:
                    line[f"{reference}_minus/{name}"] = mean_and_error(
                        ours[name] - theirs[name] for ours, theirs in pairs
                    )
            lines.append(line)
    return lines


def cell(value: tuple[float, float] | None, digits: int = 2, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value[0]:{sign}.{digits}f}" + ("" if math.isnan(value[1]) else f" ± {value[1]:.{digits}f}")


def markdown(lines: list[Row]) -> str:
    """The summary as Markdown, a table a condition."""
    text = ""
    for condition in dict.fromkeys(line["condition"] for line in lines):
        here = [line for line in lines if line["condition"] == condition]
        names = objectives(here[0])
        # Heading, key of the line, decimals, sign.
        columns = [
            ("worst", "worst_gain", 2, "+"),
            ("mean", "mean_gain", 2, "+"),
            ("apex − it, worst", "apex_minus/worst_gain", 2, "+"),
            *((name, f"gain/{name}", 2, "+") for name in names),
            ("HV", "hypervolume", 3, ""),
            ("HV from −1", "hypervolume_below_base", 2, ""),
            ("apex − it, HV from −1", "apex_minus/hypervolume_below_base", 2, "+"),
            ("JDR", "jdr", 2, ""),
            ("JCR", "jcr", 2, ""),
            ("seesaw", "seesaw_rate", 2, ""),
            ("conflict rate", "conflict_rate", 2, ""),
            ("hijack index", "hijack_index", 2, ""),
            ("exact word", "held_out/exact_word", 2, "+"),
            ("attributes", "held_out/attributes", 2, "+"),
        ]
        head = ["method", "seeds", *(heading for heading, *_ in columns)]
        rows = [
            [line["method"], str(line["seeds"]), *(cell(line.get(key), *form) for _, key, *form in columns)]
            for line in here
        ]
        text += f"\n### {condition}\n\n{table(head, rows, '---:')}\n"
    return text


def main() -> None:
    given = arguments(
        __doc__,
        "three short runs, to see that it works",
        part={"choices": ("tradeoffs", "ablation"), "default": "tradeoffs"},
        conditions={"nargs": "*", "choices": tuple(CONDITIONS), "help": "only these"},
        methods={"nargs": "*", "help": "only these"},
        seeds={"type": int, "nargs": "*", "default": list(SEEDS)},
        workers={"type": int, "default": 2},
        redraw={"action": "store_true", "help": "only write tables and figures again, from the results"},
        runs={"type": Path, "default": Path("runs/tradeoffs"), "help": "where finished runs are kept"},
    ).parse_args()
    results = given.out / f"{given.part}.json"
    if given.redraw:
        found: dict[str, Any] = json.loads(results.read_text())
        rows = unpacked(found)
    elif given.smoke:
        given.runs = given.out / "runs"
        small = {"max_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 8, "generation_batch_size": 8}
        execute([("natural", method, 0) for method in ("apex", "mgda", "only_deqa")], 1, given.runs, 4, **small)
        found = {"settings": {**SETTINGS, "smoke": small}}
    else:
        jobs = [job for job in plan(given.part, given.seeds) if given.conditions is None or job[0] in given.conditions]
        jobs = [job for job in jobs if given.methods is None or job[1] in given.methods]
        there = {key(row) for row in finished(given.part, results, given.runs)}
        execute([job for job in jobs if job not in there], given.workers, given.runs, PROMPTS)
        found = {"settings": SETTINGS}
    if not given.redraw:
        rows = finished(given.part, results, given.runs)
        found |= {"machine": machine(), **packed(rows)}
    lines = summarize(rows)
    write(results, found, markdown(lines))
    print(markdown(lines))
    draw(rows, lines, results.with_suffix(".png"))


if __name__ == "__main__":
    main()
