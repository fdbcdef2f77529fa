"""A learning rate that looks after itself: what an iteration moves the policy is measured and held near a target."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback

from ..diffusion.losses import squared_error
from ..diffusion.nouns import Latents
from ..distributed import gather_rows


class StepSizeControl(TrainerCallback):
    """Holds the [`movement`] of an iteration near `target_movement`.

    After the last update of an iteration, a forward on one row of each image says how far the prediction has moved from that
    of the policy that sampled, and the factor on the learning rate follows from it. No update is left out where the first
    overshoots: the later ones often bring the policy back.
    """

    def __init__(self, trainer, target: float):
        self.trainer, self.target = trainer, target
        self.factor = 1.0
        self._rollout: dict[str, Any] = {}
        self._before: Tensor | None = None  # what the policy that sampled predicts

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = float(state["factor"])

    def see_rollout(self, rollout: dict[str, Any]) -> None:
        """Note what the policy that sampled predicts for the rows that are watched."""
        self._rollout = rollout
        self._before = self._predictions()

    def _predictions(self) -> Tensor:
        """For one row of each sample, the same on any number of processes."""
        trainer, rollout = self.trainer, self._rollout
        sample = torch.arange(len(rollout["prompts"]))
        first = trainer.accelerator.process_index * len(sample)
        pairs = torch.stack([sample, (first + sample) % trainer.args.rows_per_image], 1)
        with trainer._rollout_weights():
            return trainer._predict_rows(trainer._rollout_model(), rollout, pairs)

    def on_step_begin(self, args, state, control, **kwargs):
        scheduled = self.trainer.lr_scheduler.get_last_lr()
        for group, rate in zip(self.trainer.optimizer.param_groups, scheduled, strict=True):
            group["lr"] = rate * self.factor

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.trainer.updates_per_iteration:
            return
        assert self._before is not None, "an update follows a rollout"
        moved = gather_rows(movement(self._predictions(), self._before)[None]).mean().item()
        metrics = self.trainer._metrics["train"]
        metrics["movement"].append(moved)
        metrics["rate_factor"].append(self.factor)  # that led to this movement
        self.factor = next_rate_factor(self.factor, moved, self.target)

    def on_train_end(self, args, state, control, **kwargs):
        self._rollout, self._before = {}, None


def movement(velocity: Latents, old_velocity: Latents) -> Float[Tensor, ""]:
    """Mean squared change of the velocity against an earlier policy: `mean (v - v_old)^2` over rows and elements."""
    return squared_error(velocity, old_velocity).mean()


def next_rate_factor(factor: float, moved: float, target: float) -> float:
    """The factor on the learning rate for the next iteration, after one that moved the policy by `moved`.

        factor <- clip(factor clip(sqrt(target / moved), 1 / 1.5, 1.5), .1, 10)

    A [`movement`] grows with the square of the rate, hence the root. An iteration that moved nothing (all advantages 0),
    or was not finite, says nothing about the rate and leaves it. So does an infinite target, with which it is only measured.

    Example:
        >>> next_rate_factor(1.0, moved=0.04, target=0.05)
        1.118...
        >>> next_rate_factor(1.0, moved=9.0, target=0.05)
        0.666...

    Source: the adaptive KL penalty of PPO, arXiv 1707.06347, section 4, turned into a rule for the rate.
    """
    if not 0 < moved < float("inf") or target == float("inf"):
        return factor
    step = min(max((target / moved) ** 0.5, 1 / 1.5), 1.5)
    return min(max(factor * step, 0.1), 10.0)
