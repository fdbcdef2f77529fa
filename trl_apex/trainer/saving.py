"""What a run leaves on disk and takes up again: the model, whole checkpoints, and the stop that waits for one."""

import json
import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import EarlyStoppingCallback, Trainer

from ..distributed import check_equal, failing_together, gather_list, wait_for_all
from .checkpoint import (
    PARTIAL,
    STATE_FILE,
    check_engine,
    check_state,
    clear_partial,
    defects,
    last_whole,
    publish,
    restore,
    rotate,
    to_resume_from,
)
from .denoiser import save_denoiser
from .disk import SaveError, saving
from .fit import check_fit, nothing_but_tensors
from .lora import save_diffusers_lora

logger = logging.getLogger(__name__)


class SavingMixin(Trainer):
    """Trainer's entry points for saving and resuming, with checkpoints that are whole or not there."""

    resumed_from: str | None = None
    save_and_stop: str | None = None
    """Why the run stops at the end of this iteration; None while it does not."""
    _stop_error: type[RuntimeError] = RuntimeError
    _partial_dir: Path | None = None
    _needed_state: tuple[str, ...] = ()
    """Names of `_stateful` that a checkpoint must hold."""

    def request_stop(self, cause: str, error: type[RuntimeError] = RuntimeError) -> None:
        """Save a checkpoint at the end of the iteration, then stop with `cause` as the error."""
        logger.error("%s", cause)
        self.save_and_stop, self._stop_error = cause, error

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        with nothing_but_tensors(checkpoint):
            Trainer._load_optimizer_and_scheduler(self, checkpoint)
        self.resumed_from = checkpoint
        if checkpoint is not None:
            restore(self._stateful(), checkpoint)

    def _stateful(self) -> dict[str, Any]:
        """What a checkpoint keeps in `apex_state.json`: objects with `state_dict` and `load_state_dict`, by name."""
        return {"monitor": self._watch, "detectors": self._detectors}

    def _load_callback_state(self) -> None:
        """Trainer's own, and how long early stopping has waited already."""
        super()._load_callback_state()
        stored = self.state.stateful_callbacks.get("EarlyStoppingCallback", [])
        callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        for callback, state in zip(callbacks, stored if isinstance(stored, list) else [stored], strict=False):
            waited = state.get("attributes", {}).get("early_stopping_patience_counter", 0)
            callback.early_stopping_patience_counter = waited

    # The ends of a run

    def _finished(self) -> bool:
        """Whether a resumed run has nothing left to do."""
        return self.state.global_step >= self.state.max_steps or any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._finished():  # Trainer would take a step before it looks
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """Trainer's own; with `load_best_model_at_end` a new best is saved, whatever `save_steps` says."""
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        if self.args.metric_for_best_model and name not in metrics:
            logger.warning("%s could not be measured at step %d: no score is there.", name, self.state.global_step)
            return False
        best = super()._determine_best_metric(metrics, trial)
        if best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return best

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        with failing_together("loading the best model"):
            found = defects(best) if self.accelerator.is_main_process else []
            if found:
                raise ValueError(
                    f"The best checkpoint must be whole to be loaded. Found {best}: {'; '.join(found[:3])}. The trained "
                    f"weights are those of the last step; {last_whole(self.args.output_dir)} holds them too."
                )
        super()._load_best_model()
        if self._ema is not None:
            self._ema.load(best)

    def _finalize_training(self, *args: Any, **kwargs: Any):
        """Trainer's own, without its last rotation, which would leave the best checkpoint alone."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_rng_state(self, checkpoint) -> None:
        with nothing_but_tensors(checkpoint):
            super()._load_rng_state(checkpoint)

    def _resume_point(self, wanted) -> str | None:
        """The whole checkpoint behind `resume_from_checkpoint`, the same on every rank; None to start anew."""
        if wanted is None or wanted is False:
            return None
        found = None
        with failing_together("the choice of a checkpoint"):
            if self.accelerator.is_main_process:
                found = str(to_resume_from(wanted, self.args.output_dir))
                check_engine(found, self._engine, self.accelerator.num_processes)
                check_state(self._stateful(), found, self._needed_state)
                if self._engine == "ddp":
                    check_fit(found, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))
                if self._ema is not None:
                    self._ema.check(found)
                clear_partial(self.args.output_dir)
        return gather_list([found])[0]

    @property
    def _engine(self) -> str:
        """What saves and loads the state: "ddp" (one process too), "zero1" to "zero3" or "fsdp"."""
        if self.is_deepspeed_enabled:
            return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "fsdp" if self.is_fsdp_enabled else "ddp"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what a plain diffusers pipeline loads: an adapter, or all weights under `transformer/`.

        With `ema_decay`, these are the averaged weights, which `evaluate` uses too. Every rank must call it; the main
        process writes.
        """
        sharded = self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if not sharded:
            super().save_model(output_dir, _internal_call)
        else:  # Trainer would write nothing
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        wait_for_all()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir or str(self.args.output_dir)
        averaged = self._ema.save(output_dir) if self._ema is not None else None
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        to_resume_from = self._partial_dir is not None
        shown = averaged or state_dict  # what `evaluate` draws with, and so what others load
        if isinstance(model, PeftModel):
            super()._save(output_dir, state_dict if to_resume_from else shown)
            save_diffusers_lora(model, self.policy, output_dir, shown)
        elif to_resume_from:
            super()._save(output_dir, state_dict)
        else:
            whole = {**(state_dict or model.state_dict()), **(averaged or {})}
            save_denoiser(model, Path(output_dir, self.policy.denoiser_name), whole)
        if to_resume_from:
            states = {name: owner.state_dict() for name, owner in self._stateful().items()}
            Path(output_dir, STATE_FILE).write_text(json.dumps(states, indent=1))
        if self._partial_dir is None and Path(output_dir) == Path(self.args.output_dir):
            self.create_model_card()  # in place of PEFT's

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's own, but into a place that no resume looks at, renamed once it is whole."""
        for name, owner in self._stateful().items():
            check_equal(f"The state of the {name}", owner.state_dict())
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clear_partial(run)
        wait_for_all()
        self._partial_dir = run / PARTIAL
        try:
            with saving(name, run):
                Trainer._save_checkpoint(self, model, trial)
        finally:
            self._partial_dir = None
        wait_for_all()
        with failing_together(f"saving {name}"), saving(name, run):
            if self.args.should_save:
                best = run / f"checkpoint-{self.state.best_global_step}"
                if self.state.best_global_step and (best.exists() or best.name == name):
                    self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(run / PARTIAL / name / "trainer_state.json"))
                publish(
                    run / PARTIAL / name, run / name, engine=self._engine, world_size=self.accelerator.num_processes
                )
                clear_partial(run)
                rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _save_before_failing(self) -> None:
        """Save the step that the run has come to, where it is about to end with an error between two iterations."""
        step = self.state.global_step
        if self._scorer is None or step == 0 or step % self.updates_per_iteration:
            return
        saved = not defects(Path(self.args.output_dir, f"checkpoint-{step}"))
        if gather_list([saved])[0]:
            return
        try:
            self._save_checkpoint(self.model, None)
        except SaveError as error:
            logger.error("%s", error)

    def _get_output_dir(self, trial) -> str:
        return str(self._partial_dir or super()._get_output_dir(trial))
