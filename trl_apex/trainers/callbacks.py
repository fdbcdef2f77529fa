"""Callbacks of a run: iteration boundaries, gradient checks, progress, and the watch for reward hacking."""

import hashlib
import json
import logging
import math
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.nn.utils import get_total_norm
from transformers import EarlyStoppingCallback, TrainerCallback

from ..distributed import any_rank, local_shard
from ..evaluation import hacking_signs

logger = logging.getLogger(__name__)


class IterationCallback(TrainerCallback):
    """Moves saves, stops and evaluations that pick a best model to the end of the iteration: no rollout is saved."""

    def __init__(self, trainer):
        self.trainer = trainer
        self._postponed: set[str] = set()

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._step = state.global_step * args.gradient_accumulation_steps
        self._postponed = set()
        waited = state.stateful_callbacks.get("EarlyStoppingCallback", [])
        waited = waited if isinstance(waited, list) else [waited]
        for callback, saved in zip(_early_stopping(self.trainer), waited, strict=False):
            callback.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]

    def on_step_end(self, args, state, control, **kwargs):
        boundary = state.global_step % self.trainer.updates_per_iteration == 0 or state.global_step >= state.max_steps
        if boundary and self.trainer._agree_to_stop():
            control.should_save = control.should_training_stop = True
        events = ["should_save", "should_training_stop", *(["should_evaluate"] if args.metric_for_best_model else [])]
        self._postponed |= {event for event in events if getattr(control, event)}
        for event in events:
            setattr(control, event, boundary and event in self._postponed)
        if boundary:
            self._postponed = set()


def _early_stopping(trainer: Any) -> list[EarlyStoppingCallback]:
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]


def is_finished(trainer: Any) -> bool:
    """Whether a resumed run has nothing left to do."""
    return trainer.state.global_step >= trainer.state.max_steps or any(
        callback.early_stopping_patience_counter >= callback.early_stopping_patience
        for callback in _early_stopping(trainer)
    )


class GradientGuardCallback(TrainerCallback):
    """Skips updates whose advantages are all 0 or whose gradients are not finite."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.update_is_dead = True  # until a micro-batch of it has an advantage
        self._nonfinite_in_a_row = 0
        self._warned_of_epsilon = False
        self._ratios: list[tuple[torch.Tensor, ...]] = []  # of each micro-batch of the update, with samples and steps

    def remember(self, ratio: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Keep the ratios of a micro-batch, to name its samples should the update fail."""
        self._ratios.append((ratio.detach(), inputs["samples"], inputs["steps"]))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Skip an update that is dead (no advantage, no KL) or not finite, on all ranks alike."""
        trainer, device = self.trainer, self.trainer.accelerator.device
        dead, self.update_is_dead = self.update_is_dead, True
        ratios, self._ratios = self._ratios, []
        if trainer.is_deepspeed_enabled:  # has stepped already, unless a gradient was not finite
            finite = dead or trainer.model_wrapped.was_step_applied()
        else:
            gradients = [local_shard(p.grad) for p in model.parameters() if p.grad is not None]
            norm = get_total_norm(gradients).item()  # the one time that an update waits for the device
            finite = math.isfinite(norm)
            dead = args.skip_dead_updates and args.beta == 0 and not any_rank(not dead, device)
        if any_rank(not finite, device):
            if not trainer.is_deepspeed_enabled:
                model.zero_grad(set_to_none=True)
            self._report_nonfinite(ratios, state.global_step + 1)
            return
        self._nonfinite_in_a_row = 0
        self._count(dead=dead)
        if not trainer.is_deepspeed_enabled:
            if dead:
                model.zero_grad(set_to_none=True)
            else:
                self._compare_with_epsilon(norm, sum(g.numel() for g in gradients), args.adam_epsilon)

    def _report_nonfinite(self, ratios: list[tuple[torch.Tensor, ...]], update: int) -> None:
        """Name the rows of a skipped update whose ratio is not a number; stop the run after too many in a row."""
        trainer, culprits = self.trainer, []
        prompts = trainer._iteration_rollout["prompts"]
        first = trainer.accelerator.process_index * len(prompts)
        for ratio, samples, steps in ratios:
            wrong = ~ratio.isfinite().cpu()
            for sample, step in zip(samples.cpu()[wrong].tolist(), steps.cpu()[wrong].tolist(), strict=True):
                culprits.append(f"image {sample} ({prompts[sample - first]!r:.60}) at denoising step {step}")
        read = scale_reader(trainer)
        scale = 1.0 if read is None else float(read())
        if scale > 1 and not any_rank(bool(culprits), trainer.accelerator.device):
            self._count(overflow=True)
            logger.info("Update %d overflowed at loss scale %g, which is lowered.", update, scale)
            return
        self._nonfinite_in_a_row += 1
        self._count(nonfinite=True)
        count = self._nonfinite_in_a_row
        where = "; ".join(culprits[:3]) or "all ratios here are finite, so the backward pass overflowed"
        where += f" and {len(culprits) - 3} more" if len(culprits) > 3 else ""
        logger.warning("Update %d has non-finite gradients and is skipped (%d in a row): %s.", update, count, where)
        if count >= trainer.args.max_nonfinite_updates:
            trainer.request_stop(
                f"{count} updates in a row had non-finite gradients, the last of them update {update} ({where}). Lower "
                "`learning_rate`, use bf16 instead of fp16, or look for a reward that returns huge values."
            )

    def _count(self, *, dead: bool = False, nonfinite: bool = False, overflow: bool = False) -> None:
        """Log one update: a log line gives the number skipped since the last one, and their share."""
        metrics = self.trainer._metrics["train"]
        for name, skipped in (("dead", dead), ("nonfinite", nonfinite)):
            metrics[f"skipped_updates/{name}"].append(float(skipped))
            metrics[f"skipped_updates/{name}_rate"].append(float(skipped))
        if scale_reader(self.trainer) is not None:
            metrics["skipped_updates/overflow_rate"].append(float(overflow))

    def _compare_with_epsilon(self, norm: float, count: int, epsilon: float) -> None:
        """Log the root mean square of the gradient's `count` numbers; warn where AdamW's epsilon is not far below it."""
        if not count:
            return
        rms = norm / count**0.5
        self.trainer._metrics["train"]["grad_rms"].append(rms)
        if 0 < rms < 10 * epsilon and not self._warned_of_epsilon:
            self._warned_of_epsilon = True
            warnings.warn(
                f"`adam_epsilon` must be far below the gradients or it swallows them. Found adam_epsilon={epsilon:g} and "
                f"gradients of root mean square {rms:.2g}. Set adam_epsilon={rms / 1e4:.0e} or less.",
                stacklevel=2,
            )


def scale_reader(trainer: Any) -> Callable[[], float] | None:
    """What reads the scale of float16's loss, which starts too high and is lowered; None without one, or with a fixed one."""
    if trainer.is_deepspeed_enabled:
        engine = trainer.model_wrapped
        falling = engine.fp16_enabled() and engine.dynamic_loss_scale()
        return (lambda: engine.optimizer.loss_scale) if falling else None
    scaler = trainer.accelerator.scaler
    return None if scaler is None else scaler.get_scale


