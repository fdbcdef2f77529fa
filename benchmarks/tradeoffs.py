"""The rules against each other on the tiny world: same base, same budget, same seeds.

    python benchmarks/tradeoffs.py --part scan [--workers 2]        # learning rates, on the development seeds 0 and 100
    python benchmarks/tradeoffs.py [--part tradeoffs|ablation] [--workers 2]
    python benchmarks/tradeoffs.py --reward my_rewards:redness --seeds 7 8 9    # with a reward of yours as a fifth objective
    python benchmarks/tradeoffs.py --smoke --out runs/smoke     # three short runs, to see that it works
    python benchmarks/tradeoffs.py --redraw                     # tables and figures again, from the results

Every finished run is kept under `runs/` and then in the results, so that the command can be stopped and started again. The plan
is in docs/benchmarks.md, "The rules against each other".
"""

import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _bench import arguments, machine, mean_and_error, rounded, table, write
from _tradeoff_figure import SHOWN, draw, draw_objectives, shown_condition
from _tradeoff_run import (
    ABLATIONS,
    BASELINE,
    BUDGET,
    CONDITIONS,
    DEVELOPMENT,
    FRESH,
    LOSS,
    OBJECTIVES,
    PROMPTS,
    QUICK,
    REMEDIES,
    execute,
)

from trl_apex.aggregation import RULES, ApexOptions
from trl_apex.rewards.registry import load_reward

ONLY = [f"only_{name}" for name in OBJECTIVES]
# What a user tries by hand: more and more weight on the two objectives that lag, in the order of OBJECTIVES.
GRID = ["2_1_1_1", "4_1_1_1", "1_2_1_1", "1_4_1_1", "2_2_1_1", "4_4_1_1", "4_8_1_1", "8_4_1_1"]
TUNED = [f"tuned_{weights}" for weights in GRID]
FIRST = ["apex", "sum_then_normalize", "normalize_then_sum"]
NEEDS = ["apex:quick", "apex:weak_need", "apex:mild_need", "apex:need_coef_2"]
SCALES = ["pooled_scale", "pooled_scale_unclipped", "full_scale", "full_scale_unclipped", "tight_clip"]  # of scores
METHODS: dict[str, list[str]] = {  # by condition, in the order in which they are run
    "natural": [
        *FIRST,
        "apex:quick",
        "apex:weak_need",
        "apex:mild_need",
        *ONLY,
        *TUNED,
        *(rule for rule in RULES if rule not in FIRST),
    ],
    "conflict": [*RULES, *NEEDS, "apex:full_scale", "apex:without_conflict", "apex:without_potential"],
    "mixed": [*RULES, *NEEDS, "apex:full_scale"],
    "few_prompts": [
        *RULES,
        *NEEDS,
        *(f"apex:{name}" for name in SCALES),
        *(f"apex:quick:{name}" for name in REMEDIES),
        *(f"{name}:kl" for name in FIRST[1:]),
        "tuned_4_4_1_1",
    ],
    "long": [*FIRST, "apex:quick", "apex:quick:kl", *ONLY, "tuned_4_4_1_1", "tuned_4_8_1_1"],
    "field_units": ["sum_then_normalize", "dvao"],  # scores of the others do not depend on units
    "scaled": ["sum_then_normalize", "dvao"],
}
RATES = (1e-4, 2e-4)
SCAN: dict[str, Any] = {"max_steps": 80, "eval_steps": 20}  # 40 iterations, as the scan of the losses
SCAN_PROMPTS = 96
CHOSEN = {
    "sum_then_normalize": 2e-4,
    "only_ocr": 2e-4,  # these two by the scan; all others train best with the first rate
    "apex:quick:half_rate": 5e-5,
}

SETTINGS: dict[str, Any] = {
    "budget": BUDGET,
    "loss": LOSS,
    "apex": {name: getattr(ApexOptions(), name) for name in QUICK},
    "quick": QUICK,
    "baseline": BASELINE,
    "test_prompts": PROMPTS,
}

COURSE = ("curve", "priorities", "cost", "logs")  # kept for the runs of the picture alone

PARTS = ("scan", "tradeoffs", "ablation")

Job = tuple[str, str, float, int]
Row = dict[str, Any]


