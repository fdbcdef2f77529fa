"""The main curves of a run as PNG files, for a README or a model card."""

from pathlib import Path
from typing import Any

from PIL import Image

from .axis import dodge
from .grid import image_grid
from .run import Run, read_run
from .smooth import trend

COLOURS = ("#2463c9", "#c4501b", "#14805e", "#8a3fb3", "#92690a", "#c02b62", "#0f7f94", "#5d6470")


def write_figures(run_dir: Path | str) -> list[Path]:
    """Write `figures/rewards.png`, `figures/priorities.png` and `figures/samples.png`, each where its data exists.

    Args:
        run_dir (`Path`): a run directory.

    Returns:
        `list[Path]`: the files written.

    Raises:
        FileNotFoundError: if the directory does not exist or holds nothing of a run.
        ImportError: if matplotlib is not installed.
    """
    run = read_run(Path(run_dir))
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    written = [_rewards(run, folder), _priorities(run, folder), _samples(run, folder)]
    return [path for path in written if path is not None]


def _figure(columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Figures need matplotlib. Install it with: pip install "trl_apex[report]"') from error

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
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


def _rewards(run: Run, folder: Path) -> Path | None:
    curves = [(name, *run.series(f"rewards/{name}/mean")) for name in run.objectives]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return None
    figure, axes = _figure(len(curves), 2.7 * len(curves), 2.3)
    for index, (axis, (name, steps, values)) in enumerate(zip(axes, curves, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        mean, error = trend(values)
        axis.plot(steps, values, ".", color=colour, alpha=0.35, markersize=3)
        low = [m - 2 * e for m, e in zip(mean, error, strict=True)]
        high = [m + 2 * e for m, e in zip(mean, error, strict=True)]
        axis.fill_between(steps, low, high, color=colour, alpha=0.16, linewidth=0)
        axis.plot(steps, mean, color=colour, linewidth=1.8)
        axis.set_title(name, fontsize=10, fontweight="bold", loc="left")
    return _save(figure, folder / "rewards.png")


def _priorities(run: Run, folder: Path) -> Path | None:
    curves = [(i, name, *run.series(f"priority/{name}")) for i, name in enumerate(run.objectives)]
    curves = [curve for curve in curves if curve[2]]
    if not curves:
        return None
    figure, (axis,) = _figure(1, 5.4, 2.9)
    axis.axhline(1 / len(curves), color="#9aa0aa", linewidth=1, linestyle=(0, (4, 4)))
    for index, _, steps, values in curves:
        axis.plot(steps, values, color=COLOURS[index % len(COLOURS)], linewidth=1.8)
    top = max(max(values) for *_, values in curves) * 1.12
    axis.set_ylim(0, top)
    axis.margins(x=0.01)
    places = dodge([values[-1] for *_, values in curves], 0.075 * top, 0.03 * top, 0.98 * top)
    for (index, name, _, values), place in zip(curves, places, strict=True):
        colour = COLOURS[index % len(COLOURS)]
        axis.annotate(
            f"{name} {values[-1]:.2f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            color=colour,
            fontsize=9,
            fontweight="bold",
        )
    axis.set_title("Priority of each objective", fontsize=10, fontweight="bold", loc="left")
    return _save(figure, folder / "priorities.png")


def _samples(run: Run, folder: Path, most: int = 8, side: int = 160) -> Path | None:
    samples = run.samples[:most]
    if not samples:
        return None
    images = [_opened(s.base, side) for s in samples] + [_opened(s.tuned, side) for s in samples]
    path = folder / "samples.png"
    image_grid(images, columns=len(samples), gap=4).save(path)
    return path


def _opened(path: Path, side: int) -> Image.Image:
    with Image.open(path) as image:
        small = max(image.size) < side
        return image.convert("RGB").resize(
            (side, round(side * image.height / image.width)),
            Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS,
        )


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, facecolor="white", metadata={"Software": None})
    return path
