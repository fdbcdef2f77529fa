"""Time and memory of the aggregator for large batches and many objectives.

    python benchmarks/aggregation_scale.py [--smoke] [--out benchmarks/results]

Every case runs in a forked process of its own, on one thread: the time is the processor's, best of a few calls, the
memory the rise of the process's high-water mark over the inputs. `exponent` is the slope of log time over log rows from 10^4
rows on: 1 is linear.
"""

import math
import multiprocessing
import platform
import time
from typing import Any

import torch
from _bench import arguments, slope, status_mb, table, write

from trl_apex.aggregation import RULES, MultiObjectiveRewardAggregator

GROUP = 24
TYPICAL = (1152, 4)  # 48 prompts x 24 images, four rewards


def measure(rule: str, rows: int, objectives: int) -> dict[str, Any]:
    """Best seconds and extra megabytes of one aggregation."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(rows, objectives, generator=generator) for _ in range(2)]
    groups = torch.arange(rows) // GROUP
    aggregator = MultiObjectiveRewardAggregator([f"r{k}" for k in range(objectives)], rule=rule)
    few = GROUP if rows >= 10**5 else rows
    aggregator(batches[0][:few], groups[:few])  # first-call costs of torch are not the aggregator's
    before = status_mb("VmRSS")
    best, start, calls = math.inf, time.process_time(), 0
    while calls < 2 or (time.process_time() - start < 0.3 and calls < 100):
        begin = time.process_time()
        aggregator(batches[calls % 2], groups)
        best = min(best, time.process_time() - begin)
        calls += 1
    return {"rule": rule, "rows": rows, "objectives": objectives, "ms": best * 1e3, "mb": status_mb("VmHWM") - before}


def _forked(case: tuple[str, int, int]) -> dict[str, Any]:
    return measure(*case)


def exponent(cases: list[dict[str, Any]]) -> float:
    """Slope of log milliseconds over log rows."""
    points = [(math.log(case["rows"]), math.log(case["ms"])) for case in cases if case["rows"] >= 10**4]
    return slope(*zip(*points, strict=True))[0] if len(points) > 1 else math.nan


def markdown(cases: list[dict[str, Any]], sizes: list[int], widths: list[int]) -> str:
    """One row per rule."""
    found = {(case["rule"], case["rows"], case["objectives"]): case for case in cases}
    top = (sizes[-1], widths[-1])
    head = ["rule", f"{TYPICAL[0]} x {TYPICAL[1]}, ms", *(f"{rows:.0e} x 4, ms" for rows in sizes)]
    head += [f"{top[0]:.0e} x {top[1]}, ms", f"{top[0]:.0e} x {top[1]}, MB", "exponent"]
    lines = []
    for rule in RULES:
        times = [found[rule, *case]["ms"] for case in (TYPICAL, *((rows, 4) for rows in sizes), top)]
        slope_of_rows = exponent([found[rule, rows, 4] for rows in sizes])
        cells = [*(f"{ms:.1f}" for ms in times), f"{found[rule, *top]['mb']:.0f}", f"{slope_of_rows:.2f}"]
        lines.append([rule, *cells])
    return table(head, lines) + "\n"


def main() -> None:
    given = arguments(__doc__, "small batches only, to see that it runs").parse_args()
    sizes = [1000, 10_000] if given.smoke else [1000, 10_000, 100_000, 1_000_000]
    widths = [4] if given.smoke else [2, 8, 16]
    todo = [(rule, *TYPICAL) for rule in RULES]
    todo += [(rule, rows, 4) for rule in RULES for rows in sizes]
    todo += [(rule, sizes[-2], width) for rule in RULES for width in widths if width != 4]
    todo += [(rule, sizes[-1], widths[-1]) for rule in RULES if widths[-1] != 4]
    cases = []
    for case in todo:  # a fresh fork each, so that memory is not reused from the case before
        with multiprocessing.get_context("fork").Pool(1) as pool:
            cases.append(pool.apply(_forked, (case,)))
    made = markdown(cases, sizes, widths)
    print(made)
    settings = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1, "group": GROUP}
    write(given.out / "aggregation_scale.json", {"settings": settings, "cases": cases}, made)


if __name__ == "__main__":
    main()
