"""Pictures of a run as files: PNG curves for a model card, grids of images, and samples before and after."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from .run import Run, read_run
from .svg import trend

COLOURS = ("#2463c9", "#c4501b", "#14805e", "#8a3fb3", "#92690a", "#c02b62", "#0f7f94", "#5d6470")
LINE = 12  # pixels from one line of a caption to the next


def write_figures(run_dir: Path | str) -> list[Path]:
    """Write `rewards.png`, `priorities.png` and `samples.png` into `figures/` of a run directory, and return their paths.

    A figure without data is left out. Needs matplotlib.
    """
    run = read_run(Path(run_dir))
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    written = []
    for name, draw, key in (("rewards", _rewards, "rewards/{}/mean"), ("priorities", _priorities, "priority/{}")):
        if curves := _curves(run, key):
            written.append(folder / f"{name}.png")
            draw(curves).savefig(written[-1], facecolor="white", metadata={"Software": None})
    if run.samples:
        written.append(folder / "samples.png")
        _samples(run).save(written[-1])
    return written


def _axes(columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with axes beside each other, over optimizer steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib. Install it with: pip install "trl_apex[report]"') from error

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#b8bcc4")
        axis.tick_params(colors="#5c626d", labelsize=8, length=3)
        axis.grid(axis="y", color="#e8eaed", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.set_xlabel("optimizer step", fontsize=8, color="#5c626d")
        axis.locator_params(axis="x", nbins=4, integer=True)
        axis.locator_params(axis="y", nbins=5)
    return figure, axes


def _curves(run: Run, key: str) -> list[tuple[str, str, list[float], list[float]]]:
    """Name, colour, steps and values of each objective that has any."""
    curves = [(name, *run.series(key.format(name))) for name in run.objectives]
    return [(name, COLOURS[i % len(COLOURS)], x, y) for i, (name, x, y) in enumerate(curves) if x]


def _rewards(curves: list[tuple[str, str, list[float], list[float]]]) -> Any:
    figure, axes = _axes(len(curves), 2.7 * len(curves), 2.3)
    for axis, (name, colour, steps, values) in zip(axes, curves, strict=True):
        mean, error = map(np.asarray, trend(values))
        axis.plot(steps, values, ".", color=colour, alpha=0.35, markersize=3)
        axis.fill_between(steps, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.16, linewidth=0)
        axis.plot(steps, mean, color=colour, linewidth=1.8)
        axis.set_title(name, fontsize=10, fontweight="bold", loc="left")
    return figure


def _priorities(curves: list[tuple[str, str, list[float], list[float]]]) -> Any:
    figure, (axis,) = _axes(1, 5.4, 2.9)
    axis.axhline(1 / len(curves), color="#9aa0aa", linewidth=1, linestyle=(0, (4, 4)))
    for name, colour, steps, values in curves:
        axis.plot(steps, values, color=colour, linewidth=1.8, label=f"{name} {values[-1]:.2f}")
    axis.set_ylim(bottom=0)
    axis.margins(x=0.01)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9, labelcolor="linecolor")
    axis.set_title("Priority of each objective", fontsize=10, fontweight="bold", loc="left")
    return figure


def _samples(run: Run) -> Image.Image:
    """The first eight images, base above tuned."""
    samples = run.samples[:8]
    images = []
    for path in [*(s.base for s in samples), *(s.tuned for s in samples)]:
        with Image.open(path) as image:
            images.append(ImageOps.contain(image.convert("RGB"), (160, 160)))
    return image_grid(images, columns=len(samples), gap=4)


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Lay images out row by row, on white; a cell is as large as the largest image, with `gap` pixels between cells.

    Example:
        >>> image_grid([Image.new("RGB", (8, 8))] * 3, columns=2, gap=1).size
        (17, 17)
    """
    if not images or columns < 1:
        raise ValueError(
            f"A grid needs at least one image and one column. Found {len(images)} images and {columns} columns. "
            "Pass a list of PIL images."
        )
    width, height = max(i.width for i in images), max(i.height for i in images)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image.convert("RGB"), (column * (width + gap), row * (height + gap)))
    return grid


def reward_grid(samples: Sequence[Mapping[str, Any]], columns: int, side: int = 160) -> Image.Image:
    """Images with their prompt and rewards beneath each, as one picture.

    Args:
        samples (`Sequence[Mapping]`): each with `prompt`, `image` (PIL) and `rewards` (name to number or None).
        side (`int`): pixels of the longer side of an image.

    Example:
        >>> sample = {"prompt": "a cat", "image": Image.new("RGB", (8, 8)), "rewards": {"ocr": 0.5}}
        >>> reward_grid([sample] * 3, columns=2, side=64).size
        (130, 178)
    """
    cells = []
    for sample in samples:
        image = ImageOps.contain(sample["image"].convert("RGB"), (side, side))
        lines = [sample["prompt"]]
        for name, value in sample["rewards"].items():
            lines.append(f"{name} -" if value is None or not math.isfinite(value) else f"{name} {value:.3g}")
        cell = Image.new("RGB", (side, image.height + LINE * len(lines)), "white")
        cell.paste(image)
        pen = ImageDraw.Draw(cell)
        for i, line in enumerate(lines):  # the font that every Pillow has knows the letters of Latin-1
            pen.text((1, image.height + LINE * i), line.encode("latin-1", "replace").decode("latin-1"), fill="black")
        cells.append(cell)
    return image_grid(cells, columns)


def save_samples(folder: str | Path, base: Sequence[dict], tuned: Sequence[dict], count: int) -> None:
    """Write the first `count` images for the same prompts and noise one by one, and as two grids beside the folder.

    Args:
        folder (`str` or `Path`): usually `samples` of a run directory; made if needed.
        base, tuned (sequences of `dict`): records with `prompt`, `image` (PIL) and `rewards`, in the same order.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prompts: list[dict[str, Any]] = []
    for i, pair in enumerate(zip(base[:count], tuned[:count], strict=True)):
        entry: dict[str, Any] = {"prompt": pair[0]["prompt"]}
        for name, record in zip(("base", "tuned"), pair, strict=True):
            record["image"].save(folder / f"{name}_{i:03d}.png")
            entry[name] = {k: v if math.isfinite(v) else None for k, v in record["rewards"].items()}
        prompts.append(entry)
    (folder / "prompts.json").write_text(json.dumps(prompts, indent=1))
    for name, records in (("base", base), ("tuned", tuned)):
        image_grid([record["image"] for record in records[:count]], 8).save(folder.parent / f"{name}_grid.png")
