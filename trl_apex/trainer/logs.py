"""What an iteration and its updates tell the logs; the numbers are the same on every rank."""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..distributed import all_reduce_sum, gather_list, gather_rows
from ..loss.surrogate import Surrogate
from ..report.grid import reward_grid
from ..rewards.images import to_pil
from ..rewards.scoring import ScoredBatch
from ..types import Rollout
from .pictures import send_picture

COLUMNS, ROWS = 8, 8
"""Of the pictures that are logged, at most."""


class LogsMixin(Trainer):
    """Fills `_metrics` and `_logs`, which `trl.GRPOTrainer.log` writes at the next `logging_steps`."""

    _unsent_images = False

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's own, and with `log_completions` a picture of the newest images with their rewards."""
        super().log(logs, start_time)
        if self._unsent_images:
            self._unsent_images = False
            members, columns = self.num_generations, min(self.num_generations, COLUMNS)
            shown = [i for i in range(len(self._logs["images"])) if i % members < columns][: columns * ROWS]
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

    def _log_update(self, surrogate: Surrogate, kl: Tensor | None) -> bool:
        """Log one micro-batch; returns whether the ratios of all ranks are numbers."""
        metrics = self._metrics["train"]
        values = {
            "clip_ratio/low_mean": surrogate.low.float().mean(),
            "clip_ratio/high_mean": surrogate.high.float().mean(),
            "clip_ratio/region_mean": (surrogate.low | surrogate.high).float().mean(),
            "ratio/mean": surrogate.ratio.mean(),
            "ratio/max_deviation": (surrogate.ratio - 1).abs().max(),
        }
        if kl is not None:
            values["kl"] = kl.detach()
        ranks = gather_rows(torch.stack(list(values.values()))[None])
        for name, column in zip(values, ranks.T, strict=True):
            metrics[name].append((column.max() if name == "ratio/max_deviation" else column.mean()).item())
        return math.isfinite(metrics["ratio/mean"][-1])

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
            if failures > self.args.max_reward_failure_rate * samples:
                self.request_stop(
                    f"reward {name!r} failed for {failures} of {samples} images, more than max_reward_failure_rate="
                    f"{self.args.max_reward_failure_rate}. The warnings above tell why; raise the limit to go on without it."
                )

    def _log_rewards(self, rewards: Tensor, advantages: Tensor, inputs: list, rollouts: list[Rollout]) -> None:
        metrics = self._metrics["train"]
        for name, column in zip(self.reward_func_names, rewards.double().T, strict=True):
            valid = column[column.isfinite()]
            metrics[f"rewards/{name}/mean"].append(valid.mean().item() if len(valid) else float("nan"))
            metrics[f"rewards/{name}/std"].append(valid.std().item() if len(valid) > 1 else float("nan"))
        total = (rewards.double() * self.reward_weights.to(rewards.device)).nansum(1)
        groups = total.reshape(-1, self.num_generations)
        metrics["reward"].append(total.mean().item())
        metrics["reward_std"].append(groups.std(1).mean().item())
        metrics["frac_reward_zero_std"].append((groups.std(1) < 1e-8).double().mean().item())
        if self.log_completions:
            images = to_pil(torch.cat([r.images for r in rollouts]))
            prompts = gather_list([row["prompt"] for row in inputs])
            self._logs["prompt"].extend(prompts)
            self._logs["completion"].extend(["<image>"] * len(prompts))
            self._logs["images"].extend([[image] for image in gather_list(images)])
            for name, column in zip(self.reward_func_names, rewards.T.tolist(), strict=True):
                self._logs["rewards"][name].extend(column)
            self._logs["advantages"].extend(advantages.tolist())
            self._unsent_images = True
        # A reward may log on some ranks only, so all names travel in one exchange.
        pending = (dict(self._pending_metrics), dict(self._pending_extra_logs))
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()
        everyone = gather_list([pending])
        for name in sorted({name for logged, _ in everyone for name in logged}):
            values = [value for logged, _ in everyone for value in logged.get(name, [])]
            metrics[name].append(sum(values) / len(values))
        for column in sorted({column for _, extra in everyone for column in extra}):
            self._logs["extra"][column].extend(value for _, extra in everyone for value in extra.get(column, []))
