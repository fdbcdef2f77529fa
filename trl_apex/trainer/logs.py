"""What an iteration and its updates tell the logs; the numbers are the same on every rank."""

import logging
import math
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..distributed import all_reduce_sum, gather_list, gather_rows
from ..loss.surrogate import Surrogate
from ..report.figures import reward_grid
from ..rewards.images import to_pil
from ..rewards.scoring import RewardFailureRateError, ScoredBatch
from ..types import Rollout
from .pictures import send_picture

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
