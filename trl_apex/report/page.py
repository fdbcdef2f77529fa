"""A run, or several side by side, as one HTML page that needs no network."""

import base64
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from .. import __version__
from ..redact import redacted
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
    """Write `report.html` about training runs.

    Args:
        run_dirs (`Sequence[Path]`): one run directory, or several to compare.
        output (`Path`, *optional*): the page; by default `report.html` in the run directory, or beside the first of several.

    Returns:
        `Path`: the page.

    Raises:
        ValueError: if no directory is given.
        FileNotFoundError: if a directory does not exist or holds nothing of a run.
    """
    if not run_dirs:
        raise ValueError("A report needs at least one run directory. Found none. Pass the `output_dir` of a run.")
    runs = _distinct([read_run(Path(path)) for path in run_dirs])
    folder = runs[0].path if len(runs) == 1 else runs[0].path.resolve().parent
    path = Path(output) if output is not None else folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(_render(runs), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _render(runs: list["Run"]) -> str:
    from jinja2 import Environment, StrictUndefined

    here = files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["soft"] = soft
    template = environment.from_string((here / "page.html.jinja").read_text(encoding="utf-8"))
    sections = [
        {
            "name": run.name,
            "folder": str(run.path),
            "facts": _facts(run),
            "verdict": _verdict(run),
            "outcomes": outcomes(run.summary),
            "cards": _cards(run.samples),
            "priorities": _priority_charts(run),
            "conflicts": _conflict_charts(run),
            "findings": _findings(run),
            "missing": run.missing,
        }
        for run in runs
    ]
    return template.render(
        runs=sections,
        title=" · ".join(run.name for run in runs),
        several=len(runs) > 1,
        rewards=_reward_charts(runs),
        planes=_plane_charts(runs),
        health=_health_charts(runs),
        config=_config_rows(runs),
        version=__version__,
        css=(here / "report.css").read_text(encoding="utf-8"),
        js=(here / "report.js").read_text(encoding="utf-8"),
    )


def _distinct(runs: list["Run"]) -> list["Run"]:
    """Runs under different names: folders of the same name get their parent's in front."""
    counts = Counter(run.name for run in runs)
    renamed: list[Run] = []
    for index, run in enumerate(runs):
        name = f"{run.path.resolve().parent.name}/{run.name}" if counts[run.name] > 1 else run.name
        if name in [other.name for other in renamed]:
            name = f"{name} ({index + 1})"
        renamed.append(replace(run, name=name))
    return renamed


# Reading a run directory: what is missing is named, and is no error


@dataclass(frozen=True)
class Sample:
    """One prompt with its images before and after training, and their rewards by name."""

    prompt: str
    base: Path
    tuned: Path
    base_rewards: dict[str, float] = field(default_factory=dict)
    tuned_rewards: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path
    name: str  # in the report
    history: list[dict[str, Any]]  # Trainer's log
    state: dict[str, Any]  # the rest of Trainer's state
    summary: dict[str, Any]  # results on held-out prompts: "objectives", "held_out", "domination" and "seconds"
    samples: list[Sample]
    config: dict[str, Any]  # arguments, without secrets
    environment: dict[str, Any]  # versions, date, and the names of the arguments that were set
    warnings: list[str]
    missing: list[str]  # a sentence for each part that was not found

    @property
    def objectives(self) -> list[str]:
        """Names of the trained rewards, in the run's order."""
        names = dict.fromkeys(self.summary.get("objectives", {}))
        for entry in self.history:
            names |= {found[1]: None for key in entry if (found := re.fullmatch(r"rewards/(.+)/mean", key))}
        return list(names)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Optimizer steps and values of one logged number, leaving out what is not finite."""
        entries = [entry for entry in self.history if "step" in entry and _finite(entry.get(key)) is not None]
        return [float(entry["step"]) for entry in entries], [float(entry[key]) for entry in entries]


def read_run(path: Path) -> Run:
    """Read the `output_dir` of a run.

    Raises:
        FileNotFoundError: if it does not exist, or holds nothing that a report could show.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"A run directory must exist. Found no directory {path}. Pass the `output_dir` of a training run."
        )
    missing: list[str] = []
    states = [path / "trainer_state.json", *path.glob("checkpoint-*/trainer_state.json")]
    found = [_read_json(state, [], "", "") for state in states if state.is_file()]
    state = max(found, key=lambda content: content.get("global_step") or 0, default={})
    if not state:
        _read_json(states[0], missing, "trainer_state.json", "the training curves")
    summary = _read_json(path / "summary.json", missing, "summary.json", "the results on held-out prompts")
    config = _read_json(path / "config.json", missing, "config.json", "the arguments of the run")
    if {"_class_name", "architectures", "model_type"} & set(config):  # a model's configuration, not the run's
        config = {}
    samples = _read_samples(path / "samples", missing)
    if not (state or summary or samples):
        raise FileNotFoundError(
            f"A run directory must hold trainer_state.json, summary.json or samples/. Found none of them in {path}. "
            "Pass the `output_dir` of a training run."
        )
    history = [entry for entry in state.pop("log_history", []) if isinstance(entry, dict)]
    environment = _read_json(path / "environment.json", [], "", "")
    warnings, name = _read_warnings(path), path.resolve().name
    return Run(path, name, history, state, summary, samples, redacted(config), environment, warnings, missing)


