"""The charts of a run that are curves over its steps."""

from itertools import combinations

from markupsafe import Markup

from .conflict_chart import conflict_chart
from .gain_chart import outcomes
from .line_chart import Line, line_chart
from .pareto_chart import Track, pareto_chart
from .run import Run
from .smooth import trend

# Key of the log, title, note: one chart each, all objectives in it.
PARTS = (
    ("potential", "Learning potential", "how much an objective still has to teach"),
    ("conflict_penalty", "Conflict penalty", "how much it holds back objectives that lag behind"),
    ("need", "Progress need", "how far it lags behind the others"),
)
HEALTH = (
    ("loss", "Loss", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("ratio/max_deviation", "Importance ratio", "largest distance from 1 in a batch"),
    ("clip_ratio/region_mean", "Clipped share", "share of rows outside the clip range"),
    ("kl", "KL divergence to the reference", ""),
    ("learning_rate", "Learning rate", ""),
    ("step_time", "Time per step", "seconds"),
    ("time/rollout", "Time per rollout", "seconds"),
)


def _all_objectives(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.objectives))


def _smooth(name: str, colour: int, series: tuple[list[float], list[float]], points: bool) -> Line:
    steps, values = series
    mean, error = trend(values)
    return Line(name, colour, steps, mean, [2 * e for e in error], values if points else [])


def reward_charts(runs: list[Run]) -> list[Markup]:
    """A chart per objective: batch means as points, their trend as a line in a band of two standard errors."""
    charts = []
    for index, name in enumerate(_all_objectives(runs)):
        several = len(runs) > 1
        lines = [
            _smooth(
                run.name if several else "",
                position if several else index,
                run.series(f"rewards/{name}/mean"),
                not several,
            )
            for position, run in enumerate(runs)
        ]
        evaluated = [Line("held out", 7, *run.series(f"eval_rewards/{name}/mean")) for run in runs if len(runs) == 1]
        charts.append(line_chart(name, [line for line in lines + evaluated if line.x]))
    return [chart for chart in charts if chart]


def priority_charts(run: Run) -> list[Markup]:
    """The priorities, then the three parts that they are made of."""
    names = run.objectives
    lines = [Line(name, i, *run.series(f"priority/{name}")) for i, name in enumerate(names)]
    equal = (1 / len(names), "equal") if names else None
    charts = [line_chart("Priority", lines, "weight of an objective in the batch; they sum to 1", [0.0], equal)]
    for key, title, note in PARTS:
        charts.append(
            line_chart(
                title, [Line(name, i, *run.series(f"{key}/{name}")) for i, name in enumerate(names)], note, [0.0]
            )
        )
    return [chart for chart in charts if chart]


def hijack_charts(run: Run) -> list[Markup]:
    """Whose advantage it is: the share of its variance that each objective owns."""
    names = run.objectives
    lines = []
    for i, name in enumerate(names):
        steps, values = run.series(f"hijack_share/{name}")
        lines.append(Line(name, i, steps, trend(values)[0] if values else []))
    charts = [line_chart("Share of the advantage", lines, "of its variance, by objective; trend", [0.0])]
    steps, values = run.series("hijack_index")
    if values:
        note = "largest share over the intended share; 1 is ideal"
        charts.append(line_chart("Hijack index", [_smooth("index", 5, (steps, values), True)], note, [1.0]))
    return [chart for chart in charts if chart]


def conflict_charts(run: Run) -> list[Markup]:
    """Conflict between each two objectives, by correlation of advantages and, where probed, of gradients."""
    charts = []
    for key, title, note in (
        ("conflict", "Conflict between objectives", "moving average over the run;"),
        ("gradient_conflict", "Conflict between gradients", "cosine, from the gradient probe;"),
    ):
        pairs = {}
        for a, b in combinations(run.objectives, 2):
            forward = run.series(f"{key}/{a}/{b}")
            pairs[a, b] = forward if forward[0] else run.series(f"{key}/{b}/{a}")
        charts.append(conflict_chart(title, pairs, note))
    return [chart for chart in charts if chart]


def pareto_charts(runs: list[Run]) -> list[tuple[str, Markup]]:
    """A chart for every two objectives, with the name of the pair."""
    charts = []
    for a, b in combinations(_all_objectives(runs), 2):
        tracks = []
        for index, run in enumerate(runs):
            rows = {row.name: row for row in outcomes(run.summary) if row.trained}
            results = (rows[a], rows[b]) if a in rows and b in rows else None
            (steps, x), (others, y) = run.series(f"rewards/{a}/mean"), run.series(f"rewards/{b}/mean")
            x, y = (trend(x)[0], trend(y)[0]) if steps == others else ([], [])
            if results or len(x) > 1:
                tracks.append(Track(run.name, index, x, y, results))
        chart = pareto_chart(a, b, tracks)
        if chart:
            charts.append((f"{b} against {a}", chart))
    return charts


def health_charts(run: Run) -> list[Markup]:
    """What tells whether the optimization itself is sound."""
    charts = []
    for index, (key, title, note) in enumerate(HEALTH):
        steps, values = run.series(key)
        if len(values) > 1 or key == "loss":
            charts.append(line_chart(title, [Line("", index, steps, values)] if steps else [], note))
    return [chart for chart in charts if chart]
