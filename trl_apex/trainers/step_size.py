"""A learning rate that looks after itself: what an iteration moves the policy is measured and held near a target."""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..diffusion.movement import movement, next_rate_factor, overshoots
from ..distributed import gather_rows


class StepSizeControl(TrainerCallback):
    """Holds the [`movement`] of an iteration near `target_movement`.

    After each update, one small forward on rows that are fixed for the iteration says how far the prediction has moved from that
    of the policy that sampled. At the end of the iteration the factor on the learning rate follows from it. A pass that
    overshoots ends the iteration there: the rest of its updates are left out. All ranks see the same mean.
    """

    def __init__(self, trainer, target: float):
        self.trainer, self.target = trainer, target
        self.factor = 1.0
        self.stopped = False
        """Whether the rest of this iteration's updates is left out."""
        self._before: tuple[dict[str, Any], Tensor] | None = None  # rows, and what the policy that sampled predicts

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor = float(state["factor"])

    def see_rollout(self, rollout: dict[str, Any]) -> None:
        """Choose the rows to watch, one place of each of a few samples, and note what is predicted there now."""
        args = self.trainer.args
        sample = torch.arange(min(len(rollout["prompts"]), args.per_device_train_batch_size))
        rows = self.trainer._rows(rollout, torch.stack([sample, sample % args.rows_per_image], 1))
        self._before = rows, self._predict(rows)

    @torch.no_grad()
    def _predict(self, rows: dict[str, Any]) -> Tensor:
        with self.trainer._rollout_weights():
            model = self.trainer._rollout_model()
            was_training = model.training
            model.eval()
            prediction = self.trainer._predict(model, rows)
            model.train(was_training)
        return prediction

    def on_step_begin(self, args, state, control, **kwargs):
        scheduled = self.trainer.lr_scheduler.get_last_lr()
        for group, rate in zip(self.trainer.optimizer.param_groups, scheduled, strict=True):
            group["lr"] = rate * self.factor

    def on_step_end(self, args, state, control, **kwargs):
        assert self._before is not None, "an update follows a rollout"
        last = state.global_step % self.trainer.updates_per_iteration == 0
        if not self.stopped:
            rows, before = self._before
            moved = gather_rows(movement(self._predict(rows), before)[None]).mean().item()
            self.stopped = overshoots(moved, self.target)
            if last or self.stopped:
                metrics = self.trainer._metrics["train"]
                metrics["movement"].append(moved)
                metrics["rate_factor"].append(self.factor)  # that led to this movement
                self.factor = next_rate_factor(self.factor, moved, self.target)
        self.stopped &= not last
