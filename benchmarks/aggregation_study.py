"""What each rule, and each part of APEX, buys on a small problem whose objectives are known exactly.

A Gaussian policy x = theta + offset(prompt) + noise is trained by its exact score on five objectives that have the
habits of real rewards:

    pickscore   large scale, a part that the policy cannot influence; opposes `aesthetic` with a chosen cosine
    aesthetic   small scale
    ocr         sparse and stepped: zero at first for almost all samples, so most groups are dead
    deqa        saturates early; its groups die while the others still learn
    blank       dead from beginning to end (a broken scorer)

Measured: an objective's expected reward at the end, as the share of the gain that training on it alone reaches in the
same number of updates (1 = as good as alone, below 0 = worse than at the start); the worst and the mean of the four
live objectives; the hijack index; and the seesaw rate.

    python benchmarks/aggregation_study.py [--smoke] [--seeds 24] [--out benchmarks/results]
    python benchmarks/aggregation_study.py --noise  # `blank` is noise: how strong may the need be with an objective like that?
"""

import json
import math
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _bench import arguments, mean_and_error, table, write
from matplotlib.figure import Figure

from trl_apex.aggregation import GRADIENT_RULES, RULES, MultiObjectiveRewardAggregator, PopulationConflict

OBJECTIVES = ["pickscore", "aesthetic", "ocr", "deqa", "blank"]
LIVE = OBJECTIVES[:4]
PROMPTS, GROUP, SIZE = 16, 12, 32
EXPLORATION, LEARNING_RATE, REFRESH, EVALUATE = 0.5, 0.02, 10, 20
Job = tuple[str, str, dict[str, Any], float, int, int]  # name, rule, options, conflict, seed, updates
CONFLICTS = (0.0, -0.9)
HARD = -0.9  # where the options of APEX are compared

PARTS: dict[str, dict[str, Any]] = {
    "apex": {},
    "- stage 1": {"normalize_objectives": False},
    "- stage 2": {"normalize_advantages": False},
    "- priorities": {"adaptive_priorities": False},
    "- potential": {"potential_coef": 0.0},
    "- conflict": {"conflict_coef": 0.0},
    "- need": {"need_coef": 0.0},
    "need_scale largest": {"need_scale": "largest"},
    "need_coef 1": {"need_coef": 1.0},
    "need_coef 2": {"need_coef": 2.0},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "scale_blend 0 (group std)": {"scale_blend": 0.0},
    "scale_blend 1": {"scale_blend": 1.0},
    "scale_blend inf (pooled std)": {"scale_blend": math.inf},
    "scale_ema 0.5": {"scale_ema": 0.5},
    "norm_floor 0": {"norm_floor": 0.0},
    "norm_floor 1": {"norm_floor": 1.0},
    "clips off": {"z_clip": math.inf, "advantage_clip": math.inf},
    "potential_coef 1": {"potential_coef": 1.0},
    "conflict_coef 3": {"conflict_coef": 3.0},
    "need_mode target": {"need_mode": "target", "reward_targets": [23.0, 5.6, 1.0, 4.15, math.nan]},
    "need_temperature 0.25": {"need_temperature": 0.25},
    "need_temperature 1": {"need_temperature": 1.0},
    "attribution victim": {"conflict_attribution": "victim"},
    "attribution plain": {"conflict_attribution": "plain"},
    "attribution plain, coef 3": {"conflict_attribution": "plain", "conflict_coef": 3.0},
    "conflict from batch gradients": {"conflict_source": "gradient"},
    "conflict from population": {"conflict_source": "population"},
    "combination multiplicative": {"combination": "multiplicative"},
    "priority_temperature 0.25": {"priority_temperature": 0.25},
    "priority_temperature 1": {"priority_temperature": 1.0},
    "priority_floor 0": {"priority_floor": 0.0},
    "priority_floor 0.5": {"priority_floor": 0.5},
    "priority_ema 0": {"priority_ema": 0.0},
    "priority_ema 0.95": {"priority_ema": 0.95},
    "warm-up and ramp 0": {"warmup_iterations": 0, "ramp_iterations": 0},
    "warm-up and ramp 30": {"warmup_iterations": 30, "ramp_iterations": 30},
    "slow trend 0.99": {"slow_ema": 0.99},
}

# With `blank` as noise that no policy can raise: rule and options by name.
NOISE: dict[str, tuple[str, dict[str, Any]]] = {
    "apex": ("apex", {}),
    "- potential": ("apex", {"potential_coef": 0.0}),
    "- conflict": ("apex", {"conflict_coef": 0.0}),
    "need_coef 1": ("apex", {"need_coef": 1.0}),
    "need_coef 1, - potential": ("apex", {"need_coef": 1.0, "potential_coef": 0.0}),
    "need_coef 1, - conflict": ("apex", {"need_coef": 1.0, "conflict_coef": 0.0}),
    "need_coef 2": ("apex", {"need_coef": 2.0}),
    "normalize_then_sum": ("normalize_then_sum", {}),
}


