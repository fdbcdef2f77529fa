"""GRPO for text-to-image models: rollout, rewards, advantages, updates."""

import copy
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import ProgressCallback as TqdmCallback
from trl import GRPOTrainer
from trl.models import prepare_deepspeed

from ..aggregation.normalize import group_rows
from ..aggregation.options import checked_weights
from ..aggregation.rules import normalize_then_sum, sum_then_normalize, wide_enough
from ..diffusion.families import load_policy
from ..diffusion.losses import (
    Surrogate,
    add_noise,
    awm_log_likelihood,
    clipped_surrogate,
    fpo_log_likelihood,
    gaussian_kl,
    nft_loss,
    training_sigmas,
)
from ..diffusion.nouns import Embeddings, Rollout
from ..diffusion.rollout import (
    INITIAL_NOISE,
    ROW_LEVEL,
    ROW_NOISE,
    ROW_ORDER,
    STEP_NOISE,
    guided_prediction,
    keyed_generator,
    keyed_noise,
    sample,
)
from ..diffusion.schedule import Sampler, sde_window
from ..diffusion.transition import Transition
from ..distributed import (
    OtherRankError,
    failing_together,
    gather_list,
    gather_rows,
    gathered_for_rollout,
    is_sharded,
    local_slice,
    lost_rank,
    whole_models,
)
from ..prompts.embeddings import open_embeddings, prepare_embeddings
from ..prompts.sampler import GroupSampler, update_rows, updates_per_pass
from ..report.figures import reward_grid
from ..rewards.base import Reward, to_pil
from ..rewards.registry import load_rewards
from ..rewards.scoring import RewardFailureRateError, RewardScorer
from . import checkpoint, evaluation, publishing
from .callbacks import GradientGuardCallback, IterationCallback, ProgressCallback, RewardHackingWatch, is_finished
from .checkpoint import check_writable, last_whole, nothing_but_tensors, resume_point, save_before_failing
from .config import DiffusionGRPOConfig
from .detectors import LearningDetectors, disable_dropout
from .inputs import (
    as_list,
    check_arguments,
    check_best_metric,
    check_datasets,
    check_whole,
    loading_arguments,
    reward_columns,
    reward_names,
    upgraded,
)
from .logs import (
    COLUMNS,
    PATIENCE,
    ROWS,
    log_from_rewards,
    log_rewards,
    log_samples,
    log_scoring,
    newest_samples,
    read_updates,
    send_picture,
    shown_pictures,
    sum_counts,
    update_metrics,
)
from .publishing import without_token
from .trl_seam import set_inherited_attributes
from .weights import (
    ADAPTER_RATE,
    FULL_RATE,
    EMACallback,
    add_adapter,
    answer_as_transformers,
    compile_blocks,
    frozen_copy,
    take_adapter,
    warn_of_all_weights,
)

logger = logging.getLogger(__name__)