def _read_json(path: Path, missing: list[str], name: str, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        problem = "holds no JSON object"
    except FileNotFoundError:
        problem = "was not found"
    except (OSError, ValueError) as error:
        problem = f"could not be read ({error})"
    missing.append(f"{name} {problem}, so this report cannot show {what}.")
    return {}


def _read_samples(folder: Path, missing: list[str]) -> list[Sample]:
    bases = {int(found[1]): path for path in folder.glob("base_*.png") if (found := re.search(r"(\d+)$", path.stem))}
    pairs = [(i, b, b.with_name(b.name.replace("base_", "tuned_", 1))) for i, b in sorted(bases.items())]
    pairs = [pair for pair in pairs if pair[2].is_file()]
    if not pairs:
        missing.append("samples/ holds no pair of images base_*.png and tuned_*.png, so there is nothing to compare.")
        return []
    try:
        entries = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        entries = []
        missing.append("samples/prompts.json was not found, so the images have no prompts and no rewards.")
    samples = []
    for index, base, tuned in pairs:
        entry = entries[index] if index < len(entries) else {}
        prompt, before, after = entry.get("prompt", f"sample {index}"), entry.get("base"), entry.get("tuned")
        samples.append(Sample(prompt, base, tuned, before or {}, after or {}))
    return samples


def _read_warnings(path: Path) -> list[str]:
    try:
        lines = (path / "warnings.jsonl").read_text(encoding="utf-8").splitlines()
        return list(dict.fromkeys(f"Step {entry['step']}: {entry['text']}" for entry in map(json.loads, lines)))
    except (OSError, ValueError, KeyError, TypeError):
        return []


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
        gain = f"{fixed(self.gain, 2, sign=True)} ± {fixed(self.gain_se, 2)}" if self.gain is not None else ""
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
            keys = ("base", "tuned", "se", "gain", "gain_se")
            base, tuned, se, gain, gain_se = (_finite(entry.get(key)) for key in keys)
            if base is None or tuned is None:
                continue
            if gain_se is None and gain and tuned != base:
                gain_se = (se or 0.0) * abs(gain / (tuned - base))
            rows.append(Outcome(name, base, tuned, se or 0.0, gain, gain_se or 0.0, part == "objectives"))
    edges = [row.gain + s * 2 * row.gain_se for row in rows if row.gain is not None for s in (-1, 1)]
    reach = min([*edges, 0.0]), max([*edges, 0.0, min([*edges, 0.0]) + 1e-6])
    return [
        row
        if row.gain is None
        else replace(row, bar=gain_bar(row.gain, row.gain_se, reach, i if row.trained else None))
        for i, row in enumerate(rows)
    ]


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _verdict(run: Run) -> str:
    """Whether it worked, in two sentences."""
    counts = Counter(row.verdict for row in outcomes(run.summary) if row.trained)
    if not counts:
        return ""
    words = {"rose": "rose", "fell": "fell", "within noise": "stayed within noise"}
    text = "Objectives: " + ", ".join(f"{counts[key]} {word}" for key, word in words.items() if counts[key])
    share = _finite((run.summary.get("domination") or {}).get("all_at_least_as_good"))
    if share is not None:
        text += (
            f". On {share:.0%} of the test prompts every objective is at least as good as before, and one is better"
        )
    return text + "."


def _facts(run: Run) -> list[tuple[str, str]]:
    """What the run was, for the head of the page."""
    config, history, versions = run.config, run.history, run.environment.get("versions") or {}
    steps = run.state.get("global_step") or max((entry.get("step", 0) for entry in history), default=0)
    group, batch = config.get("num_generations"), config.get("generation_batch_size")
    times = [entry["train_runtime"] for entry in history if "train_runtime" in entry]
    seconds = (run.summary.get("seconds") or {}).get("train") or (times[-1] if times else None)
    counts = [entry.get("n") for entry in (run.summary.get("objectives") or {}).values()]
    found = {
        "base model": config.get("model") or config.get("model_name_or_path"),
        "prompts": config.get("dataset"),
        "test prompts": max((n for n in counts if isinstance(n, int)), default=None),
        "aggregation": config.get("multi_objective_aggregation"),
        "optimizer steps": f"{steps:,}" if steps else None,
        "images an iteration": f"{batch // group} prompts × {group}" if group and batch else None,
        "images per prompt": group if group and not batch else None,
        "learning rate": config.get("learning_rate"),
        "seed": config.get("seed"),
        "training time": _duration(float(seconds)) if seconds else None,
        "date": run.environment.get("date"),
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("trl_apex", "trl", "torch") if name in versions),
    }
    return [(name, str(value)) for name, value in found.items() if value not in (None, "")]