def plan(part: str, seeds: Iterable[int] | None = None) -> list[Job]:
    """All runs of a part, those that say most first. A part that is a reward compares three rules with it."""
    if part == "scan":
        return [("natural", m, rate, s) for s in seeds or DEVELOPMENT for m in (*ONLY, *RULES) for rate in RATES]
    fresh = list(seeds or FRESH)
    if part not in PARTS:
        return [(part, method, rate_of(method), s) for method in FIRST for s in fresh]
    if part == "ablation":
        return [("natural", f"apex:{name}", rate_of("apex"), s) for s in fresh for name in ABLATIONS]
    return [(c, m, rate_of(m), s) for c, methods in METHODS.items() for m in methods for s in fresh]


def rate_of(method: str) -> float:
    """The learning rate of a method; tuned weights use that of the sum, and what is changed in a method its own or the method's."""
    rule = "sum_then_normalize" if method.startswith("tuned") else method.partition(":")[0]
    return CHOSEN.get(method, CHOSEN.get(rule, RATES[0]))


def named(jobs: list[Job], prompts: int, **changes: Any) -> dict[str, tuple[tuple, dict[str, Any]]]:
    """The jobs by the name of their file."""
    return {re.sub(r"[^\w.-]+", "-", "-".join(map(str, job))): ((*job, prompts), changes) for job in jobs}


def key(row: Row) -> Job:
    return row["condition"], row["method"], row["rate"], row["seed"]


def finished(part: str, results: Path, folder: Path) -> list[Row]:
    """The rows of a part that are there, in the plan's order: in the results, if of the same settings, and in files."""
    order = {job[:3]: place for place, job in enumerate(plan(part))}
    rows = {}
    if results.exists() and (kept := json.loads(results.read_text()))["settings"] == SETTINGS:
        rows = {key(row): row for row in kept["rows"]}
    for path in sorted(folder.glob("*.json")):
        row = rounded(json.loads(path.read_text()), 4)
        rows[key(row)] = row
    mine = [row for row in rows.values() if key(row)[:3] in order]
    return with_shares(sorted(mine, key=lambda row: (order[key(row)[:3]], row["seed"])))


def with_shares(rows: list[Row]) -> list[Row]:
    """Each run's share of the specialists' mean gain, by objective; without the course of runs that are not drawn."""
    alone: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        own = row["method"].removeprefix("only_")
        if own != row["method"]:
            alone.setdefault((row["condition"], own), []).append(row["gains"][own])
    shown = shown_condition(row["condition"] for row in rows) if rows else ""
    found = []
    for row in rows:
        shares = {}
        for name, gain in row["gains"].items():
            best = statistics.mean(alone.get((row["condition"], name), [0.0]))
            if best > 0:
                shares[name] = round(gain / best, 3)
        drawn = row["method"] in SHOWN and row["condition"] == shown
        kept = {name: value for name, value in row.items() if drawn or name not in COURSE}
        found.append({**kept, "specialist_share": shares or None})
    return found


def reference_of(rows: list[Row]) -> str:
    """The method that all others are compared with."""
    return "apex" if any(row["method"] == "apex" for row in rows) else "apex:quick"


def summarize(rows: list[Row]) -> list[Row]:
    """A line a condition, method and rate: every measure as (mean, standard error), and the reference minus it, paired."""
    reference = reference_of(rows)
    lines = []
    for condition, method, rate in dict.fromkeys(key(row)[:3] for row in rows):
        mine = [row for row in rows if key(row)[:3] == (condition, method, rate)]
        ours = {row["seed"]: row for row in rows if row["condition"] == condition and row["method"] == reference}
        measures = [measures_of(row) for row in mine]
        line: Row = {"condition": condition, "method": method, "rate": rate, "seeds": len(mine)}
        line |= {name: mean_and_error(m[name] for m in measures if name in m) for name in measures[0]}
        if method != reference:
            pairs = [(ours[row["seed"]], row) for row in mine if row["seed"] in ours]
            for name in ("worst_gain", "mean_gain", "hypervolume"):
                if pairs:
                    line[f"minus/{name}"] = mean_and_error(a[name] - b[name] for a, b in pairs)
        lines.append(line)
    return lines


def measures_of(row: Row) -> dict[str, float]:
    """The numbers of a row by name."""
    found = {name: row[name] for name in ("worst_gain", "mean_gain", "hypervolume", "jdr", "seesaw_rate")}
    for kind in ("gains", "held_out"):
        found |= {f"{kind}/{name}": value for name, value in row[kind].items()}
    if row["specialist_share"]:
        found["specialist_share"] = min(row["specialist_share"].values())
    found["lifted"] = statistics.mean(row["gains"][name] > 2 * row["errors"][name] for name in row["gains"])
    return found


