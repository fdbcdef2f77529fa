"""A run, or several side by side, as one HTML page that needs no network."""

import base64
import io
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from .. import __version__
from .run import Run, Sample, finite, read_run
from .svg import Line, Track, decimals_for, fixed, gain_bar, line_chart, plane_chart, soft, strips, trend

LARGEST_SIDE = 512  # pixels of an image in the page
# Key of the log, title, note: one chart each, with a curve for each objective.
PARTS = (
    ("potential", "Learning potential", "how much an objective still has to teach"),
    ("conflict_penalty", "Conflict penalty", "how much it holds back objectives that lag behind"),
    ("need", "Progress need", "how far it lags behind the others"),
)
HEALTH_BY_OBJECTIVE = (
    ("live_groups", "Groups that teach", "share of groups whose images differ in this reward"),
    ("missing", "Missing rewards", "share of images without this reward"),
    ("reward_failures", "Failed rewards", "images whose reward function failed"),
)
HEALTH = (
    ("loss", "Loss", ""),
    ("reward", "Reward", "the weighted sum of all rewards"),
    ("reward_std", "Spread of the reward", "standard deviation over the images of an iteration"),
    ("kl", "KL divergence to the reference", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("ratio/max_deviation", "Importance ratio", "largest distance from 1 in a batch"),
    ("clip_ratio/region_mean", "Clipped share", "share of rows outside the clip range"),
    ("skipped_updates/dead_rate", "Updates without advantage", "share that was skipped"),
    ("skipped_updates/nonfinite_rate", "Updates with a non-finite gradient", "share that was skipped"),
    ("learning_rate", "Learning rate", ""),
    ("step_time", "Time per step", "seconds"),
)


def write_report(run_dirs: Sequence[Path | str], output: Path | str | None = None) -> Path:
    """Write `report.html` about training runs, and return its path.

    `output` is the page, by default `report.html` in the run directory, or beside the first of several.

    Raises:
        FileNotFoundError: if a directory does not exist or holds nothing of a run.
    """
    if not run_dirs:
        raise ValueError("A report needs at least one run directory. Found none. Pass the `output_dir` of a run.")
    runs = [read_run(path) for path in {Path(path).resolve(): Path(path) for path in run_dirs}.values()]
    if len({run.name for run in runs}) < len(runs):  # folders of one name: tell them by where they lie
        common = os.path.commonpath([run.path.resolve() for run in runs])
        runs = [replace(run, name=os.path.relpath(run.path.resolve(), common)) for run in runs]
    folder = runs[0].path if len(runs) == 1 else runs[0].path.resolve().parent
    path = Path(output) if output is not None else folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(_render(runs), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _render(runs: list[Run]) -> str:
    css, js, page = (
        (files(__package__) / name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js", "page.html.jinja")
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["soft"] = soft
    return environment.from_string(page).render(
        runs=runs,
        title=" · ".join(run.name for run in runs),
        several=len(runs) > 1,
        facts=_facts,
        outcomes=outcomes,
        verdict=_verdict,
        findings=_findings,
        cards=_cards,
        rewards=_reward_charts(runs),
        priorities=_priority_charts,
        conflicts=_conflict_charts,
        planes=_plane_charts(runs),
        health=_health_charts(runs),
        config=_config_rows(runs),
        version=__version__,
        css=css,
        js=js,
    )


# Results


@dataclass(frozen=True)
class Outcome:
    """One row of the results."""

    name: str  # objective or held-out metric
    base: float
    tuned: float
    se: float  # of the paired difference
    gain: float | None  # the difference in standard deviations of the base
    gain_se: float
    trained: bool
    bar: Markup = Markup("")  # the gain as a picture, on an axis that all rows share

    @property
    def verdict(self) -> str:
        """In a word, by two standard errors."""
        difference = self.tuned - self.base
        if abs(difference) <= 2 * self.se or not difference:
            return "within noise"
        return "rose" if difference > 0 else "fell"

    def cells(self) -> list[str]:
        """Base, tuned, difference with its error, and gain, as text that lines up."""
        spread = self.se or abs(self.tuned - self.base) or abs(self.base) / 10
        decimals = decimals_for(spread, 2 if f"{self.se:e}"[0] == "1" else 1)
        difference = f"{fixed(self.tuned - self.base, decimals, sign=True)} ± {fixed(self.se, decimals)}"
        gain = "" if self.gain is None else f"{fixed(self.gain, 2, sign=True)} ± {fixed(self.gain_se, 2)}"
        return [fixed(self.base, decimals), fixed(self.tuned, decimals), difference, gain]


def outcomes(summary: dict[str, Any]) -> list[Outcome]:
    """The rows of a run's `summary.json`, objectives first.

    Example:
        >>> row = outcomes({"objectives": {"ocr": {"base": 0.5, "tuned": 0.62, "se": 0.02, "gain": 0.6}}})[0]
        >>> row.verdict, row.cells()
        ('rose', ['0.50', '0.62', '+0.12 ± 0.02', '+0.60 ± 0.10'])
    """
    rows = []
    for part in ("objectives", "held_out"):
        for name, entry in (summary.get(part) or {}).items():
            base, tuned, se, gain, gain_se = (
                finite(entry.get(key)) for key in ("base", "tuned", "se", "gain", "gain_se")
            )
            if base is None or tuned is None:
                continue
            if gain_se is None and gain and tuned != base:
                gain_se = (se or 0.0) * abs(gain / (tuned - base))
            rows.append(Outcome(name, base, tuned, se or 0.0, gain, gain_se or 0.0, part == "objectives"))
    edges = [row.gain + s * 2 * row.gain_se for row in rows if row.gain is not None for s in (-1, 1)]
    low = min([0.0, *edges])
    reach = low, max([low + 1e-6, 0.0, *edges])
    for i, row in enumerate(rows):
        if row.gain is not None:
            rows[i] = replace(row, bar=gain_bar(row.gain, row.gain_se, reach, i if row.trained else 7))
    return rows


def _verdict(run: Run) -> str:
    """Whether it worked, in two sentences."""
    counts = Counter(row.verdict for row in outcomes(run.summary) if row.trained)
    if not counts:
        return ""
    words = {"rose": "rose", "fell": "fell", "within noise": "stayed within noise"}
    text = "Objectives: " + ", ".join(f"{counts[key]} {word}" for key, word in words.items() if counts[key]) + "."
    share = finite((run.summary.get("domination") or {}).get("all_at_least_as_good"))
    if share is None:
        return text
    return (
        f"{text} On {share:.0%} of the test prompts every objective is at least as good as before, and one is better."
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    """What the run was, for the head of the page."""
    config, history, versions = run.config, run.history, run.environment.get("versions") or {}
    steps = run.state.get("global_step") or max((entry.get("step", 0) for entry in history), default=0)
    group, batch = (finite(config.get(name)) for name in ("num_generations", "generation_batch_size"))
    logged, means = run.series("step_time")  # of all parts of a resumed run, where Trainer's own time is of the last
    seconds = (run.summary.get("seconds") or {}).get("train")
    seconds = seconds or sum((b - a) * mean for a, b, mean in zip([0.0, *logged], logged, means, strict=False))
    counts = [entry.get("n") for entry in (run.summary.get("objectives") or {}).values()]
    found = {
        "base model": config.get("model") or config.get("model_name_or_path"),
        "prompts": config.get("dataset"),
        "test prompts": max((n for n in counts if isinstance(n, int)), default=None),
        "aggregation": config.get("multi_objective_aggregation"),
        "optimizer steps": f"{steps:,}" if steps else None,
        "images an iteration": f"{batch // group:.0f} prompts × {group:.0f}" if group and batch else None,
        "images per prompt": f"{group:.0f}" if group and not batch else None,
        "learning rate": config.get("learning_rate"),
        "seed": config.get("seed"),
        "training time": timedelta(seconds=round(seconds)) if seconds else None,
        "date": run.environment.get("date"),
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("trl_apex", "trl", "torch") if name in versions),
    }
    return [(name, str(value)) for name, value in found.items() if value not in (None, "")]


def _findings(run: Run) -> list[str]:
    """Sentences about trouble in a run: its own warnings first, then what the logged numbers show."""
    found = list(run.warnings)
    for name in run.objectives:
        if failures := sum(run.series(f"reward_failures/{name}")[1]):
            found.append(f"The reward {name} failed for {failures:.0f} images; they count as missing, not as bad.")
        values = run.series(f"live_groups/{name}")[1]
        if sum(v == 0 for v in values) > len(values) / 2:
            text = "scored the images of every group alike in most iterations: it taught little."
            found.append(f"The reward {name} {text}")
    for kind, text in (("nonfinite", "had non-finite gradients"), ("dead", "had only zero advantages")):
        if count := sum(run.series(f"skipped_updates/{kind}")[1]):
            found.append(f"{count:.0f} updates {text} and were skipped.")
    return found


def _config_rows(runs: list[Run]) -> dict[str, list[tuple[str, list[str]]]]:
    """By title: the arguments that differ between runs, and the others that were set (all, if a run does not say which)."""
    known = [run.environment["changed"] for run in runs if isinstance(run.environment.get("changed"), list)]
    others = "arguments that were set" if len(known) == len(runs) else "arguments"
    rows: dict[str, list[tuple[str, list[str]]]] = {"arguments differ": [], others: []}
    for key in sorted({key for run in runs for key in run.config}):
        values = [str(run.config[key]) if key in run.config else "" for run in runs]
        if len(set(values)) > 1:
            rows["arguments differ"].append((key, values))
        elif others == "arguments" or any(key in changed for changed in known):
            rows[others].append((key, values))
    return rows


def _cards(samples: list[Sample]) -> list[dict[str, Any]]:
    """The gallery: images as data inside the page, rewards before and after, and the mean gain to sort by."""
    scales: dict[str, float] = {}
    for name in samples[0].base_rewards if samples else ():
        values = [value for s in samples if (value := finite(s.base_rewards.get(name))) is not None]
        scales[name] = (statistics.pstdev(values) if values else 0.0) or 1.0
    made = []
    for sample in samples:
        try:
            base, tuned = _image_data(sample.base), _image_data(sample.tuned)
        except OSError:
            continue
        rows, gain = [], 0.0
        for name, value in sample.base_rewards.items():
            before, after = finite(value), finite(sample.tuned_rewards.get(name))
            if before is None or after is None:
                continue
            decimals = 2 if abs(before) < 100 else 0
            shown = fixed(after - before, decimals, sign=True)
            way = {"+": "up", "\N{MINUS SIGN}": "down"}.get(shown[0], "same")
            rows.append((name, fixed(before, decimals), fixed(after, decimals), shown, way))
            gain += (after - before) / scales.get(name, 1.0) / len(sample.base_rewards)
        made.append({"prompt": sample.prompt, "base": base, "tuned": tuned, "rewards": rows, "gain": f"{gain:.4f}"})
    return made


def _image_data(path: Path) -> str:
    """An image as a `data:` address, at most 512 pixels a side."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    kind = "png" if max(picture.size) <= 128 else "webp"
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=88)  # PNG has no quality
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# Charts


def _all_objectives(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.objectives))


def _curves(run: Run, key: str) -> list[Line]:
    return [Line(name, i, *run.series(f"{key}/{name}")) for i, name in enumerate(run.objectives)]


def _trend_line(name: str, colour: int, series: tuple[list[float], list[float]], points: bool) -> Line:
    """The trend of batch means in a band of two standard errors, over the means themselves if `points`."""
    mean, error = trend(series[1])
    return Line(name, colour, series[0], mean, [2 * e for e in error], series[1] if points else [])


def _reward_charts(runs: list[Run]) -> list[Markup]:
    """A chart for each objective: of one run, training and evaluation; of several, the trend of each."""
    charts = []
    for i, name in enumerate(_all_objectives(runs)):
        key = f"rewards/{name}/mean"
        if len(runs) == 1:
            evaluation = Line("evaluation", 7, *runs[0].series(f"eval_{key}"))
            lines = [_trend_line("training", i, runs[0].series(key), points=True), evaluation]
        else:
            lines = [_trend_line(run.name, j, run.series(key), points=False) for j, run in enumerate(runs)]
        charts.append(line_chart(name, lines))
    return list(filter(None, charts))


def _priority_charts(run: Run) -> list[Markup]:
    """The priorities, then the three parts that they are made of."""
    weights = run.config.get("reward_weights") or [1]
    reference = (1 / len(run.objectives), "equal") if run.objectives and len(set(map(str, weights))) == 1 else None
    note = "weight of an objective in the batch; they sum to 1"
    charts = [line_chart("Priority", _curves(run, "priority"), note, 0.0, reference)]
    charts += [line_chart(title, _curves(run, key), note, 0.0) for key, title, note in PARTS]
    return list(filter(None, charts))


def _conflict_charts(run: Run) -> list[Markup]:
    """Conflict of each pair over time; then whose advantage it is."""
    charts = []
    for key, title, note in (
        ("conflict", "Conflict between objectives", "moving average of the correlation of advantages"),
        ("gradient_conflict", "Conflict between gradients", "cosine, from the gradient probe"),
    ):
        pairs = {
            f"{a} · {b}": run.series(f"{key}/{a}/{b}")[1] or run.series(f"{key}/{b}/{a}")[1]
            for a, b in combinations(run.objectives, 2)
        }
        charts.append(strips(title, {name: values for name, values in pairs.items() if values}, note))
    shares = [line._replace(y=trend(line.y)[0]) for line in _curves(run, "hijack_share")]
    note = "share of its variance that each objective owns; trend"
    charts.append(line_chart("Whose advantage it is", shares, note, 0.0))
    index = _trend_line("", 5, run.series("hijack_index"), points=True)
    charts.append(line_chart("Hijack index", [index], "largest share over the intended share; 1 is ideal", 1.0))
    return list(filter(None, charts))


def _plane_charts(runs: list[Run]) -> list[tuple[str, Markup]]:
    """A chart for every two objectives, with the name of the pair; held-out results where a run has them."""
    charts = []
    for a, b in combinations(_all_objectives(runs), 2):
        measured, trained = [], []
        for i, run in enumerate(runs):
            rows = {row.name: row for row in outcomes(run.summary) if row.trained}
            (steps, x), (others, y) = run.series(f"rewards/{a}/mean"), run.series(f"rewards/{b}/mean")
            if a in rows and b in rows:
                p, q = rows[a], rows[b]
                measured.append(Track(run.name, i, (p.base, q.base), (p.tuned, q.tuned), (2 * p.se, 2 * q.se)))
            elif steps == others and len(steps) > 1:
                way = list(zip(trend(x)[0], trend(y)[0], strict=True))
                trained.append(Track(run.name, i, way[0], way[-1], way=way))
        note = "held-out prompts, hollow: base, full: tuned; bars: two standard errors of the difference"
        chart = plane_chart(a, b, measured or trained, note if measured else "trend of the training rewards")
        if chart:
            charts.append((f"{b} against {a}", chart))
    return charts


def _health_charts(runs: list[Run]) -> list[Markup]:
    """What tells whether the optimization itself is sound. A number that never changes has no chart."""
    alone = len(runs) == 1
    found: list[tuple[str, str, list[Line], str, float | None]] = []
    for i, (key, title, note) in enumerate(HEALTH):
        lines = [Line("" if alone else run.name, i if alone else j, *run.series(key)) for j, run in enumerate(runs)]
        found.append((key, title, lines, note, None))
    for key, title, note in HEALTH_BY_OBJECTIVE:
        for run in runs:
            found.append((key, title if alone else f"{title}: {run.name}", _curves(run, key), note, 0.0))
    return [
        line_chart(title, lines, note, floor)
        for key, title, lines, note, floor in found
        if any(len(set(line.y)) > 1 for line in lines) or (key == "loss" and any(line.x for line in lines))
    ]