class InterruptCallback(TrainerCallback):
    """Stops the trainer at the end of the iteration after SIGINT or SIGTERM; a second signal stops at once.

    Set `trainer` before training starts.
    """

    def __init__(self) -> None:
        self.trainer: Any = None
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals for the length of a `with` block."""
        before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _catch(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print(
            "\nStopping at the end of this iteration, with a checkpoint. Press Ctrl-C again to stop at once.",
            file=sys.stderr,
        )

    def on_step_end(self, args, state, control, **kwargs):
        """Agree with the other processes between two updates, then tell the trainer."""
        self.requested = any_rank(self.requested, self.trainer.accelerator.device)
        if self.requested and self.trainer.save_and_stop is None:
            self.trainer.request_stop("interrupted.")


class ProgressCallback(TrainerCallback):
    """Shows a progress bar with the latest rewards and priorities; without a terminal, a line at each log."""

    def __init__(self, names: list[str], console: Console | None = None):
        self.names, self.console = names, console or Console()
        self._bar: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.console.is_terminal:
            times = TextColumn("updates, elapsed"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
            rewards = TextColumn("{task.description}", markup=False)
            self._bar = Progress(BarColumn(24), MofNCompleteColumn(), *times, rewards, console=self.console)
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)
            self._bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        parts = []
        for name in self.names:
            reward, priority = logs.get(f"rewards/{name}/mean"), logs.get(f"priority/{name}")
            if reward is not None:
                parts.append(f"{name} {reward:.3g}" + (f" ({priority:.0%})" if priority is not None else ""))
        if parts and self._bar is not None:
            self._bar.update(self._task, description="  ".join(parts))
        elif parts and not self.console.is_terminal:
            self.console.print(f"update {state.global_step}/{state.max_steps}:", *parts, sep="  ", soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class RewardHackingWatch:
    """Warns once when a monitored reward fell since the first evaluation while the trained ones rose."""

    def __init__(self, trained: int):
        self._trained = trained
        self._first: dict[str, dict[str, Any]] = {}
        self._warned = False

    def see(self, dataset: str, names: list[str], records: list[dict[str, Any]], step: int) -> None:
        """Compare an evaluation (one record a row, with `prompt` and `rewards`) with the first one of its dataset."""
        prompts = json.dumps([[record["prompt"] for record in records], names])
        key = hashlib.sha256(prompts.encode()).hexdigest()[:16]
        rows = [[record["rewards"][name] for name in names] for record in records]
        rewards = [[value if math.isfinite(value) else None for value in row] for row in rows]
        first = self._first.get(dataset)
        if first is None or first["key"] != key:
            self._first[dataset] = {"key": key, "rewards": rewards}
            return
        if self._warned or len(names) == self._trained:
            return
        signs = hacking_signs(names, _tensor(first["rewards"]), _tensor(rewards), self._trained)
        if signs:
            self._warned = True
            logger.warning(
                f"Possible reward hacking at step {step}: since the first evaluation, the trained rewards "
                f"({', '.join(names[: self._trained])}) rose by more than 2 standard errors on average, while "
                f"{' and '.join(signs)}. Look at the images. `beta` > 0, a lower learning rate or an earlier checkpoint help."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"first": self._first, "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for entry in state["first"].values():  # raises where it is of another form
            _tensor(entry["rewards"]), entry["key"]
        if not isinstance(state["warned"], bool):
            raise TypeError(f"`warned` must be true or false. Found {state['warned']!r}.")
        self._first, self._warned = state["first"], state["warned"]


def _tensor(rows: list[list[float | None]]) -> torch.Tensor:
    return torch.tensor([[math.nan if value is None else value for value in row] for row in rows], dtype=torch.float64)