def cell(value: tuple[float, float] | None, digits: int = 2, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value[0]:{sign}.{digits}f}" + ("" if math.isnan(value[1]) else f" ± {value[1]:.{digits}f}")


def markdown(lines: list[Row]) -> str:
    """The summary as Markdown, a table a condition."""
    text, less = "", f"{reference_of(lines)} − it"
    for condition in dict.fromkeys(line["condition"] for line in lines):
        here = [line for line in lines if line["condition"] == condition]
        names = [name.removeprefix("gains/") for name in here[0] if name.startswith("gains/")]
        # Heading, key of the line, decimals, sign.
        columns = [
            ("worst", "worst_gain", 2, "+"),
            (less, "minus/worst_gain", 2, "+"),
            ("mean", "mean_gain", 2, "+"),
            (less, "minus/mean_gain", 2, "+"),
            ("hypervolume", "hypervolume", 3, ""),
            (less, "minus/hypervolume", 3, "+"),
            *((name, f"gains/{name}", 2, "+") for name in names),
            ("lifted by 2 SE", "lifted", 2, ""),
            ("least share of a specialist's gain", "specialist_share", 2, ""),
            ("better in all", "jdr", 2, ""),
            ("seesaw", "seesaw_rate", 2, ""),
            ("exact word", "held_out/exact_word", 2, "+"),
            ("attributes", "held_out/attributes", 2, "+"),
        ]
        head = ["method", "rate", "seeds", *(heading for heading, *_ in columns)]
        rows = [
            [line["method"], f"{line['rate']:g}", str(line["seeds"])]
            + [cell(line.get(key), *form) for _, key, *form in columns]
            for line in here
        ]
        text += f"\n### {condition}\n\n{table(head, rows, '---:')}\n"
    return text


def main() -> None:
    given = arguments(
        __doc__,
        "three short runs, to see that it works",
        part={"choices": PARTS, "default": "tradeoffs"},
        reward={"help": "in place of a part: a reward, as `load_reward` takes it"},
        conditions={"nargs": "*", "choices": tuple(CONDITIONS), "help": "only these"},
        methods={"nargs": "*", "help": "only these"},
        seeds={"type": int, "nargs": "*", "help": "only these"},
        workers={"type": int, "default": 2},
        redraw={"action": "store_true", "help": "only write tables and figures again, from the results"},
        runs={"type": Path, "help": "where finished runs are kept; by default runs/PART"},
    ).parse_args()
    scan, name = given.part == "scan", "own" if given.reward else given.part
    if given.reward:
        load_reward(given.reward)  # now, not in every process
        given.part = given.reward
    given.runs = given.runs or Path("runs") / name
    results = given.out / f"{'tradeoffs_scan' if scan else name}.json"
    if given.redraw:
        found: dict[str, Any] = json.loads(results.read_text())
    elif given.smoke:
        small = {"max_steps": 4, "eval_steps": 2, "per_device_train_batch_size": 8, "generation_batch_size": 8}
        jobs = [("natural", method, RATES[0], 0) for method in ("apex", "mgda", "only_deqa")]
        rows = execute(named([*jobs, ("mixed", "apex", RATES[0], 0)], 4, **small), 1, given.out / "runs")
        found = {"settings": {**SETTINGS, "smoke": small}, "rows": with_shares(rows)}
    else:
        jobs = [job for job in plan(given.part, given.seeds) if given.conditions is None or job[0] in given.conditions]
        jobs = [job for job in jobs if given.methods is None or job[1] in given.methods]
        there = {key(row) for row in finished(given.part, results, given.runs)}
        left = [job for job in jobs if job not in there]
        execute(named(left, SCAN_PROMPTS, **SCAN) if scan else named(left, PROMPTS), given.workers, given.runs)
        found = {"settings": SETTINGS, "machine": machine(), "rows": finished(given.part, results, given.runs)}
    lines = summarize(found["rows"])
    write(results, found, markdown(lines), digits=4)
    draw(found["rows"], lines, results.with_suffix(".png"))
    draw_objectives(lines, results.with_name(f"{results.stem}_objectives.png"))


if __name__ == "__main__":
    main()
