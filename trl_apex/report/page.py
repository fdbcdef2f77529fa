"""A run, or several, as one HTML page that needs no network."""

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from .. import __version__
from .curves import conflict_charts, health_charts, hijack_charts, pareto_charts, priority_charts, reward_charts
from .findings import findings
from .gain_chart import gain_chart, outcomes
from .gallery import cards
from .line_chart import legend
from .numbers import duration
from .run import Run, read_run


def write_report(run_dirs: Sequence[Path | str], output: Path | str | None = None) -> Path:
    """Write `report.html` about training runs.

    Args:
        run_dirs (`Sequence[Path]`): one run directory, or several to compare.
        output (`Path`, *optional*): where to; by default `report.html` in the run directory, or beside the first of several.

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
    unfinished.write_text(render(runs), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def render(runs: list[Run]) -> str:
    """The page as text.

    Args:
        runs (`list[Run]`): at least one.
    """
    from jinja2 import Environment, StrictUndefined

    here = files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((here / "page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        runs=[_section(run) for run in runs],
        title=" · ".join(run.name for run in runs),
        several=len(runs) > 1,
        rewards=reward_charts(runs),
        run_legend=legend([run.name for run in runs]) if len(runs) > 1 else "",
        pareto=pareto_charts(runs),
        config=config_rows(runs),
        differing=sum(row[2] for row in config_rows(runs)) if len(runs) > 1 else 0,
        version=__version__,
        css=(here / "report.css").read_text(encoding="utf-8"),
        js=(here / "report.js").read_text(encoding="utf-8"),
    )


def _section(run: Run) -> dict[str, Any]:
    rows = outcomes(run.summary)
    return {
        "name": run.name,
        "facts": facts(run),
        "outcomes": rows,
        "gains": gain_chart([row for row in rows if row.trained]),
        "cards": cards(run.samples),
        "priorities": priority_charts(run),
        "objectives": legend(run.objectives),
        "conflicts": conflict_charts(run),
        "hijack": hijack_charts(run),
        "health": health_charts(run),
        "findings": findings(run),
        "missing": run.missing,
    }


def facts(run: Run) -> list[tuple[str, str]]:
    """The few numbers that say what the run was.

    Args:
        run ([`Run`]): the run.
    """
    found = []
    model = run.config.get("model") or run.config.get("model_name_or_path")
    if model:
        found.append(("base model", str(model)))
    steps = run.state.get("global_step") or max((entry.get("step", 0) for entry in run.history), default=0)
    if steps:
        found.append(("optimizer steps", f"{steps:,}"))
    if run.config.get("num_generations"):
        found.append(("images per prompt", str(run.config["num_generations"])))
    if run.config.get("multi_objective_aggregation"):
        found.append(("aggregation", str(run.config["multi_objective_aggregation"])))
    seconds = run.summary.get("seconds") or {}
    trained = seconds.get("train") or next(
        (e["train_runtime"] for e in reversed(run.history) if "train_runtime" in e), None
    )
    if trained:
        found.append(("training time", duration(float(trained))))
    if run.config.get("seed") is not None:
        found.append(("seed", str(run.config["seed"])))
    return found


def config_rows(runs: list[Run]) -> list[tuple[str, list[str], bool]]:
    """The arguments, one row each: name, value in each run, and whether the runs differ; differing ones first.

    Args:
        runs (`list[Run]`): the runs.
    """
    keys = sorted({key for run in runs for key in run.config})
    rows = []
    for key in keys:
        values = [str(run.config[key]) if key in run.config else "" for run in runs]
        rows.append((key, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])


def _distinct(runs: list[Run]) -> list[Run]:
    """Runs under different names: folders of the same name get their parent's in front."""
    from dataclasses import replace

    names = [run.name for run in runs]
    renamed: list[Run] = []
    for index, run in enumerate(runs):
        name = run.name
        if names.count(name) > 1:
            name = f"{run.path.resolve().parent.name}/{name}"
        while name in [other.name for other in renamed]:
            name = f"{name} ({index + 1})"
        renamed.append(replace(run, name=name))
    return renamed