class Problem:
    """The objectives, and the policy's place among them; `conflict` is the cosine between `pickscore` and `aesthetic`.

    `noisy`: `blank` is noise instead of a constant.
    """

    def __init__(self, seed: int, conflict: float, noisy: bool = False) -> None:
        self.noisy = noisy
        self.generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=self.generator))[0].T
        self.directions = basis[:4].clone()
        self.directions[1] = conflict * basis[0] + math.sqrt(1 - conflict**2) * basis[1]
        self.offsets = 0.3 * torch.randn(PROMPTS, SIZE, generator=self.generator)
        self.theta = torch.zeros(SIZE)
        self.groups = torch.arange(PROMPTS).repeat_interleave(GROUP)
        self.moments = [torch.zeros(SIZE), torch.zeros(SIZE)]
        self.steps = 0
        self.held_out = torch.randn(PROMPTS * 64, SIZE, generator=self.generator)

    def rewards(self, samples: torch.Tensor, noise: bool = True) -> torch.Tensor:
        """Rewards of shape `[B, 5]`."""
        y = samples @ self.directions.T
        luck = torch.randn(len(y), generator=self.generator) if noise else torch.zeros(len(y))
        ocr = torch.round(4 * torch.sigmoid(3 * (y[:, 2] - 1.5))) / 4
        pickscore = 21 + 3 * torch.tanh(y[:, 0] / 3) + luck
        aesthetic = 5 + 0.6 * torch.tanh(y[:, 1] / 3)
        deqa = 4 + 0.3 * y[:, 3].clamp(max=0.5)
        blank = torch.zeros(len(y))
        if self.noisy and noise:
            blank = torch.randn(len(y), generator=self.generator)
        return torch.stack([pickscore, aesthetic, ocr, deqa, blank], 1)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples' scores (gradient of the log-probability) of shape `[B, SIZE]`, and their rewards."""
        noise = EXPLORATION * torch.randn(PROMPTS * GROUP, SIZE, generator=self.generator)
        return noise / EXPLORATION**2, self.rewards(self.theta + self.offsets[self.groups] + noise)

    def expected(self) -> torch.Tensor:
        """Expected rewards of the four live objectives, over the same noise at every call."""
        places = self.offsets.repeat_interleave(64, 0) + EXPLORATION * self.held_out
        return self.rewards(self.theta + places, noise=False)[:, :4].double().mean(0)

    def climb(self, gradient: torch.Tensor) -> None:
        """One step of Adam, upwards."""
        self.steps += 1
        for power, (memory, decay) in enumerate(zip(self.moments, (0.9, 0.999), strict=True), 1):
            memory.mul_(decay).add_(gradient**power, alpha=1 - decay)
        first, second = self.moments[0] / (1 - 0.9**self.steps), self.moments[1] / (1 - 0.999**self.steps)
        self.theta += LEARNING_RATE * first / (second.sqrt() + 1e-12)


