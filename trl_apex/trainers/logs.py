"""What a run logs and records: metrics, pictures, its arguments and environment."""

import json
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..diffusion.losses import Surrogate
from ..diffusion.nouns import Rollout
from ..distributed import all_reduce_sum, gather_list, gather_rows
from ..redact import redacted
from ..report.figures import reward_grid
from ..rewards.base import to_pil
from ..rewards.scoring import RewardFailureRateError, ScoredBatch


def send_picture(callbacks: Iterable[Any], name: str, picture: Image.Image, step: int) -> None:
    """Log a picture with every tracker that is among a trainer's callbacks and has a run open.

    Args:
        callbacks (`Iterable[transformers.TrainerCallback]`): the trainer's.
        name (`str`): its key.
        picture (`PIL.Image.Image`): what to log.
        step (`int`): optimizer steps so far.

    Note:
        TRL's table of completions holds the images in trackio; in Weights & Biases its cells say "Image" (TRL 1.16,
        wandb 0.31), and TensorBoard has no tables.
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


PACKAGES = (
    *("trl_apex", "torch", "trl", "transformers", "diffusers", "accelerate", "peft", "datasets", "huggingface_hub"),
    *("safetensors", "numpy", "pillow", "deepspeed", "torchjd", "rapidocr", "onnxruntime", "fastapi", "matplotlib"),
)


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter; optional ones may be missing."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def record_arguments(output_dir: Path, groups: Sequence[Any], command: str) -> None:
    """Write `config.json` (every argument) and `environment.json`, without secrets.

    `environment.json` holds the command, the date, the versions, and the names of the arguments that differ from their
    defaults.

    Args:
        output_dir (`Path`): the run directory; made if needed.
        groups (`Sequence`): dataclass instances, such as an [`APEXConfig`].
        command (`str`): the command line.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {}
    changed = []
    for group in groups:
        arguments |= group.to_dict() if hasattr(group, "to_dict") else vars(group)
        for f in fields(group):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if getattr(group, f.name, default) != default:
                changed.append(f.name)
    date = datetime.now().astimezone().isoformat(" ", "minutes")
    record = {"command": command, "date": date, "changed": changed, "versions": versions()}
    for name, content in (("config.json", dict(sorted(arguments.items()))), ("environment.json", record)):
        (output_dir / name).write_text(json.dumps(redacted(content), indent=1, default=str))


@contextmanager
def recorded_warnings(output_dir: Path | None, trainer: Any) -> Iterator[None]:
    """Append this package's warnings to `warnings.jsonl`, each once, and show them as usual.

    Args:
        output_dir (`Path`, *optional*): None records nothing.
        trainer: its step is recorded with each warning.
    """
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


logger = logging.getLogger(__name__)

COLUMNS, ROWS = 8, 8
"""Of the pictures that are logged, at most."""
PICTURES = COLUMNS * ROWS
"""The main process keeps no more than these, all of its own rows: pictures are not gathered."""
COUNTS = ("reward_failures/", "skipped_updates/dead", "skipped_updates/nonfinite")
"""Metrics that a log line sums, where TRL would average them. A share is logged beside each."""
PATIENCE = 3
"""Iterations without any score after which an objective is named in a warning."""


