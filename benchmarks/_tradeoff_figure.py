"""The pictures of the trade-off benchmark: where every method ends in every condition, and the way there."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from _tradeoff_run import BUDGET, options_of
from matplotlib.figure import Figure

COLOURS = {"apex": "#d62728", "tuned": "#bbbbbb", "only": "#2ca02c"}
OTHER = "#1f77b4"
FLOOR, LEFT = -3.5, -0.5  # points beyond are drawn there, with the worst gain beside the name
# The rest of those with a change is in the tables alone.
VARIANTS = ("apex:quick", "apex:weak_need", "apex:full_scale", "apex:quick:kl")
SHOWN = ("sum_then_normalize", "normalize_then_sum", "apex")


def draw(rows: list[dict[str, Any]], table: list[dict[str, Any]], path: Path) -> None:
    """Worst against mean gain of the methods, a panel a condition; under it the curves and priorities of the longest runs.

    Conditions without `apex` are left out, unless none has it.
    """
    table = [line for line in table if ":" not in line["method"] or line["method"] in VARIANTS]
    compared = [line for line in table if line["method"] == "apex"] or table
    conditions = list(dict.fromkeys(line["condition"] for line in compared))
    across = 2 if len(conditions) == 4 else min(len(conditions), 3)
    down = math.ceil(len(conditions) / across)
    condition = shown_condition(conditions)
    courses = [row for row in rows if row["condition"] == condition and "curve" in row]
    runs = {method: [row for row in courses if row["method"] == method] for method in SHOWN}
    runs = {method: mine for method, mine in runs.items() if mine}

    panels = Figure(figsize=(5 * max(across, 2), 4 * down + 3.2), layout="constrained")
    ends, courses = panels.subfigures(2, 1, height_ratios=(4 * down, 3.2))
    for axis, name in zip(ends.subplots(down, across, squeeze=False).flat, conditions, strict=False):
        _ends(axis, name, [line for line in table if line["condition"] == name])
    if runs:
        axes = courses.subplots(1, len(runs) + ("apex" in runs), squeeze=False)[0]
        _courses(axes, condition, runs)
    for axis in panels.axes:
        axis.spines[["top", "right"]].set_visible(False)
        if not axis.has_data():
            axis.set_axis_off()
    panels.savefig(path, dpi=80)


def draw_objectives(table: list[dict[str, Any]], path: Path) -> None:
    """The gains of each objective in the first condition, a line of dots a method, the best worst objective on top.

    Specialists are left out, and of tuned weights all but those with the largest hypervolume.
    """
    lines = [line for line in table if line["condition"] == table[0]["condition"]]
    tuned = [line for line in lines if line["method"].startswith("tuned")]
    best = max(tuned, key=lambda line: line["hypervolume"][0], default=None)
    lines = [
        line
        for line in lines
        if line is best or line["method"] == "apex:weak_need" or not re.match("tuned|only|.*:", line["method"])
    ]
    lines.sort(key=lambda line: line["worst_gain"][0])
    figure = Figure(figsize=(9, 0.9 + 0.27 * len(lines)), layout="constrained")
    axis = figure.subplots()
    columns = [name for name in lines[0] if name.startswith("gains/")]
    for column in columns:
        gains, errors = zip(*(line[column] for line in lines), strict=True)
        look = {"fmt": "o", "markersize": 6, "linewidth": 1, "label": column.removeprefix("gains/")}
        axis.errorbar(gains, range(len(lines)), xerr=[0 if math.isnan(error) else error for error in errors], **look)
    ends = [line[column][0] for line in lines for column in columns]
    axis.set(xlim=(min(ends) - 0.3, max(ends) + 0.3), xlabel="gain (standard deviations of the untrained model)")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(lines)), [_title(line["method"]) for line in lines])
    for tick, line in zip(axis.get_yticklabels(), lines, strict=True):
        tick.set_color(_colour(line["method"]) if line["method"].startswith("apex") else "black")
    axis.grid(axis="x", linewidth=0.3)
    for text, side in (("← worse than before training  ", "right"), ("  better →", "left")):
        axis.text(0, 1.01, text, ha=side, fontsize=9, transform=axis.get_xaxis_transform())
    figure.legend(loc="outside upper center", ncols=len(columns), fontsize=9, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)


def _title(method: str) -> str:
    rule, _, change = method.partition(":")
    if rule.startswith("tuned"):
        return "sum, best weights by hand, " + " : ".join(rule.split("_")[1:])
    if change in ("weak_need", "mild_need"):
        return f"apex, need_coef={1 if change == 'weak_need' else 2}"
    quick = ["quick"] if rule == "apex" and change and not change.startswith("quick") else []
    return ", ".join([rule, *quick, *filter(None, change.split(":"))])


def _colour(method: str) -> str:
    return COLOURS.get(re.split("[_:]", method)[0], OTHER)


def shown_condition(conditions: Iterable[str]) -> str:
    """The condition whose course is drawn: the longest runs, if there are any."""
    found = list(dict.fromkeys(conditions))
    return "long" if "long" in found else found[0]


def _ends(axis: Any, condition: str, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        (x, x_error), (y, y_error) = line["mean_gain"], line["worst_gain"]
        look = {"fmt": "o", "color": _colour(line["method"]), "markersize": 4, "linewidth": 0.8}
        x, x_error = max(x, LEFT), x_error if x >= LEFT else 0.0
        axis.errorbar(x, max(y, FLOOR), xerr=x_error, yerr=y_error if y >= FLOOR else 0.0, **look)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set(title=condition, xlabel="mean gain (base stds)", ylabel="worst objective's gain")
    shown = [line for line in lines if len(lines) < 12 or not line["method"].startswith("tuned")]
    named = []
    for line in shown:
        x, y, method = line["mean_gain"][0], line["worst_gain"][0], line["method"]
        text = _title(method) if y >= FLOOR else f"{_title(method)} ({y:+.0f})"
        named.append((max(y, FLOOR), max(x, LEFT), method, text))
    named.sort()
    low, high = axis.get_ylim()
    line_height, place = 0.06, -math.inf
    highest = iter(1 - line_height * i for i in reversed(range(len(named))))
    # Names in a column beside the panel, each as near to its point as the others allow.
    for y, x, method, text in named:
        place = min(max((y - low) / (high - low), place + line_height), next(highest))
        link = {"arrowstyle": "-", "linewidth": 0.4, "color": _colour(method)}
        beside: Any = {"xytext": (1.03, place), "textcoords": "axes fraction", "va": "center", "fontsize": 7}
        axis.annotate(text, (x, y), arrowprops=link, annotation_clip=False, color="black", **beside)


def _courses(axes: Any, condition: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    every = options_of(condition).get("eval_steps", BUDGET["eval_steps"])
    means = {method: torch.tensor([row["curve"] for row in mine]).mean(0) for method, mine in runs.items()}
    reach = [bound for curves in means.values() for bound in (float(curves.min()) - 0.1, float(curves.max()) + 0.1)]
    for axis, (method, curves) in zip(axes, means.items(), strict=False):
        for values, name in zip(curves.T, runs[method][0]["gains"], strict=True):
            axis.plot([step * every // 2 for step in range(len(values))], values, label=name)
        axis.axhline(0, color="black", linewidth=0.6)
        title = f"{method}, {condition}"
        axis.set(title=title, xlabel="iteration", ylabel="gain (base stds)", ylim=(min(reach), max(reach)))
    axes[0].legend(fontsize=7, loc="lower left")
    if "apex" in runs:
        for name in runs["apex"][0]["priorities"]:
            axes[-1].plot(torch.tensor([row["priorities"][name] for row in runs["apex"]]).mean(0))
        axes[-1].set(title=f"priorities of apex, {condition}", xlabel="iteration")