def train(
    seed: int, conflict: float, rule: str, options: dict[str, Any], updates: int, only: int | None = None
) -> dict[str, Any]:
    """One run, on all objectives or one `only`: expected rewards before and after, and what was seen on the way."""
    options = dict(options)
    problem = Problem(seed, conflict, noisy=options.pop("noisy", False))
    columns = slice(None) if only is None else slice(only, only + 1)
    names = OBJECTIVES[columns]
    aggregator = MultiObjectiveRewardAggregator(names, rule=rule, options={"warn_after": 10**9, **options})
    population = PopulationConflict(len(names), decay=0.98)
    probed = rule in GRADIENT_RULES or options.get("conflict_source", "advantage") != "advantage"
    start = problem.expected()
    hijack, track = [], [start]
    for update in range(updates):
        scores, rewards = problem.batch()
        advantages, metrics = aggregator(rewards[:, columns], problem.groups)
        hijack.append(metrics["hijack_index"])
        if probed:
            z = aggregator.normalized
            assert z is not None
            half = problem.groups % 2
            parts = [torch.einsum("bk,bd->kd", z * (half == side)[:, None], scores).double() for side in (0, 1)]
            if options.get("conflict_source") == "population":
                population.update(parts[0] @ parts[1].T)
                if update % REFRESH == 0:
                    cosine, error = population.estimate()
                    aggregator.observe_conflict(cosine, standard_error=error)
            elif update % REFRESH == 0:
                whole = parts[0] + parts[1]
                aggregator.observe_conflict(whole @ whole.T, samples=len(z))
        problem.climb(advantages @ scores / len(scores))
        if (update + 1) % EVALUATE == 0:
            track.append(problem.expected())
    return {
        "start": start.tolist(),
        "end": problem.expected().tolist(),
        "hijack": statistics.fmean(hijack[updates // 10 :]),
        "seesaw": seesaw_rate(torch.stack(track)),
        "priorities": aggregator.priorities,
    }


def seesaw_rate(track: torch.Tensor) -> float:
    """Share of evaluation intervals in which one objective rises and another falls by over 2 % of its whole range."""
    span = (track.max(0).values - track.min(0).values).clamp(min=1e-9)
    moves = track.diff(dim=0) / span
    return float(((moves > 0.02).any(1) & (moves < -0.02).any(1)).double().mean())


def measure(job: Job) -> dict[str, Any]:
    """One row of the study: a run against its seed's four solo runs (`name` "solo" makes those)."""
    torch.set_num_threads(1)
    name, rule, options, conflict, seed, updates = job
    row: dict[str, Any] = {"name": name, "conflict": conflict, "seed": seed}
    if name == "solo":
        runs = [train(seed, conflict, rule, options, updates, only=k) for k in range(4)]
        return row | {"gain": [run["end"][k] - run["start"][k] for k, run in enumerate(runs)]}
    run = train(seed, conflict, rule, options, updates)
    gain = [end - start for start, end in zip(run["start"], run["end"], strict=True)]
    return row | {"gain": gain, "hijack": run["hijack"], "seesaw": run["seesaw"]}


def jobs(seeds: int, updates: int) -> list[Job]:
    """Everything there is to run."""
    every: list[Job] = []
    for seed in range(seeds):
        for conflict in CONFLICTS:
            every.append(("solo", "normalize_then_sum", {}, conflict, seed, updates))
            every += [(rule, rule, {}, conflict, seed, updates) for rule in RULES]
            every += [(name, "apex", options, conflict, seed, updates) for name, options in PARTS.items() if options]
        every += [(name, "apex", options, HARD, seed, updates) for name, options in OPTIONS.items()]
    return every


def noise_jobs(seeds: int, updates: int) -> list[Job]:
    """Everything there is to run with `--noise`."""
    named = {"solo": ("normalize_then_sum", {}), **NOISE}
    return [
        (name, rule, {**options, "noisy": True}, conflict, seed, updates)
        for seed in range(seeds)
        for conflict in CONFLICTS
        for name, (rule, options) in named.items()
    ]


def run(todo: list[Job], workers: int, path: Path | None) -> list[dict[str, Any]]:
    """Run the jobs, keeping each result in `path` as it comes; what is there already is not run again."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path and path.is_file() else []
    done = {(row["name"], row["conflict"], row["seed"]) for row in rows}
    left = [job for job in todo if (job[0], job[3], job[4]) not in done]
    with ProcessPoolExecutor(workers) as pool:
        for row in pool.map(measure, left, chunksize=4):
            rows.append(row)
            if path:
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return rows


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means with standard errors over seeds, and the paired difference to "apex"."""
    solo = {(row["conflict"], row["seed"]): row["gain"] for row in rows if row["name"] == "solo"}
    runs: dict[tuple[str, float], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["name"] != "solo":
            alone = solo[row["conflict"], row["seed"]]
            share = [g / max(s, 1e-6) for g, s in zip(row["gain"], alone, strict=True)]
            found = {"share": share, "worst": min(share), "mean": statistics.fmean(share)}
            found |= {"hijack": row["hijack"], "seesaw": row["seesaw"]}
            runs.setdefault((row["name"], row["conflict"]), {})[row["seed"]] = found
    lines = []
    for (name, conflict), by_seed in runs.items():
        line: dict[str, Any] = {"name": name, "conflict": conflict, "seeds": len(by_seed)}
        base = runs["apex", conflict]
        for key in ("worst", "mean", "hijack", "seesaw"):
            line[key] = mean_and_error(found[key] for found in by_seed.values())
            if key in ("worst", "mean") and name != "apex":
                line[f"{key}_minus_apex"] = mean_and_error(by_seed[seed][key] - base[seed][key] for seed in by_seed)
        for k, objective in enumerate(LIVE):
            line[objective] = mean_and_error(found["share"][k] for found in by_seed.values())
        lines.append(line)
    return lines


SECTIONS = (
    ("Rules", list(RULES), CONFLICTS),
    ("Parts of APEX switched off", list(PARTS), CONFLICTS),
    ("Options of APEX changed", ["apex", *OPTIONS], (HARD,)),
)
NOISE_SECTIONS = (("A fifth objective that is noise", list(NOISE), CONFLICTS),)


def markdown(lines: list[dict[str, Any]], sections: Any = SECTIONS) -> str:
    """The tables of docs/method.md."""
    text = ""
    head = ["", "worst", "mean", "worst - apex", *LIVE, "hijack index", "seesaw"]
    for title, names, conflicts in sections:
        for conflict in conflicts:
            rows = []
            for line in lines:
                if line["name"] in names and line["conflict"] == conflict:
                    means = [f"{line[key][0]:.2f}" for key in (*LIVE, "hijack", "seesaw")]
                    against = _cell(line["worst_minus_apex"], "+") if "worst_minus_apex" in line else ""
                    rows.append([line["name"], _cell(line["worst"]), _cell(line["mean"]), against, *means])
            text += f"\n### {title}, conflict cosine {conflict:g}\n\n{table(head, rows)}\n"
    return text


def _cell(value: list[float], sign: str = "") -> str:
    return f"{value[0]:{sign}.3f} ± {value[1]:.3f}"


def figure(table: list[dict[str, Any]], path: Path) -> None:
    """Worst and mean share for the rules at each conflict, and the cost of each part and option."""
    panels = Figure(figsize=(13, 8.5))
    left, right = panels.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.15]})
    measured = {line["name"] for line in table}
    rules = [rule for rule in RULES if rule in measured]
    height = 0.38
    for step, (conflict, colour) in enumerate(zip(CONFLICTS, ("#9ecae1", "#08306b"), strict=True)):
        lines = {line["name"]: line for line in table if line["conflict"] == conflict}
        places = [number + (0.5 - step) * height for number in range(len(rules))]
        worst, error = zip(*(lines[rule]["worst"] for rule in rules), strict=True)
        left.barh(places, worst, height, xerr=error, color=colour, label=f"conflict cosine {conflict:g}")
        left.plot([lines[rule]["mean"][0] for rule in rules], places, "|", color="black", markersize=7)
    left.set_yticks(range(len(rules)), rules)
    left.set_xlabel("share of the solo gain: worst objective (bar), mean (tick)")
    names = [*list(PARTS)[1:], *OPTIONS]
    lines = {line["name"]: line for line in table if line["conflict"] == HARD}
    for key, marker, colour in (("mean_minus_apex", "o", "#fd8d3c"), ("worst_minus_apex", "s", "#08306b")):
        change, error = zip(*(lines[name][key] for name in names), strict=True)
        look = {"fmt": marker, "color": colour, "markersize": 4, "label": key.split("_")[0]}
        right.errorbar(change, range(len(names)), xerr=[2 * e for e in error], **look)
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.set_xlabel(f"change of the share against apex, ± 2 SE, conflict cosine {HARD:g}")
    for axis in (left, right):
        axis.invert_yaxis()
        axis.axvline(0, color="black", linewidth=0.8)
        axis.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    panels.tight_layout()
    panels.savefig(path, dpi=110)