def _duration(seconds: float) -> str:
    """In the two units that matter.

    Example:
        >>> _duration(0.42), _duration(75), _duration(7320)
        ('0.4 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _findings(run: Run) -> list[str]:
    """Sentences about trouble in a run: its own warnings first, then what the logged numbers show."""
    found = list(run.warnings)
    for name in run.objectives:
        failures = sum(run.series(f"reward_failures/{name}")[1])
        if failures:
            found.append(f"The reward {name} failed for {failures:.0f} images; they count as missing, not as bad.")
        values = run.series(f"live_groups/{name}")[1]
        if values and sum(v == 0 for v in values) > len(values) / 2:
            found.append(
                f"The reward {name} scored the images of every group alike in most iterations: it taught little."
            )
    for key, text in (
        ("skipped_updates/nonfinite", "updates had non-finite gradients and were skipped"),
        ("skipped_updates/dead", "updates had only zero advantages and were skipped"),
    ):
        count = sum(run.series(key)[1])
        if count:
            found.append(f"{count:.0f} {text}.")
    return found


def _config_rows(runs: list[Run]) -> dict[str, list[tuple[str, list[str]]]]:
    """By title, the arguments that differ between runs, and the others that the user set (all, where a run does not say which):
    name, and value in each run."""
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
        values = [s.base_rewards[name] for s in samples if isinstance(s.base_rewards.get(name), int | float)]
        middle = sum(values) / max(len(values), 1)
        scales[name] = (sum((v - middle) ** 2 for v in values) / max(len(values), 1)) ** 0.5 or 1.0
    made = []
    for sample in samples:
        try:
            base, tuned = _image_data(sample.base), _image_data(sample.tuned)
        except OSError:
            continue
        rows, gain = [], 0.0
        for name, before in sample.base_rewards.items():
            after = sample.tuned_rewards.get(name)
            if not isinstance(before, int | float) or not isinstance(after, int | float):
                continue
            decimals = 2 if abs(before) < 100 else 0
            shown = fixed(after - before, decimals, sign=True)
            way = "same" if shown[0] not in "+\N{MINUS SIGN}" else "up" if after > before else "down"
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
    picture.save(buffer, kind, **({"quality": 88} if kind == "webp" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# Charts


def _all_objectives(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.objectives))


def _kept(charts: list[Markup]) -> list[Markup]:
    return [chart for chart in charts if chart]


def _reward_charts(runs: list[Run]) -> list[Markup]:
    """A chart for each objective: batch means as points, their trend as a line in a band of two standard errors."""
    charts, alone = [], len(runs) == 1
    for index, name in enumerate(_all_objectives(runs)):
        lines = []
        for position, run in enumerate(runs):
            steps, values = run.series(f"rewards/{name}/mean")
            mean, error = trend(values)
            colour, label = (index, "training") if alone else (position, run.name)
            lines.append(Line(label, colour, steps, mean, [2 * e for e in error], values if alone else []))
            if alone:
                lines.append(Line("evaluation", 7, *run.series(f"eval_rewards/{name}/mean")))
        charts.append(line_chart(name, lines))
    return _kept(charts)


def _curves(run: Run, key: str, smooth: bool = False) -> list[Line]:
    lines = [Line(name, i, *run.series(f"{key}/{name}")) for i, name in enumerate(run.objectives)]
    return [line._replace(y=trend(line.y)[0]) for line in lines] if smooth else lines


def _priority_charts(run: Run) -> list[Markup]:
    """The priorities, then the three parts that they are made of."""
    weights = run.config.get("reward_weights") or [1]
    reference = (1 / len(run.objectives), "equal") if run.objectives and len(set(map(str, weights))) == 1 else None
    note = "weight of an objective in the batch; they sum to 1"
    charts = [line_chart("Priority", _curves(run, "priority"), note, [0.0], reference)]
    return _kept(charts + [line_chart(title, _curves(run, key), note, [0.0]) for key, title, note in PARTS])


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
    note = "share of its variance that each objective owns; trend"
    charts.append(line_chart("Whose advantage it is", _curves(run, "hijack_share", smooth=True), note, [0.0]))
    steps, values = run.series("hijack_index")
    mean, error = trend(values)
    index = Line("", 5, steps, mean, [2 * e for e in error], values)
    charts.append(line_chart("Hijack index", [index], "largest share over the intended share; 1 is ideal", [1.0]))
    return _kept(charts)


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
    charts = []
    for index, (key, title, note) in enumerate(HEALTH):
        several = len(runs) > 1
        lines = [
            Line(run.name if several else "", i if several else index, *run.series(key)) for i, run in enumerate(runs)
        ]
        if key == "loss" or any(len(set(line.y)) > 1 for line in lines):
            charts.append(line_chart(title, lines, note))
    for key, title, note in HEALTH_BY_OBJECTIVE:
        for run in runs:
            lines = _curves(run, key)
            if any(len(set(line.y)) > 1 for line in lines):
                charts.append(line_chart(f"{title}: {run.name}" if len(runs) > 1 else title, lines, note, [0.0]))
    return _kept(charts)
