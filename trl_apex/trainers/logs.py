"""What a run logs and records: metrics, pictures, its arguments, versions and warnings."""

import json
import logging
import math
import shlex
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..diffusion.losses import Surrogate
from ..distributed import all_reduce_sum, gather_list, gather_rows
from ..redact import redacted
from ..rewards.base import to_pil
from ..rewards.scoring import ScoredBatch
from .config import default_of

logger = logging.getLogger(__name__)

COLUMNS, ROWS = 8, 8
"""Of the pictures that are logged, at most."""
PICTURES = COLUMNS * ROWS
"""The main process keeps no more than these, all of its own rows: pictures are not gathered."""
EVAL_PROMPTS = "eval_prompts.jsonl"
"""The evaluation set of a run that was given a dataset rather than its name."""
COUNTS = ("reward_failures/", "skipped_updates/dead", "skipped_updates/nonfinite")
"""Metrics that a log line sums, where TRL would average them. A share is logged beside each."""
PACKAGES = (
    *("trl_apex", "torch", "trl", "transformers", "diffusers", "accelerate", "peft", "datasets", "huggingface_hub"),
    *("safetensors", "numpy", "pillow", "deepspeed", "torchjd", "rapidocr", "onnxruntime", "fastapi", "matplotlib"),
)


# Metrics of a rollout


def log_scoring(
    scored: list[ScoredBatch], names: list[str], metrics: dict[str, list[float]], device: torch.device
) -> tuple[dict[str, int], int]:
    """Log the time and the failures of each reward; return the failures of all ranks, and how many images there were."""
    counts = [sum(batch.failures.get(name, 0) for batch in scored) for name in names]
    images = sum(len(batch.rewards) for batch in scored)
    totals = all_reduce_sum(torch.tensor([*counts, images], dtype=torch.float32, device=device))
    *all_counts, samples = map(int, totals.tolist())
    for name, failures in zip(names, all_counts, strict=True):
        metrics[f"time/reward/{name}"].append(sum(batch.seconds.get(name, 0.0) for batch in scored))
        metrics[f"reward_failures/{name}"].append(float(failures))
        metrics[f"reward_failure_rate/{name}"].append(failures / samples)
    return dict(zip(names, all_counts, strict=True)), samples


def log_rewards(
    rewards: Tensor, names: list[str], weights: Tensor, group_size: int, metrics: dict[str, list[float]]
) -> None:
    """Log mean, spread and number of each objective's rewards, and of the weighted sum; `[B, K]` of all ranks, NaN if missing."""
    rewards = rewards.double()
    for name, column in zip(names, rewards.T, strict=True):
        metrics[f"rewards/{name}/mean"].append(column.nanmean().item())
        metrics[f"rewards/{name}/std"].append(_std(column))
        scored = column.isfinite().reshape(-1, group_size)
        metrics[f"rewards/{name}/images"].append(float(scored.sum()))
        metrics[f"rewards/{name}/prompts"].append(float(scored.any(1).sum()))
    total = weighted_sum(rewards, weights)
    groups = [_std(group) for group in total.reshape(-1, group_size)]
    spreads = torch.tensor([std for std in groups if math.isfinite(std)], dtype=torch.float64)
    metrics["reward"].append(total.nanmean().item())
    metrics["reward_std"].append(_std(total))
    metrics["reward_std_in_group"].append(spreads.mean().item())
    metrics["frac_reward_zero_std"].append((spreads < 1e-8).double().mean().item())