class LogsMixin(Trainer):
    """Fills `_metrics` and `_logs`, which `trl.GRPOTrainer.log` writes at the next `logging_steps`."""

    _unsent_images = False
    _iterations_logged = 0
    _unread: list[dict[str, Tensor]] = []

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's own, and with `log_completions` a picture of the newest images with their rewards."""
        self._read_updates()
        for name, values in self._metrics["train"].items():
            if name.startswith(COUNTS) and not name.endswith("_rate"):
                values[:] = [sum(values)]
        super().log(logs, start_time)
        if self._unsent_images:
            self._unsent_images = False
            columns = min(self.num_generations, COLUMNS)
            shown = [i for i, images in enumerate(self._logs["images"]) if images]
            samples = [
                {
                    "prompt": self._logs["prompt"][i],
                    "image": self._logs["images"][i][0],
                    "rewards": {name: self._logs["rewards"][name][i] for name in self.reward_func_names},
                }
                for i in shown
            ]
            self._send_samples("images/rollout", samples, columns)

    def _send_samples(self, name: str, samples: list[dict[str, Any]], columns: int = COLUMNS) -> None:
        """Log a grid of samples (prompt, image, rewards) with the trackers of `report_to`."""
        if self.accelerator.is_main_process:
            picture = reward_grid(samples[: columns * ROWS], columns)
            send_picture(self.callback_handler.callbacks, name, picture, self.state.global_step)

    def _log_update(self, surrogate: Surrogate, kl: Tensor | None) -> None:
        """Keep what one micro-batch tells on the device: reading it now would wait for the whole queue."""
        values = {
            "clip_ratio/low_mean": surrogate.low.float().mean(),
            "clip_ratio/high_mean": surrogate.high.float().mean(),
            "clip_ratio/region_mean": (surrogate.low | surrogate.high).float().mean(),
            "ratio/mean": surrogate.ratio.mean(),
            "ratio/max_deviation": (surrogate.ratio - 1).abs().max(),
        }
        if kl is not None:
            values["kl"] = kl.detach()
        self._unread = [*self._unread, {name: value.detach() for name, value in values.items()}]

    def _read_updates(self) -> None:
        """Turn what micro-batches told into metrics, over all ranks."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        metrics = self._metrics["train"]
        ranks = gather_rows(torch.stack([torch.stack(list(values.values())) for values in unread])[None]).cpu()
        for name, told in zip(unread[0], ranks.unbind(2), strict=True):
            metrics[name] += (told.amax(0) if name == "ratio/max_deviation" else told.mean(0)).tolist()
        metrics["clip_ratio/low_min"] += ranks[:, :, 0].amin(0).tolist()
        metrics["clip_ratio/high_max"] += ranks[:, :, 1].amax(0).tolist()

    def _log_scoring(self, scored: list[ScoredBatch]) -> None:
        names = self.reward_func_names
        counts = torch.tensor(
            [sum(s.failures.get(name, 0) for s in scored) for name in names] + [0], dtype=torch.float32
        )
        counts[-1] = sum(len(s.rewards) for s in scored)
        *all_failures, samples = map(int, all_reduce_sum(counts.to(self.accelerator.device)).tolist())
        for name, failures in zip(names, all_failures, strict=True):  # of all ranks, so that they stop together
            self._metrics["train"][f"time/reward/{name}"].append(sum(s.seconds.get(name, 0.0) for s in scored))
            self._metrics["train"][f"reward_failures/{name}"].append(float(failures))
            self._metrics["train"][f"reward_failure_rate/{name}"].append(failures / samples)
            if failures > self.args.max_reward_failure_rate * samples:
                self.request_stop(
                    f"reward {name!r} failed for {failures} of {samples} images, more than max_reward_failure_rate="
                    f"{self.args.max_reward_failure_rate}. The warnings above tell why; raise the limit to go on without it.",
                    RewardFailureRateError,
                )

    def _log_rewards(self, rewards: Tensor, advantages: Tensor, inputs: list, rollouts: list[Rollout]) -> None:
        metrics = self._metrics["train"]
        rewards = rewards.double()
        for name, column in zip(self.reward_func_names, rewards.T, strict=True):
            valid = column[column.isfinite()]
            metrics[f"rewards/{name}/mean"].append(valid.mean().item() if len(valid) else math.nan)
            metrics[f"rewards/{name}/std"].append(_std(column))
        self._name_absent_objectives(rewards)
        total = weighted_sum(rewards, self.reward_weights)
        groups = [_std(group) for group in total.reshape(-1, self.num_generations)]
        spreads = torch.tensor([std for std in groups if math.isfinite(std)], dtype=torch.float64)
        metrics["reward"].append(total.nanmean().item())
        metrics["reward_std"].append(_std(total))
        metrics["reward_std_in_group"].append(spreads.mean().item())
        metrics["frac_reward_zero_std"].append((spreads < 1e-8).double().mean().item())
        if self.log_completions:
            prompts = gather_list([row["prompt"] for row in inputs])
            self._logs["prompt"].extend(prompts)
            self._logs["completion"].extend(["<image>"] * len(prompts))
            self._logs["images"].extend(self._pictures(rollouts, len(prompts)))
            for name, column in zip(self.reward_func_names, rewards.T.tolist(), strict=True):
                self._logs["rewards"][name].extend(column)
            self._logs["advantages"].extend(advantages.tolist())
            self._unsent_images = True
        # A reward may log on some ranks only, so all names travel in one exchange.
        # A call that outlasted its timeout may still be logging from its thread, hence the copies in one step.
        pending = tuple(
            {k: list(v) for k, v in list(d.items())} for d in (self._pending_metrics, self._pending_extra_logs)
        )
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()
        everyone = gather_list([pending])
        for name in sorted({name for logged, _ in everyone for name in logged}):
            values = [value for logged, _ in everyone for value in logged.get(name, [])]
            metrics[name].append(sum(values) / len(values))
        for column in sorted({column for _, extra in everyone for column in extra}):
            self._logs["extra"][column].extend(value for _, extra in everyone for value in extra.get(column, []))

    def _name_absent_objectives(self, rewards: Tensor) -> None:
        """Warn, once each, of objectives that no image had a score for in the first iterations."""
        self._iterations_logged += 1
        self._scored_objectives |= {
            name for name, column in zip(self.reward_func_names, rewards.T, strict=True) if column.isfinite().any()
        }
        if self._iterations_logged == PATIENCE:
            for name in self.reward_func_names:
                if name not in self._scored_objectives:
                    logger.warning(
                        "The reward %r has scored no image in %d iterations, so nothing is learned from it. It returns None "
                        "or fails for every prompt: check the column it reads and the prompts it applies to.",
                        name,
                        PATIENCE,
                    )

    def _pictures(self, rollouts: list[Rollout], size: int) -> list[list[Any]]:
        """One list a row of all ranks, in order: a picture for the rows that the grid shows, nothing for the others."""
        if not self.accelerator.is_main_process:
            return [[]] * size
        images = torch.cat([r.images for r in rollouts])  # the main process has the first rows
        columns = min(self.num_generations, COLUMNS)
        shown = [i for i in range(len(images)) if i % self.num_generations < columns][: columns * ROWS]
        pictures: list[list[Any]] = [[] for _ in range(size)]
        for row, picture in zip(shown, to_pil(images[shown]), strict=True):
            pictures[row] = [picture]
        return pictures


def weighted_sum(rewards: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of each row's rewards, without those that are missing; NaN where all are.

    Args:
        rewards (`torch.Tensor` of shape `[B, K]`): NaN for a missing one.
        weights (`torch.Tensor` of shape `[K]`): the user's; an objective of weight 0 is only watched.

    Example:
        ```python
        >>> weighted_sum(torch.tensor([[1.0, 2.0], [1.0, torch.nan], [torch.nan, torch.nan]]), torch.tensor([1.0, 0.5]))
        tensor([2., 1., nan])

        ```
    """
    total = (rewards * weights).nansum(1)
    return total.masked_fill(~(rewards.isfinite() & (weights != 0)).any(1), math.nan)


def _std(values: Tensor) -> float:
    valid = values[values.isfinite()]
    return valid.std().item() if len(valid) > 1 else math.nan