def main() -> None:
    given = arguments(
        __doc__,
        "a few updates on two seeds, to see that it runs",
        seeds={"type": int, "default": 20},
        updates={"type": int, "default": 100},
        workers={"type": int, "default": 2},
        redraw={"action": "store_true", "help": "only draw the figure again, from the results"},
        noise={"action": "store_true", "help": "instead: the need's strength beside an objective that is noise"},
    ).parse_args()
    results = given.out / "aggregation_study.json"
    if given.redraw:
        return figure(json.loads(results.read_text())["table"], results.with_suffix(".png"))
    seeds, updates = (2, 2 * EVALUATE) if given.smoke else (given.seeds, given.updates)
    start = time.perf_counter()
    todo = (noise_jobs if given.noise else jobs)(seeds, updates)
    sections = NOISE_SECTIONS if given.noise else SECTIONS
    if given.noise:
        results = given.out / "aggregation_noise.json"
    given.out.mkdir(parents=True, exist_ok=True)
    kept = None if given.smoke else results.with_suffix(".rows.jsonl")
    rows = run(todo, given.workers, kept)
    found = summarize(rows)
    print(markdown(found, sections))
    print(f"{len(todo)} jobs in {time.perf_counter() - start:.0f} s")
    settings = {"seeds": seeds, "updates": updates, "prompts": PROMPTS, "group": GROUP, "torch": torch.__version__}
    write(results, {"settings": settings, "table": found}, markdown(found, sections), digits=4)
    if not given.noise:
        figure(found, results.with_suffix(".png"))
    if kept:
        kept.unlink()


if __name__ == "__main__":
    main()
