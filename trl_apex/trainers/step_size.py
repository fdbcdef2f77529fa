"""A learning rate that looks after itself: what an iteration moves the policy is measured and held near a target."""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..diffusion.movement import movement, next_rate_factor, overshoots
from ..distributed import gather_rows


class StepSizeControl(TrainerCallback):
    """Holds the [`movement`] of an iteration near `target_movement`.

    After each update, a forward on one row of each image says how far the prediction has moved from that of the policy that
    sampled. At the end of the iteration the factor on the learning rate follows from it. A pass that
    overshoots ends the iteration there: the rest of its updates are left out. All ranks see the same mean.
    """

    def __init__(self, trainer, target: float):
        self.trainer, self.target = trainer, target
        self.factor = 1.0
        self.stopped = False
        """Whether the rest of this iteration's updates is left out."""
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

    @torch.no_grad()
    def _predictions(self) -> Tensor:
        """For one row of each sample, the same on any number of processes."""
        trainer, args, rollout = self.trainer, self.trainer.args, self._rollout
        sample = torch.arange(len(rollout["prompts"]))
        first = trainer.accelerator.process_index * len(sample)
        pairs = torch.stack([sample, (first + sample) % args.rows_per_image], 1)
        with trainer._rollout_weights():
            model = trainer._rollout_model()
            was_training = model.training
            model.eval()
            chunks = pairs.split(args.per_device_train_batch_size * args.timestep_batch_size)
            found = [trainer._predict(model, trainer._rows(rollout, chunk)) for chunk in chunks]
            model.train(was_training)
        return torch.cat(found)

    def on_step_begin(self, args, state, control, **kwargs):
        scheduled = self.trainer.lr_scheduler.get_last_lr()
        for group, rate in zip(self.trainer.optimizer.param_groups, scheduled, strict=True):
            group["lr"] = rate * self.factor

    def on_step_end(self, args, state, control, **kwargs):
        assert self._before is not None, "an update follows a rollout"
        last = state.global_step % self.trainer.updates_per_iteration == 0
        if not self.stopped:
            moved = gather_rows(movement(self._predictions(), self._before)[None]).mean().item()
            self.stopped = overshoots(moved, self.target)
            if last or self.stopped:
                metrics = self.trainer._metrics["train"]
                metrics["movement"].append(moved)
                metrics["rate_factor"].append(self.factor)  # that led to this movement
                self.factor = next_rate_factor(self.factor, moved, self.target)
        self.stopped &= not last

    def on_train_end(self, args, state, control, **kwargs):
        self._rollout, self._before = {}, None
