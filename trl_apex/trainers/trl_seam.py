"""`trl.GRPOTrainer` without its language side: all that touches private names of TRL and of Trainer's loop.

The constructor of `trl.GRPOTrainer` is about tokenizers, generation configurations and vLLM, and never runs. What the
inherited methods read from it is set here, and `tests/trainers/test_trl_seam.py` reads the syntax trees of these methods
and names what a TRL release has added.
"""

import logging
import re
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from trl import GRPOTrainer
from trl.models import prepare_deepspeed

from .. import distributed
from ..report import write_figures
from . import checkpoint, publishing
from .callbacks import is_finished
from .logs import record_run
from .manifest import checkpoints, defects, last_valid
from .weights import frozen_copy

logger = logging.getLogger(__name__)

# Methods of trl.GRPOTrainer that this package calls or leaves in place.
INHERITED = ("training_step", "compute_loss", "prediction_step", "log")


class RunTrainer(GRPOTrainer):
    """How a run starts, stops, is saved and published, and what an engine does to its weights.

    [`DiffusionGRPOTrainer`] has the constructor and says what an iteration is.
    """

    resumed_from: str | None = None
    command: str | None = None
    """What started the run, for `environment.json`; None for the command of this process."""
    save_and_stop: str | None = None
    """Why the run stops at the end of this iteration; None while it does not."""
    _stop_error: type[RuntimeError] = RuntimeError

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """Train to the end, from the start or from a valid checkpoint; then evaluate, if no `eval_strategy` has.

        Writes `config.json` and `environment.json` at the start and `trainer_state.json` at the end, for
        `trl-apex evaluate` and `trl-apex report`.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint, or True for the run's last valid one; by
                default that of the configuration. False starts anew.

        Raises:
            ValueError: if the checkpoint is not valid or of other settings, before anything is loaded.
            RuntimeError: if the run was stopped by [`request_stop`], with a checkpoint saved.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        from_text = {"true": True, "false": False}  # of YAML and the command line
        resume_from_checkpoint = from_text.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)
        self.resumed_from = resume_from_checkpoint = checkpoint.resume_point(self, resume_from_checkpoint)
        if self.args.should_save:
            if resume_from_checkpoint is None and (there := checkpoints(self.args.output_dir)):
                logger.warning(
                    f"{self.args.output_dir} holds checkpoints of an earlier run, up to {there[0].name}. This run starts "
                    "anew and mixes with them: `resume_from_checkpoint=True` takes the one of the highest step. Delete "
                    "them, or pass another `output_dir`."
                )
            record_run(self)
        self._scorer = self._open_scorer(self.reward_funcs, self.reward_func_names)
        self.save_and_stop = None
        try:
            with distributed.whole_models():  # a reward may load its network at its first call
                result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            self._agree_to_stop()
        except RuntimeError as error:
            if isinstance(error, distributed.OtherRankError) or not distributed.lost_rank(error):
                raise
            valid = last_valid(self.args.output_dir)
            raise distributed.OtherRankError(
                f"All {self.accelerator.num_processes} processes must live until the end. Found that another one is gone "
                f"(at step {self.state.global_step}, on rank {self.accelerator.process_index}: {str(error)[:200]}). Look "
                "for the first error of the other ranks, then "
                + (f"resume from {valid}, the last valid checkpoint." if valid else "start anew: none was saved yet.")
            ) from error
        finally:
            self._scorer.close()
            self._scorer = None
            self._iteration_rollout = None
        if self.save_and_stop:
            raise self._stop_error(
                f"Training was stopped at step {self.state.global_step}, with a checkpoint saved: {self.save_and_stop}"
            )
        if self.eval_dataset is not None and self.args.eval_strategy == "no":
            self.evaluate()
        self.save_state()
        return result

    def request_stop(self, cause: str, error: type[RuntimeError] = RuntimeError) -> None:
        """Save a checkpoint at the end of the iteration, then stop with `cause` as the error; one process may ask for all."""
        logger.error("%s", cause)
        self.save_and_stop, self._stop_error = cause, error

    def _agree_to_stop(self) -> bool:
        """Whether a process has asked to stop; all ask from then on, and every rank must call it."""
        asked = distributed.any_rank(self.save_and_stop is not None, self.accelerator.device)
        if asked and self.save_and_stop is None:
            self.request_stop("another process asked for it, and says why.", distributed.OtherRankError)
        return asked

    def predict(self, test_dataset=None, ignore_keys=None, metric_key_prefix="test"):
        """Not for this trainer: [`evaluate`] makes the images and scores them."""
        raise NotImplementedError(
            "An image model has no labels to predict. Call `evaluate(dataset)`: it returns the mean rewards, and "
            "`eval_records` holds each prompt's rewards and the first images."
        )

    # Saved, resumed, published

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what a plain diffusers pipeline loads: an adapter, or all weights under `transformer/`.

        With `ema_decay`, these are the averaged weights, which `evaluate` uses too. Every rank must call it; the main
        process writes.
        """
        directory = output_dir or str(self.args.output_dir)
        checkpoint.save(self, directory, for_resume=False)
        if self.args.should_save and Path(directory) == Path(self.args.output_dir):
            self.state.save_to_json(str(Path(directory, "trainer_state.json")))
            publishing.write_run_report(directory)
            self.create_model_card()  # in place of PEFT's
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        distributed.wait_for_all()

    def _save_checkpoint(self, model, trial) -> None:
        checkpoint.save_checkpoint(self)

    def _load_optimizer_and_scheduler(self, checkpoint_dir) -> None:
        if checkpoint_dir is not None:  # transformers 4 calls it at every start
            checkpoint.load(self, checkpoint_dir)

    def _load_rng_state(self, checkpoint_dir) -> None:
        with checkpoint.refusing_other_states(checkpoint_dir, "rng_state.pth"):
            super()._load_rng_state(checkpoint_dir)

    def _load_best_model(self) -> None:
        """Trainer's own at the end of training, with `load_best_model_at_end`; from a valid checkpoint only."""
        best = str(self.state.best_model_checkpoint)
        with distributed.failing_together("loading the best model"):
            found = defects(best) if self.accelerator.is_main_process else []
            if found:
                raise ValueError(
                    f"The best checkpoint must be valid to be loaded. Found {best}: {'; '.join(found[:3])}. The trained "
                    f"weights are those of the last step; {last_valid(self.args.output_dir)} holds them too."
                )
        super()._load_best_model()
        for copy in self._copies:
            copy.load(best)

    @property
    def _best_metric(self) -> str:
        return f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"

    def _determine_best_metric(self, metrics, trial) -> bool:
        """Trainer's own; with `load_best_model_at_end` a new best is saved, whatever `save_steps` says."""
        if self.args.metric_for_best_model and self._best_metric not in metrics:
            logger.warning("%s could not be measured at step %d.", self._best_metric, self.state.global_step)
            return False
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best and self.args.load_best_model_at_end
        return best

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository, or find it, before any compute; PushError if the token, name or connection will not do."""
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        private = self.args.hub_private_repo if private is None else private
        api = HfApi(token=token or self._hub_token)
        repo = publishing.trying(lambda: api.create_repo(name, private=private, exist_ok=True), name, api.endpoint)
        self.hub_model_id, self.push_in_progress = repo.repo_id, None

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None,
        *, hub_model_id=None, **kwargs,
    ):  # fmt: skip
        """Save the model and upload it with its card; returns the repository's address, or a future of it.

        Every rank must call it; the main process uploads. The repository is `hub_model_id`, here or in the
        configuration; by default it is named after `output_dir`.

        Raises:
            ValueError: if the commit message is the name of a repository.
            PushError: if the upload fails. The model is saved by then, and `trl-apex push` tries again.
        """
        if commit_message and re.fullmatch(r"[\w.-]+/[\w.-]+", commit_message):
            raise ValueError(
                "The first argument of `push_to_hub` is the commit message. Found what looks like a repository, "
                f'{commit_message!r}. Pass hub_model_id="{commit_message}", here or in the configuration.'
            )
        if hub_model_id is not None:
            self.args.hub_model_id, self.hub_model_id = hub_model_id, None
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        try:
            write_figures(self.args.output_dir)
        except ImportError as error:
            logger.warning("The model card has no pictures: %s", error)
        kwargs.pop("model_name", None)
        self.create_model_card(**kwargs)
        self._finish_current_push()
        options: dict[str, Any] = {"token": token or self._hub_token, "revision": revision or self.args.hub_revision}
        options |= {"create": False, "commit_message": commit_message or "End of training"}
        push = partial(publishing.push_run, self.args.output_dir, self.hub_model_id, **options)
        return push() if blocking else HfApi().run_as_future(push)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, **kwargs) -> None:
        """Write the model card of the run as it stands, with further `tags`, the hub id of the prompts, and a `license`.

        It has the name of the repository, else `model_name`. Trainer's other keywords are accepted and have no meaning here.
        """
        if self.is_world_process_zero():
            further = [tags] if isinstance(tags, str) else list(tags or [])
            facts = publishing.card_facts(self, dataset_name, further, kwargs.get("license"))
            name = getattr(self, "hub_model_id", None) or model_name
            publishing.write_model_card(self.args.output_dir, facts, name)

    # Engines: where the weights are

    @property
    def _engine(self) -> str:
        """What saves and loads the state: "ddp" (one process too), "zero1" to "zero3" or "fsdp"."""
        if self.is_deepspeed_enabled:
            return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "fsdp" if self.is_fsdp_enabled else "ddp"

    def _skip_overflows(self) -> None:
        """Let DeepSpeed leave out an update whose bfloat16 gradient is not finite, which not every release does by itself."""
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            config.get("bf16", {}).setdefault("check_grad_overflow", True)

    def _rollout_model(self) -> nn.Module:
        """The model to sample with: through an engine's wrapper where it shards weights, else without DDP's."""
        if self.model_wrapped is self.model and all(model is not self.model for model in self.accelerator._models):
            self._prepare_untrained()
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return self.model_wrapped
        return self.model

    def _prepare_untrained(self) -> None:
        """Before training: place the model and give it training's mixed precision, so that it makes the same images.

        Engines shard weights only when they train: until then every rank holds them whole, DeepSpeed's in the type that
        its engine will cast them to.
        """
        if self.is_deepspeed_enabled:
            dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
            self.model.to(self.accelerator.device, dtypes.get(self.accelerator.mixed_precision))
        else:
            self.accelerator.prepare_model(self.model.to(self.accelerator.device), evaluation_mode=True)
            self.model.__dict__.pop("_is_accelerate_prepared", None)  # by this mark, training would not wrap it in DDP

    def _rollout_weights(self):
        """Whole weights on every rank for the length of a rollout or an evaluation, if an engine shards them and memory allows."""
        return distributed.gathered_for_rollout(self.model_wrapped) if self.args.gather_for_rollout else nullcontext()

    def _failing_together_unless_sharded(self, what: str):
        """Sharded layers are gathered in each forward; a rank that fails there leaves the others in that collective."""
        if not self.args.gather_for_rollout and any(map(distributed.is_sharded, self.model.parameters())):
            return nullcontext()
        return distributed.failing_together(what)

    def _keep_inputs(self) -> None:
        """Let FSDP2 leave the inputs of modules as they are: it would cast timesteps and positions to half precision.

        The policy casts latents and embeddings itself, as pipelines do.
        """
        policy = self.accelerator.state.fsdp_plugin.mixed_precision_policy if self.accelerator.is_fsdp2 else None
        if policy is not None:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = replace(policy, cast_forward_inputs=False)
            self.policy.compute_dtype = policy.param_dtype

    def _prepare_reference(self, starts_from_adapter: bool) -> None:
        """Place the frozen copy that `beta` needs. A fresh adapter is switched off instead, and needs none."""
        sharding = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if starts_from_adapter and self.beta > 0:
            self._reference = frozen_copy(self.model, share_frozen=not sharding)
        self._offload_reference = self.args.offload_reference and (sharding or not starts_from_adapter)
        if self._reference is None:
            return
        if self.is_deepspeed_enabled:
            self._reference = prepare_deepspeed(self._reference, self.accelerator)
        else:
            self._reference = self.accelerator.prepare_model(
                self._reference, device_placement=not self._offload_reference, evaluation_mode=True
            )

    @contextmanager
    def _reference_on_device(self) -> Iterator[nn.Module]:
        """The frozen copy, moved to the device for the length of its forwards where it is offloaded."""
        if self._offload_reference:
            self._reference.to(self.accelerator.device)
        yield self._reference
        if self._offload_reference:
            self._reference.to("cpu")

    # What Trainer and TRL do otherwise

    def _send_telemetry(self) -> None:
        """TRL's telemetry reads fields that diffusers models do not have."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if is_finished(self):  # Trainer would take a step before it looks
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False) -> dict[str, float]:
        """Trainer's own; a scheduler that follows a metric waits where an evaluation could not measure it."""
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
        follows = type(self.lr_scheduler).__name__ in ("ReduceLROnPlateau", "GreedyLR") and not skip_scheduler
        if follows and self._best_metric in metrics:
            self.lr_scheduler.step(metrics[self._best_metric])
        return metrics

    def _finalize_training(self, *args: Any, **kwargs: Any):
        """Trainer's own, without its last rotation, which would leave the best checkpoint alone."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        if self._agree_to_stop():  # perhaps after the last iteration's end
            checkpoint.save_before_failing(self)
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _set_inherited_attributes(self, reward_funcs, names):
        """Set what inherited methods of `trl.GRPOTrainer` read, after `transformers.Trainer.__init__` has run."""
        args = self.args
        self.reward_funcs, self.reward_func_names = reward_funcs, names
        self.reward_processing_classes = [None] * len(reward_funcs)
        self.num_generations, self.num_iterations = args.num_generations, args.num_iterations
        self.num_generations_eval = args.num_generations_eval or args.num_generations
        self.shuffle_dataset, self.beta = args.shuffle_dataset, args.beta
        self.epsilon_low = args.epsilon
        self.epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        self.use_adaptive_entropy, self.entropy_coef, self._last_world_entropy = False, 0.0, None
        self.environments, self.chat_template_kwargs, self.async_loop = None, {}, None
        self.log_completions, self.log_unique_prompts = args.log_completions, args.log_unique_prompts
        self.num_completions_to_print = args.num_completions_to_print
        if args.log_completions and self.accelerator.is_main_process:
            Path(args.output_dir, "completions").mkdir(parents=True, exist_ok=True)  # where `log` writes its tables
        self._step, self._current_train_step_time, self._buffered_inputs = 0, 0.0, None
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        size = args.generation_batch_size
        self._logs = {name: deque(maxlen=size) for name in ("images", "prompt", "completion", "advantages")}
        self._logs |= {name: defaultdict(lambda: deque(maxlen=size)) for name in ("rewards", "extra")}