class DiffusionGRPOTrainer(GRPOTrainer):
    """Trains the denoiser of a text-to-image pipeline with GRPO.

    One iteration: sample a group of images for each of a few prompts, score them, turn scores into advantages, and make
    denoising steps that led to better images more likely. Constructor, reward functions, logs, checkpoints and
    distributed training are those of `trl.GRPOTrainer`.

    Args:
        model (`str` or `diffusers.DiffusionPipeline`): hub id, folder or loaded pipeline.
        reward_funcs (callable or `list`): called with keywords `prompts`, `completions` (PIL images), `images` (float
            tensor `[B, 3, H, W]` in [0, 1], where the signature takes it), every dataset column, `trainer_state`,
            `log_metric` and `log_extra`; return one number, or None, per image. May be async. A string names a built-in
            reward, as in `["ocr", "pickscore", my_function]`.
        args ([`DiffusionGRPOConfig`] or `trl.GRPOConfig`, *optional*): a plain GRPOConfig is upgraded field by field.
        train_dataset (`datasets.Dataset`): with a `prompt` column.
        eval_dataset (`datasets.Dataset` or dict of them, *optional*): likewise.
        processing_class, reward_processing_classes: accepted for compatibility; a pipeline brings its own.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: must be None.
        peft_config (`peft.LoraConfig`, *optional*): train an adapter instead of all weights.
        monitor_funcs (callable or `list`, *optional*): reward functions that evaluation reports and training never sees.
        adapter (`str` or `Path`, *optional*): run folder or hub id of an adapter to go on from. An adapter that is on
            the pipeline already is gone on from likewise. `beta` measures the KL divergence to that start.

    Raises:
        ValueError: for anything of the above that cannot work, before any compute.

    Example:
        ```python
        from trl_apex import DiffusionGRPOConfig, DiffusionGRPOTrainer

        trainer = DiffusionGRPOTrainer(
            model="stabilityai/stable-diffusion-3.5-medium",
            reward_funcs=[ocr, brightness],
            args=DiffusionGRPOConfig(output_dir="run", num_generations=8, generation_batch_size=64),
            train_dataset=dataset,
            peft_config=LoraConfig(r=32, lora_alpha=64),
        )
        trainer.train()
        ```
    """

    _tag_names = ["trl", "grpo", "diffusers", "text-to-image"]
    _name = "GRPO"
    config_class: type[DiffusionGRPOConfig] = DiffusionGRPOConfig
    args: DiffusionGRPOConfig
    model: nn.Module
    num_generations: int
    resumed_from: str | None = None
    save_and_stop: str | None = None
    """Why the run stops at the end of this iteration; None while it does not."""
    _stop_error: type[RuntimeError] = RuntimeError
    _logs: dict[str, Any]

    # Methods that have a chapter of their own.
    evaluate = evaluation.evaluate
    predict = evaluation.predict
    save_model = checkpoint.save_model
    _save_checkpoint = checkpoint.save_checkpoint
    _load_optimizer_and_scheduler = checkpoint.load
    _load_best_model = checkpoint.load_best_model
    _determine_best_metric = checkpoint.determine_best_metric
    init_hf_repo = publishing.init_hf_repo
    push_to_hub = publishing.push_to_hub
    create_model_card = publishing.create_model_card

    def __init__(
        self,
        model,
        reward_funcs=None,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        *,
        monitor_funcs=None,
        adapter=None,
    ):
        if args is None:
            args = self.config_class(output_dir=f"{type(self).__name__}-output")
        args, self._hub_token = without_token(upgraded(args, self.config_class))
        reward_funcs = load_rewards(as_list(reward_funcs))
        self.monitor_funcs = load_rewards(as_list(monitor_funcs))
        check_arguments(reward_funcs, callbacks, quantization_config)
        every_name = reward_names([*reward_funcs, *self.monitor_funcs], warn=True)
        names = every_name[: len(reward_funcs)]
        weights = checked_weights(names, args.reward_weights, args.multi_objective_aggregation)
        check_best_metric(args, every_name, eval_dataset, callbacks)
        if args.should_save:
            check_writable(args.output_dir)
        check_datasets(train_dataset, eval_dataset, reward_funcs, self.monitor_funcs, every_name)
        train_dataset = train_dataset.select(range(len(train_dataset)))  # our own view: Trainer may format it

        with whole_models():
            self.policy = load_policy(model, **loading_arguments(model, args))
        check_whole(self.policy.pipeline)
        self._plan_rollout(args)
        self._plan_updates(args, len(train_dataset))
        self._reference: Any = None  # the frozen copy that full fine-tuning measures its KL to
        denoiser = self._prepare_denoiser(args, peft_config, adapter)
        if args.learning_rate is None:
            args = copy.copy(args)
            args.learning_rate = ADAPTER_RATE if isinstance(denoiser, PeftModel) else FULL_RATE
        self.policy.move_frozen(args.device)
        self._conditions = open_embeddings(self.policy, args)
        # Before the denoiser moves to the device: it and the text encoders need not fit there together.
        own_pipeline = isinstance(model, str)
        prepare_embeddings(self._conditions, self.policy, args, [train_dataset, eval_dataset], own_pipeline)

        super(GRPOTrainer, self).__init__(
            model=denoiser,
            args=args,
            data_collator=as_list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        set_inherited_attributes(self, args, reward_funcs, names)
        self.reward_weights = weights
        sharding = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self._starts_from_adapter and args.beta > 0:
            self._reference = frozen_copy(self.model, share_frozen=not sharding)
        self._offload_reference = args.offload_reference and not (self._starts_from_adapter and not sharding)
        if self._reference is not None:
            if self.is_deepspeed_enabled:
                self._reference = prepare_deepspeed(self._reference, self.accelerator)
            else:
                self._reference = self.accelerator.prepare_model(
                    self._reference, device_placement=not self._offload_reference, evaluation_mode=True
                )
        self._scorer: Any = None  # a RewardScorer while training
        self._iteration_rollout: dict[str, Any] | None = None
        self._watch = RewardHackingWatch(len(reward_funcs))
        self.eval_records: list[dict[str, Any]] = []
        self._scored_objectives: set[str] = set()
        self._iterations_logged = 0
        self._unsent_images = False
        self._unread: list[dict[str, Tensor]] = []  # metrics of micro-batches, still on the device
        self._unscored: set[str] = set()  # what an evaluation has warned of
        if not args.disable_tqdm and sys.stdout.isatty():
            self.remove_callback(TqdmCallback)
            self.add_callback(ProgressCallback(names))
        self.add_callback(IterationCallback(self))
        self._detectors = LearningDetectors(self)
        self.add_callback(self._detectors)
        self._guard = GradientGuardCallback(self)
        self.add_callback(self._guard)
        self._ema = EMACallback(self, args.ema_decay, args.ema_update_steps) if args.ema_decay else None
        if self._ema is not None:
            self.add_callback(self._ema)

    # Set-up

    def _plan_rollout(self, args: DiffusionGRPOConfig) -> None:
        default_height, default_width = self.policy.default_size()
        self.height, self.width = args.height or default_height, args.width or default_width
        self.latent_shape = self.policy.latent_shape(self.height, self.width)
        self.transition = args.transition or self.policy.transitions[0]
        if self.transition not in self.policy.transitions:
            raise ValueError(
                f"`transition` must be one of {self.policy.transitions} for {type(self.policy.pipeline).__name__}. "
                f"Found {self.transition!r}. None picks the first."
            )
        schedule = self.policy.schedule(args.num_inference_steps, self.height, self.width)
        self.sampler = Sampler(schedule, self.transition, args.noise_level)
        if args.flow_matching and "flow_sde" not in self.policy.transitions:
            raise ValueError(
                f"loss_type={args.loss_type!r} needs a model that predicts a flow's velocity. Found "
                f"{type(self.policy.pipeline).__name__}, which predicts noise. Use loss_type='grpo'."
            )
        if args.flow_matching:
            self._levels(args, range(1), iteration=0)  # raises where the schedule has too few
        self._window(args, iteration=0)

    def _window(self, args: DiffusionGRPOConfig, iteration: int) -> range:
        """The stochastic steps of an iteration; none where the loss needs final latents alone."""
        if args.flow_matching:
            return range(0)
        steps, size, where = args.num_inference_steps, args.sde_window_size, args.sde_window_range
        return sde_window(steps, size, where, args.seed, iteration)

    def _levels(self, args: DiffusionGRPOConfig, samples: range, iteration: int) -> Tensor:
        """Noise levels `[B, N]` that these samples of an iteration are trained on."""
        assert args.timesteps_per_image is not None
        drawn = [
            training_sigmas(
                args.timestep_sampling, self.sampler.schedule.sigmas, (1, args.timesteps_per_image),
                keyed_generator(args.seed, ROW_LEVEL, iteration, i), args.timestep_shift, *args.timestep_range,
            )
            for i in samples
        ]  # fmt: skip
        return torch.cat(drawn)

    def _plan_updates(self, args: DiffusionGRPOConfig, num_prompts: int) -> None:
        self.updates_per_pass = updates_per_pass(
            args.per_device_train_batch_size * args.steps_per_generation,
            args.rows_per_image,
            args.per_device_train_batch_size,
            args.timestep_batch_size,
            args.gradient_accumulation_steps,
        )
        self.updates_per_iteration = self.updates_per_pass * args.num_iterations
        self.steps_per_iteration = self.updates_per_iteration * args.gradient_accumulation_steps
        groups = args.generation_batch_size // args.num_generations
        GroupSampler(num_prompts, groups, args.num_generations, 1, False, 0)  # raises where prompts are too few

    def _prepare_denoiser(self, args: Any, peft_config: Any, adapter: Any) -> nn.Module:
        """The model to train: with an adapter, new or gone on from, or all weights of the denoiser."""
        start = take_adapter(self.policy, adapter)
        self._starts_from_adapter = start is not None
        denoiser = self.policy.denoiser
        if args.disable_dropout:
            disable_dropout(denoiser)
        if args.compile_denoiser:
            compile_blocks(denoiser)
        answer_as_transformers(denoiser)
        if peft_config is not None or start is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(args.seed)  # equal on all ranks, also where an engine does not broadcast
                return add_adapter(denoiser, peft_config, self.policy, start)
        if args.beta > 0:
            self._reference = frozen_copy(denoiser)
            if args.bf16 or args.fp16:  # autocast would compute in half precision anyway
                self._reference.to(torch.bfloat16 if args.bf16 else torch.float16)
        warn_of_all_weights(denoiser)
        denoiser.float()  # trained weights are float32; autocast does the rest
        return denoiser.requires_grad_(True)

    # Trainer's and TRL's seams

    def _send_telemetry(self) -> None:
        """TRL's telemetry reads fields that diffusers models do not have."""

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = None

    def _get_train_sampler(self, dataset=None) -> GroupSampler:
        args = self.args
        return GroupSampler(
            len(self.train_dataset if dataset is None else dataset),
            groups=args.generation_batch_size // args.num_generations,
            group_size=args.num_generations,
            repeats=self.steps_per_iteration,
            shuffle=args.shuffle_dataset,
            seed=args.seed,
        )

    def train(self, resume_from_checkpoint=None, **kwargs):
        self.resumed_from = resume_from_checkpoint = resume_point(self, resume_from_checkpoint)
        self._scorer = self._open_scorer(self.reward_funcs, self.reward_func_names)
        self.save_and_stop = None
        try:
            with whole_models():  # a reward may load its network at its first call
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except RuntimeError as error:
            if isinstance(error, OtherRankError) or not lost_rank(error):
                raise
            whole = last_whole(self.args.output_dir)
            raise OtherRankError(
                f"All {self.accelerator.num_processes} processes must live until the end. Found that another one is gone "
                f"(at step {self.state.global_step}, on rank {self.accelerator.process_index}: {str(error)[:200]}). Look "
                "for the first error of the other ranks, then "
                + (f"resume from {whole}, the last whole checkpoint." if whole else "start anew: none was saved yet.")
            ) from error
        finally:
            self._scorer.close()
            self._scorer = None
            self._iteration_rollout = None
        if self.save_and_stop:
            raise self._stop_error(
                f"Training was stopped at step {self.state.global_step}, with a checkpoint saved: {self.save_and_stop}"
            )
        return result

    def request_stop(self, cause: str, error: type[RuntimeError] = RuntimeError) -> None:
        """Save a checkpoint at the end of the iteration, then stop with `cause` as the error."""
        logger.error("%s", cause)
        self.save_and_stop, self._stop_error = cause, error

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if is_finished(self):  # Trainer would take a step before it looks
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

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

    @property
    def _engine(self) -> str:
        """What saves and loads the state: "ddp" (one process too), "zero1" to "zero3" or "fsdp"."""
        if self.is_deepspeed_enabled:
            return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "fsdp" if self.is_fsdp_enabled else "ddp"

    def _stateful(self) -> dict[str, Any]:
        """What a checkpoint keeps in `apex_state.json`: objects with `state_dict` and `load_state_dict`, by name."""
        return {"monitor": self._watch, "detectors": self._detectors}

    def _open_scorer(self, funcs: list, names: list[str]) -> RewardScorer:
        """Scoring in the background, once every reward is known to work.

        Networks are loaded here and not at their first call: loading sets PyTorch's default dtype for a moment, which
        would reach a rollout or another reward that runs at the same time.
        """
        scorer = RewardScorer(funcs, names, timeout=self.args.reward_timeout)
        with failing_together("the check of the rewards"), whole_models():
            scorer.check()
            for func in funcs:
                if isinstance(func, Reward):
                    func.load()
        return scorer

    # One iteration

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """One micro-batch. DeepSpeed steps inside the backward, so that an update without a signal is left out here."""
        if not self.is_deepspeed_enabled:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        self._guard.update_is_dead = inputs["dead"] and self.args.skip_dead_updates and self.beta == 0
        if not self._guard.update_is_dead:
            return super().training_step(model, inputs, num_items_in_batch)
        self._step += 1
        return torch.zeros((), device=self.accelerator.device)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if isinstance(generation_batch, dict):  # prepared already
            return generation_batch
        position = self._step % self.steps_per_iteration
        if position == 0 or self._iteration_rollout is None:
            if position:
                logger.warning(
                    "The checkpoint lies inside an iteration: update %d of %d. Its rollout is gone, so the rest of the "
                    "iteration trains on a fresh one.",
                    position // self.args.gradient_accumulation_steps,
                    self.updates_per_iteration,
                )
            self._iteration_rollout = self._generate_and_score_completions(generation_batch)
        return self._rows(self._iteration_rollout, position)

    @property
    def _iteration(self) -> int:
        return self._step // self.steps_per_iteration

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Rollout, rewards and advantages of this rank's share of one iteration."""
        started = time.perf_counter()
        device, metrics = self.accelerator.device, self._metrics["train"]
        chunk = self.args.rollout_batch_size or len(inputs)
        first = self.accelerator.process_index * len(inputs)
        prompts = [row["prompt"] for row in inputs]
        rollouts, pending = [], []
        self._detectors.note_weights()
        with self._rollout_weights(), self._failing_together_unless_sharded():
            self._detectors.probe_velocity()
            embeddings, prompt_of = self._conditions.distinct(prompts)
            for start in range(0, len(inputs), chunk):
                rows = inputs[start : start + chunk]
                own = {name: value[prompt_of[start : start + chunk]] for name, value in embeddings.items()}
                rollout = self._rollout(own, first + start)
                rollouts.append(rollout)
                if self.args.reward_overlap:
                    pending.append(self._submit(self._scorer, rows, rollout.images))
        sampled = time.perf_counter()
        try:
            with failing_together("the rewards"):
                if not self.args.reward_overlap:
                    pending = [self._submit(self._scorer, inputs, torch.cat([r.images for r in rollouts]))]
                scored = [future.result() for future in pending]
        except Exception:
            save_before_failing(self)
            raise
        metrics["time/rollout"].append(sampled - started)
        metrics["time/rewards_wait"].append(time.perf_counter() - sampled)
        self._stop_if_rewards_fail(*log_scoring(scored, self.reward_func_names, metrics, device))

        rewards = gather_rows(torch.cat([s.rewards for s in scored]).to(device)).cpu()
        group_ids = torch.arange(len(rewards)) // self.num_generations
        advantages, normalized = self._compute_advantages(rewards, group_ids)
        self._log_rollout(rewards, advantages, prompts, rollouts)
        self._detectors.see_rollout(rollouts, advantages)
        here = local_slice(len(inputs), self.accelerator.process_index)
        result = {
            "advantages": advantages[here].to(device, torch.float32),
            "normalized": normalized[here].to(device, torch.float32),
            "embeddings": embeddings,
            "prompt_of": prompt_of,
            "prompts": prompts,
            "dead": bool((advantages == 0).all()),
            "live": (advantages[here] != 0).cpu(),
        }
        if self.args.flow_matching:
            return result | self._levels_of(rollouts, range(first, first + len(inputs)), result)
        return result | self._steps_of(rollouts, result)

    def _rollout_weights(self):
        """Whole weights on every rank for the length of a rollout, where an engine shards them and memory allows."""
        return gathered_for_rollout(self.model_wrapped) if self.args.gather_for_rollout else nullcontext()

    def _failing_together_unless_sharded(self):
        """Sharded layers are gathered in each forward; a rank that fails there leaves the others in that collective."""
        if not self.args.gather_for_rollout and any(map(is_sharded, self.model.parameters())):
            return nullcontext()
        return failing_together("the rollout")

    def _rollout(self, embeddings: Embeddings, first_sample: int) -> Rollout:
        args, device = self.args, self.accelerator.device
        seed, iteration = args.seed, self._iteration
        window = self._window(args, iteration)
        samples = range(first_sample, first_sample + len(next(iter(embeddings.values()))))
        group = self.num_generations
        initial_keys = [
            (seed, INITIAL_NOISE, iteration, i // group if args.share_initial_noise else i) for i in samples
        ]
        step_keys = [(seed, STEP_NOISE, iteration, i) for i in samples]
        initial = keyed_noise(initial_keys, self.latent_shape)
        noise = keyed_noise(step_keys, (len(window), *self.latent_shape)).to(device)
        representative = None
        if args.share_initial_noise:
            representative = torch.tensor([max(i // group * group - first_sample, 0) for i in samples], device=device)
        return self._sample(embeddings, initial, window, noise, self.sampler, args.guidance_scale, representative)

    def _sample(self, embeddings, initial, window, noise, sampler, guidance_scale, representative=None) -> Rollout:
        model, negative = self._rollout_model(), self._conditions.negative(guidance_scale)
        return sample(
            self.policy, model, sampler, embeddings, negative, guidance_scale, initial, window, noise, representative
        )

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
            del self.model._is_accelerate_prepared  # by this mark, training would not wrap it in DDP

    def _submit(self, scorer: RewardScorer, rows: list[dict[str, Any]], images: Tensor):
        completions = to_pil(images)
        columns = {name: [row[name] for row in rows] for name in reward_columns(rows[0])}
        return scorer.submit(
            prompts=[row["prompt"] for row in rows],
            completions=completions,
            images=images,
            columns=columns,
            trainer_state=self.state,
            log_metric=self._log_metric,
            log_extra=self._log_completion_extra,
        )

    def _compute_advantages(self, rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Turn gathered rewards `[B, K]` into advantages `[B]`, and what each objective alone would say `[B, K]`.

        All on the CPU: some accelerators have no float64. The one method that `APEXTrainer` overrides.
        """
        rewards = wide_enough(rewards)
        weights, groups = self.reward_weights.to(rewards), group_rows(group_ids)
        if self.args.multi_objective_aggregation == "normalize_then_sum":
            scores, advantages = normalize_then_sum(rewards, weights, groups)
        else:
            scores, advantages = sum_then_normalize(rewards, weights, groups, self.args.scale_rewards)
        return advantages, scores

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's own, and with `log_completions` a picture of the newest images with their rewards."""
        read_updates(self._unread, self._metrics["train"])
        sum_counts(self._metrics["train"])
        super().log(logs, start_time)
        if self._unsent_images:
            self._unsent_images = False
            samples = newest_samples(self._logs, self.reward_func_names)
            self._send_samples("images/rollout", samples, min(self.num_generations, COLUMNS))

    def _send_samples(self, name: str, samples: list[dict[str, Any]], columns: int = COLUMNS) -> None:
        """Log a grid of samples (prompt, image, rewards) with the trackers of `report_to`."""
        if self.accelerator.is_main_process:
            picture = reward_grid(samples[: columns * ROWS], columns)
            send_picture(self.callback_handler.callbacks, name, picture, self.state.global_step)

    def _stop_if_rewards_fail(self, failures: dict[str, int], samples: int) -> None:
        limit = self.args.max_reward_failure_rate
        for name, count in failures.items():  # of all ranks, so that they stop together
            if count > limit * samples:
                self.request_stop(
                    f"reward {name!r} failed for {count} of {samples} images, more than max_reward_failure_rate={limit}. "
                    "The warnings above tell why; raise the limit to go on without it.",
                    RewardFailureRateError,
                )

    def _log_rollout(self, rewards: Tensor, advantages: Tensor, prompts: list[str], rollouts: list[Rollout]) -> None:
        names, metrics = self.reward_func_names, self._metrics["train"]
        log_rewards(rewards, names, self.reward_weights, self.num_generations, metrics)
        self._warn_of_absent_objectives(rewards)
        if self.log_completions:
            prompts, size = gather_list(prompts), len(rewards)
            pictures: list[list[Any]] = [[]] * size
            if self.accelerator.is_main_process:  # pictures are not gathered
                pictures = shown_pictures(torch.cat([r.images for r in rollouts]), self.num_generations, size)
            log_samples(
                self._logs,
                dict(zip(names, rewards.double().T.tolist(), strict=True)),
                prompt=prompts,
                completion=["<image>"] * size,
                images=pictures,
                advantages=advantages.tolist(),
            )
            self._unsent_images = True
        log_from_rewards((self._pending_metrics, self._pending_extra_logs), metrics, self._logs["extra"])

    def _warn_of_absent_objectives(self, rewards: Tensor) -> None:
        """Warn, once each, of objectives that no image had a score for in the first iterations."""
        self._iterations_logged += 1
        scored = rewards.isfinite().any(0).tolist()
        self._scored_objectives |= {name for name, any_ in zip(self.reward_func_names, scored, strict=True) if any_}
        if self._iterations_logged == PATIENCE:
            for name in self.reward_func_names:
                if name not in self._scored_objectives:
                    logger.warning(
                        "The reward %r has scored no image in %d iterations, so nothing is learned from it. It returns None "
                        "or fails for every prompt: check the column it reads and the prompts it applies to.",
                        name,
                        PATIENCE,
                    )

    # The update

    def _rows(self, rollout: dict[str, Any], position: int) -> dict[str, Any]:
        args, samples = self.args, len(rollout["prompt_of"])
        steps_per_pass = self.updates_per_pass * args.gradient_accumulation_steps
        pass_number, step = divmod(position, steps_per_pass)
        update, micro = divmod(step, args.gradient_accumulation_steps)
        key = (args.seed, ROW_ORDER, self._iteration, pass_number)
        first = self.accelerator.process_index * samples
        if step == 0 or "update_rows" not in rollout:  # once a pass
            rollout["update_rows"] = update_rows(samples, args.rows_per_image, self.updates_per_pass, first, key)
        count = args.per_device_train_batch_size * args.timestep_batch_size
        rows = rollout["update_rows"][update][micro * count : (micro + 1) * count]
        self._metrics["train"]["dead_step_rate"].append(float(not rollout["live"][rows[:, 0]].any()))
        sample, on_device = rows.to(self.accelerator.device).unbind(1)
        own = (self._level_rows if args.flow_matching else self._step_rows)(rollout, sample, on_device)
        return {
            **own,
            "steps": rows[:, 1] + rollout["window"].start,  # on the CPU, where the schedule is
            "advantages": rollout["advantages"][sample],
            "normalized": rollout["normalized"][sample],
            "samples": sample + first,
            "embeddings": self._embeddings_of(rollout, sample),
            "dead": rollout["dead"],
            "first_update": pass_number == 0 and update == 0,
        }

    @contextmanager
    def _reference_on_device(self) -> Iterator[nn.Module]:
        """The frozen copy, moved to the device for the length of its forwards where it is offloaded."""
        if self._offload_reference:
            self._reference.to(self.accelerator.device)
        yield self._reference
        if self._offload_reference:
            self._reference.to("cpu")

    def _embeddings_of(self, rollout: dict[str, Any], sample: Tensor) -> Embeddings:
        return {name: value[rollout["prompt_of"][sample]] for name, value in rollout["embeddings"].items()}

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The surrogate loss of one micro-batch, plus `beta` times the distance to the reference."""
        loss_of = self._level_loss if self.args.flow_matching else self._step_loss
        surrogate, distance = loss_of(model, inputs)
        loss = surrogate.loss.mean()
        if distance is not None:
            loss = loss + self.beta * distance
        self._guard.update_is_dead &= inputs["dead"]
        if inputs["first_update"]:
            self._detectors.watch_ratio(surrogate.ratio)
        self._unread.append(update_metrics(surrogate, distance))
        self._guard.remember(surrogate.ratio, inputs)
        return loss / self.current_gradient_accumulation_steps

    # Rows of 'grpo': stochastic denoising steps, and the clipped ratio of their probabilities

    def _steps_of(self, rollouts: list[Rollout], rollout: dict[str, Any]) -> dict[str, Any]:
        found = {
            "latents": torch.cat([r.trajectory.latents for r in rollouts]),
            "old_log_prob": torch.cat([r.trajectory.log_prob for r in rollouts]),
            "window": rollouts[0].trajectory.steps,
        }
        if self._reference is not None:
            found["reference_mean"] = self._reference_means(rollout | found)
        return found

    @torch.no_grad()
    def _reference_means(self, rollout: dict[str, Any]) -> Tensor:
        """Means `[B, N, C, H, W]` of the frozen copy's transitions, once an iteration."""
        count = len(rollout["latents"])
        means = torch.empty_like(rollout["latents"][:, 1:])
        with self._reference_on_device() as reference:
            for rows in torch.arange(count, device=means.device).split(self.args.rollout_batch_size or count):
                embeddings = self._embeddings_of(rollout, rows)
                for i, step in enumerate(rollout["window"]):
                    inputs = {
                        "latents": rollout["latents"][rows, i],
                        "next_latents": rollout["latents"][rows, i + 1],
                        "steps": torch.full((len(rows),), step),
                        "embeddings": embeddings,
                    }
                    means[rows, i] = self._step_log_prob(reference, inputs)[1].mean
        return means

    def _step_rows(self, rollout: dict[str, Any], sample: Tensor, step: Tensor) -> dict[str, Any]:
        return {
            "latents": rollout["latents"][sample, step],
            "next_latents": rollout["latents"][sample, step + 1],
            "old_log_prob": rollout["old_log_prob"][sample, step],
            "reference_mean": None if self._reference is None else rollout["reference_mean"][sample, step],
        }

    def _step_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Surrogate, Tensor | None]:
        _, transition, log_prob = self._step_log_prob(model, inputs)
        surrogate = clipped_surrogate(
            log_prob,
            inputs["old_log_prob"],
            inputs["advantages"],
            self.epsilon_low,
            self.epsilon_high,
            self.args.delta,
        )
        return surrogate, self._kl(model, inputs, transition) if self.beta > 0 else None

    def _step_log_prob(self, model: nn.Module, inputs: dict[str, Any]):
        guidance: Any = self.args.guidance_scale  # a number by now
        timesteps = self.sampler.timesteps(inputs["steps"]).to(inputs["latents"].device)
        negative = self._conditions.negative(guidance)
        prediction = guided_prediction(
            self.policy, model, inputs["latents"], timesteps, inputs["embeddings"], negative, guidance
        )
        transition = self.sampler.stochastic(inputs["latents"], prediction, inputs["steps"])
        return prediction, transition, self.sampler.log_prob(inputs["next_latents"], transition)

    def _kl(self, model: nn.Module, inputs: dict[str, Any], transition: Transition) -> Tensor:
        """Mean KL divergence of `transition` to that of the model without its adapter, or of the frozen start."""
        if self._reference is None:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                mean = self._step_log_prob(model, inputs)[1].mean
        else:
            mean = inputs["reference_mean"]
        return gaussian_kl(transition.mean, mean, transition.std).mean()

    # Rows of 'awm', 'nft' and 'fpo': final latents at noise levels, and the velocities predicted there

    def _levels_of(self, rollouts: list[Rollout], samples: range, rollout: dict[str, Any]) -> dict[str, Any]:
        """Final latents `[B, C, H, W]`, noise levels `[B, N]` and fresh noise `[B, N, C, H, W]`."""
        clean = torch.cat([r.latents for r in rollouts])
        levels = self._levels(self.args, samples, self._iteration)
        keys = [(self.args.seed, ROW_NOISE, self._iteration, i) for i in samples]
        noise = keyed_noise(keys, (levels.shape[1], *self.latent_shape))
        found = {
            "clean": clean,
            "levels": levels.to(clean.device),
            "noise": noise.to(clean.device),
            "window": range(0),
        }
        return found | self._velocities_before_updates(rollout | found)

    @torch.no_grad()
    def _velocities_before_updates(self, rollout: dict[str, Any]) -> dict[str, Tensor]:
        """What the policy that sampled, and the frozen copy, predict for every row before the first update.

        `old` is the log-likelihood of each row `[B, N]` (for NFT its velocity `[B, N, C, H, W]`); one update an iteration
        needs none. `reference_velocity` `[B, N, C, H, W]` is the frozen copy's.
        """
        args, found = self.args, {}
        samples, levels = rollout["levels"].shape
        pairs = torch.cartesian_prod(torch.arange(samples), torch.arange(levels)).to(rollout["levels"].device)
        chunks = pairs.split(args.per_device_train_batch_size * args.timestep_batch_size)

        def every_row(model: nn.Module, keep: Callable[[Tensor, dict[str, Any]], Tensor]) -> Tensor:
            was_training, kept = model.training, []
            model.eval()
            for chosen, level in (chunk.unbind(1) for chunk in chunks):
                rows = self._level_rows(rollout, chosen, level)
                rows["embeddings"] = self._embeddings_of(rollout, chosen)
                kept.append(keep(self._velocity(model, rows), rows))
            model.train(was_training)
            return torch.cat(kept).unflatten(0, (samples, levels))

        if self.updates_per_iteration > 1:
            by_likelihood = args.loss_type != "nft"
            with self._rollout_weights():
                found["old"] = every_row(
                    self._rollout_model(), lambda v, rows: self._log_likelihood(v, rows) if by_likelihood else v
                )
        if self._reference is not None:
            with self._reference_on_device() as reference:
                found["reference_velocity"] = every_row(reference, lambda velocity, rows: velocity)
        return found

    def _level_rows(self, rollout: dict[str, Any], sample: Tensor, level: Tensor) -> dict[str, Any]:
        """The rows of a flow-matching loss: noised latents, their target velocity, and what was predicted before."""
        clean, noise, sigmas = (
            rollout["clean"][sample],
            rollout["noise"][sample, level],
            rollout["levels"][sample, level],
        )
        rows = {"latents": add_noise(clean, noise, sigmas), "clean": clean, "target": noise - clean, "sigmas": sigmas}
        before = {name: rollout[name][sample, level] for name in ("old", "reference_velocity") if name in rollout}
        return rows | before

    def _level_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Surrogate, Tensor | None]:
        args, advantages = self.args, inputs["advantages"]
        velocity = self._velocity(model, inputs)
        if args.loss_type == "nft":
            old = inputs.get("old", velocity.detach())
            rows = nft_loss(
                velocity, old, inputs["latents"], inputs["clean"], inputs["sigmas"], advantages, args.nft_beta
            )
            never = torch.zeros_like(rows, dtype=torch.bool)
            surrogate = Surrogate(rows, 1 + 0 * rows.detach(), never, never)  # nothing to clip; NaN stays NaN
        else:
            likelihood = self._log_likelihood(velocity, inputs)
            if args.loss_type == "awm":
                advantages = advantages.clamp(-5, 5) / 5 * args.advantage_max
            old = inputs.get("old", likelihood.detach())
            surrogate = clipped_surrogate(likelihood, old, advantages, self.epsilon_low, self.epsilon_high, args.delta)
        return surrogate, self._velocity_penalty(model, inputs, velocity) if self.beta > 0 else None

    def _velocity(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        timesteps = 1000 * inputs["sigmas"]  # a flow's convention, whatever the family then divides by
        return guided_prediction(self.policy, model, inputs["latents"], timesteps, inputs["embeddings"], None, 1.0)

    def _log_likelihood(self, velocity: Tensor, inputs: dict[str, Any]) -> Tensor:
        if self.args.loss_type == "awm":
            return awm_log_likelihood(velocity, inputs["target"], inputs["sigmas"], self.args.awm_weighting)
        return fpo_log_likelihood(velocity, inputs["target"], self.args.fpo_scale)

    def _velocity_penalty(self, model: nn.Module, inputs: dict[str, Any], velocity: Tensor) -> Tensor:
        """Mean squared difference to the velocity of the model without its adapter, or of the frozen start."""
        if self._reference is None:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                wanted = self._velocity(model, inputs)
        else:
            wanted = inputs["reference_velocity"]
        return (velocity - wanted).square().mean()