def weighted_sum(rewards: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum `[B]` of rewards `[B, K]` without those that are missing (NaN); NaN where all of a row are.

    An objective of weight 0 is only watched.

    Example:
        >>> weighted_sum(torch.tensor([[1.0, 2.0], [1.0, torch.nan], [torch.nan, torch.nan]]), torch.tensor([1.0, 0.5]))
        tensor([2., 1., nan])
    """
    total = (rewards * weights).nansum(1)
    return total.masked_fill(~(rewards.isfinite() & (weights != 0)).any(1), math.nan)


def _std(values: Tensor) -> float:
    valid = values[values.isfinite()]
    return valid.std().item() if len(valid) > 1 else math.nan


class RewardLog:
    """What reward functions log about some images, whose `numbers` are their rows among those of all ranks."""

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self.numbers = list(numbers)
        self.metrics: defaultdict[str, list[float]] = defaultdict(list)
        self.columns: defaultdict[str, list] = defaultdict(list)

    def log_metric(self, name: Any, value: Any) -> None:
        """Take in one number; None and NaN are left out."""
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"`log_metric` takes one number. Found {type(value).__name__}. Pass a float.") from error
        if not math.isnan(number):
            self.metrics[str(name)].append(number)

    def log_extra(self, column: Any, values: Any) -> None:
        """Take in a value for each image; what no table holds becomes text."""
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, list | tuple):
            raise ValueError(f"`log_extra` takes a list, one value per image. Found {type(values).__name__}.")
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError):
            values = [None if value is None else str(value) for value in values]
        self.columns[str(column)].extend(values)


def log_from_rewards(
    logged: list[RewardLog], metrics: dict[str, list[float]], extra: dict[str, Any], size: int
) -> None:
    """Collect what reward functions logged on any rank, in one exchange, for the `size` images of an iteration.

    Where a call logged another number of values than it has images, these are left empty: nobody knows whose they are.
    """
    # Copies, since a call that outlasted its timeout may still be logging from its thread.
    own = [
        (
            log.numbers,
            *({name: list(values) for name, values in list(kind.items())} for kind in (log.metrics, log.columns)),
        )
        for log in logged
    ]
    everyone = gather_list(own)
    for name in sorted({name for _, numbers, _ in everyone for name in numbers}):
        values = [value for _, numbers, _ in everyone for value in numbers.get(name, [])]
        metrics[name].append(sum(values) / len(values))
    for column in sorted({column for _, _, columns in everyone for column in columns} | extra.keys()):
        found: list[Any] = [None] * size
        for rows, _, columns in everyone:
            values = columns.get(column, [])
            if len(values) not in (0, len(rows)):
                logger.warning(
                    "`log_extra` logged %d values of %r for %d images: left out.", len(values), column, len(rows)
                )
                continue
            for row, value in zip(rows, values, strict=False):
                found[row] = value
        extra[column].extend(found)


# Metrics of updates


def update_metrics(surrogate: Surrogate, distances: dict[str, Tensor]) -> dict[str, Tensor]:
    """Metrics of one micro-batch, on the device: reading them at once would wait for the whole queue."""
    values = {
        "clip_ratio/low_mean": surrogate.low.float().mean(),
        "clip_ratio/high_mean": surrogate.high.float().mean(),
        "clip_ratio/region_mean": (surrogate.low | surrogate.high).float().mean(),
        "ratio/mean": surrogate.ratio.mean(),
        "ratio/max_deviation": (surrogate.ratio - 1).abs().max(),
        **distances,
    }
    return {name: value.detach() for name, value in values.items()}


def read_updates(unread: list[dict[str, Tensor]], metrics: dict[str, list[float]]) -> None:
    """Move the metrics of micro-batches, over all ranks, from `unread` to `metrics`."""
    if not unread:
        return
    ranks = gather_rows(torch.stack([torch.stack(list(values.values())) for values in unread])[None]).cpu()
    for name, values in zip(unread[0], ranks.unbind(2), strict=True):
        metrics[name] += (values.amax(0) if name == "ratio/max_deviation" else values.mean(0)).tolist()
    metrics["clip_ratio/low_min"] += ranks[:, :, 0].amin(0).tolist()
    metrics["clip_ratio/high_max"] += ranks[:, :, 1].amax(0).tolist()
    unread.clear()


def sum_counts(metrics: dict[str, list[float]]) -> None:
    """Sum the counts since the last log line, which TRL would average."""
    for name, values in metrics.items():
        if name.startswith(COUNTS) and not name.endswith("_rate"):
            values[:] = [sum(values)]


# Pictures


def newest_samples(logs: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The rows of TRL's table that have a picture: prompt, image and rewards."""
    return [
        {"prompt": logs["prompt"][i], "image": images[0], "rewards": {n: logs["rewards"][n][i] for n in names}}
        for i, images in enumerate(logs["images"])
        if images
    ]


def shown_pictures(images: Tensor, group_size: int, size: int) -> list[list[Image.Image]]:
    """A list for each of all ranks' `size` rows: a picture for the rows that the grid shows, else empty.

    The `images` `[B, 3, H, W]` are those of the main process, which has the first rows.
    """
    columns = min(group_size, COLUMNS)
    shown = [i for i in range(len(images)) if i % group_size < columns][: columns * ROWS]
    pictures: list[list[Image.Image]] = [[] for _ in range(size)]
    for row, picture in zip(shown, to_pil(images[shown]), strict=True):
        pictures[row] = [picture]
    return pictures


def send_picture(callbacks: Iterable[Any], name: str, picture: Image.Image, step: int) -> None:
    """Log a picture under `name` with every tracker among a trainer's `callbacks` that has a run open.

    TRL's table of completions holds the images in trackio; in Weights & Biases its cells say "Image" (TRL 1.16, wandb 0.31),
    and TensorBoard has no tables.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
            callback.tb_writer.flush()
        elif isinstance(callback, WandbCallback):
            import wandb

            if wandb.run is not None:
                wandb.log({name: wandb.Image(picture), "train/global_step": step})
        elif isinstance(callback, TrackioCallback):
            import trackio

            if trackio.context_vars.current_run.get() is not None:
                trackio.log({name: trackio.Image(picture), "train/global_step": step})


# Files beside the run


def record_run(trainer: Any) -> None:
    """Write what a trainer was given, without secrets: `config.json`, `environment.json`, evaluation prompts without a name.

    `environment.json` holds the command, the date, the versions, and the names of arguments that differ from their defaults.
    """
    output_dir, dataset = Path(trainer.args.output_dir), trainer.eval_dataset
    output_dir.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = vars(trainer.sources) | trainer.args.to_dict()
    changed = [
        f.name
        for group in (trainer.sources, trainer.args)
        for f in fields(group)
        if getattr(group, f.name, default := default_of(f)) != default
    ]
    date = datetime.now().astimezone().isoformat(" ", "minutes")
    command = trainer.command or shlex.join(sys.argv)
    record = {"command": command, "date": date, "changed": changed, "versions": versions()}
    for name, content in (("config.json", dict(sorted(arguments.items()))), ("environment.json", record)):
        (output_dir / name).write_text(json.dumps(redacted(content), indent=1, default=str))
    if isinstance(dataset, Dataset) and trainer.sources.eval_dataset is None:
        with suppress(TypeError):  # a column of pictures
            rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in dataset]
            (output_dir / EVAL_PROMPTS).write_text("".join(rows), encoding="utf-8")


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter; optional ones may be missing."""
    found = dict.fromkeys(PACKAGES, "not installed")
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextmanager
def recorded_warnings(output_dir: Path | None, trainer: Any) -> Iterator[None]:
    """Write each of this package's warnings once, with its step, to `warnings.jsonl` of `output_dir`, if that is not None."""
    if output_dir is None:
        yield
        return
    seen: set[str] = set()

    def record(text: str) -> None:
        text = str(redacted(" ".join(text.split())))
        if text not in seen:
            seen.add(text)
            with (output_dir / "warnings.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": trainer.state.global_step, "text": text}) + "\n")

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda entry: record(entry.getMessage())  # type: ignore[method-assign, assignment, misc]
    package = logging.getLogger("trl_apex")
    with warnings.catch_warnings():  # puts `showwarning` back at the end
        show = warnings.showwarning

        def show_and_record(message, category, filename, lineno, file=None, line=None):
            if "trl_apex" in filename or category.__module__.startswith("trl_apex"):
                record(str(message))
            show(message, category, filename, lineno, file, line)

        warnings.showwarning = show_and_record
        package.addHandler(handler)
        try:
            yield
        finally:
            package.removeHandler(handler)
