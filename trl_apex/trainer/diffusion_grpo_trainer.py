"""GRPO for text-to-image models, on TRL's trainer."""

import copy
import json
import logging
import time
import types
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import numpy_to_pil
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.models import prepare_deepspeed

from ..aggregation.normalize import group_rows
from ..aggregation.rules import normalize_then_sum, sum_then_normalize
from ..distributed import (
    OtherRankError,
    all_reduce_sum,
    check_equal,
    failing_together,
    gather_list,
    gather_rows,
    gathered_for_rollout,
    is_sharded,
    local_slice,
    lost_rank,
    wait_for_all,
    whole_models,
)
from ..loss import clipped_surrogate, gaussian_kl
from ..policy.load import dtype_argument, load_policy
from ..policy.sampler import Sampler, sde_window
from ..policy.transition import Transition
from ..policy.velocity import guided_prediction
from ..prompts import GroupSampler
from ..rewards.protocol import Reward
from ..rewards.scoring import RewardScorer
from ..rollout.noise import INITIAL_NOISE, ROW_ORDER, STEP_NOISE, evaluation_noise, keyed_noise
from ..rollout.sample import sample
from ..types import Embeddings, Rollout
from .callbacks import GradientGuardCallback, IterationCallback
from .checkpoint import PARTIAL, check_engine, clear_partial, last_whole, publish, rotate, to_resume_from
from .denoiser import compile_blocks, save_denoiser
from .diffusion_grpo_config import DiffusionGRPOConfig
from .ema import EMACallback
from .inputs import check_dataset, check_weights, check_whole, reward_names
from .lora import add_adapter, save_diffusers_lora
from .monitor import MONITOR_FILE, RewardHackingWatch
from .prompt_encoding import open_embeddings, precompute, unload_encoders
from .publishing import PublishingMixin, without_token
from .rows import update_rows
from .trl_seam import set_inherited_attributes

logger = logging.getLogger(__name__)


def to_numpy(images: Tensor) -> np.ndarray:
    """Images `[B, 3, H, W]` as the array `[B, H, W, 3]` that diffusers turns into PIL images."""
    return images.permute(0, 2, 3, 1).cpu().numpy()


class DiffusionGRPOTrainer(PublishingMixin, GRPOTrainer):
    """Trains the denoiser of a text-to-image pipeline with GRPO.

    One iteration: sample a group of images for each of a few prompts, score them, turn scores into advantages, and make
    denoising steps that led to better images more likely. Constructor, reward functions, logs, checkpoints and
    distributed training are those of `trl.GRPOTrainer`.

    Args:
        model (`str` or `diffusers.DiffusionPipeline`): hub id, folder or loaded pipeline.
        reward_funcs (callable or `list`): called with keywords `prompts`, `completions` (PIL images), `images` (float
            tensor `[B, 3, H, W]` in [0, 1], where the signature takes it), every dataset column, `trainer_state`,
            `log_metric` and `log_extra`; return one number, or None, per image. May be async.
        args ([`DiffusionGRPOConfig`] or `trl.GRPOConfig`, *optional*): a plain GRPOConfig is upgraded field by field.
        train_dataset (`datasets.Dataset`): with a `prompt` column.
        eval_dataset (`datasets.Dataset` or dict of them, *optional*): likewise.
        processing_class, reward_processing_classes: accepted for compatibility; a pipeline brings its own.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config: must be None.
        peft_config (`peft.LoraConfig`, *optional*): train an adapter instead of all weights.
        monitor_funcs (callable or `list`, *optional*): reward functions that evaluation reports and training never sees.

    Raises:
        ValueError: for anything of the above that cannot work, before any compute.

    Example:
        ```python
        from trl_apex import DiffusionGRPOConfig, DiffusionGRPOTrainer

        trainer = DiffusionGRPOTrainer(
            model="stabilityai/stable-diffusion-3.5-medium",
            reward_funcs=[ocr, brightness],
            args=DiffusionGRPOConfig(output_dir="run", num_generations=8, per_device_train_batch_size=8),
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
    control: Any
    num_generations: int
    _logs: dict[str, Any]

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
    ):
        args, self._hub_token = without_token(self._upgrade_args(args))
        if reward_funcs is None or reward_funcs == []:
            raise ValueError(
                "`reward_funcs` must hold at least one reward function. Found none. Pass e.g. `OCRReward()`."
            )
        reward_funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        monitor_funcs = list(monitor_funcs) if isinstance(monitor_funcs, list | tuple) else [monitor_funcs]
        self.monitor_funcs = [func for func in monitor_funcs if func is not None]
        names = reward_names([*reward_funcs, *self.monitor_funcs])[: len(reward_funcs)]
        weights = check_weights(args.reward_weights, names)
        if quantization_config is not None:
            raise ValueError(
                "`quantization_config` must be None: quantized denoisers are not supported. Found "
                f"{type(quantization_config).__name__}. Use bf16 with a LoRA adapter to save memory."
            )
        check_dataset(train_dataset, "train_dataset")
        for name, dataset in eval_dataset.items() if isinstance(eval_dataset, dict) else [("", eval_dataset)]:
            if dataset is not None:
                check_dataset(dataset, f"eval_dataset{name and '.' + name}")
        train_dataset = train_dataset.select(range(len(train_dataset)))  # our own view: Trainer may format it

        with whole_models():
            self.policy = load_policy(model, **self._load_kwargs(model, args, peft_config))
        check_whole(self.policy.pipeline)
        self._plan_rollout(args)
        self._plan_updates(args, len(train_dataset))
        self._reference: Any = None  # the frozen copy that full fine-tuning measures its KL to
        denoiser = self._prepare_denoiser(model, args, peft_config)
        self.policy.move_frozen(args.device)
        self._negative_embeddings: Embeddings | None = None
        # Before the denoiser moves to the device: it and the text encoders need not fit there together.
        self._encode_prompts(args, [train_dataset, eval_dataset], own_pipeline=isinstance(model, str))

        super(GRPOTrainer, self).__init__(
            model=denoiser,
            args=args,
            data_collator=lambda rows: rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        set_inherited_attributes(self, args, reward_funcs, names)
        self.reward_weights = torch.tensor(weights, dtype=torch.float64)
        if self._reference is not None:
            if self.is_deepspeed_enabled:
                self._reference = prepare_deepspeed(self._reference, self.accelerator)
            else:
                self._reference = self.accelerator.prepare_model(
                    self._reference, device_placement=not args.offload_reference, evaluation_mode=True
                )
        self._scorer: Any = None  # a RewardScorer while training
        self._iteration_rollout: dict[str, Any] | None = None
        self.resumed_from: str | None = None
        self._partial_dir: Path | None = None
        self.save_and_stop: str | None = None
        self.update_is_dead = True
        self.eval_records: list[dict[str, Any]] = []
        self._watch = RewardHackingWatch(len(reward_funcs))
        self.add_callback(IterationCallback(self))
        self.add_callback(GradientGuardCallback(self))
        self._ema = EMACallback(self, args.ema_decay, args.ema_update_steps) if args.ema_decay else None
        if self._ema is not None:
            self.add_callback(self._ema)

    # Set-up

    def _upgrade_args(self, args: Any) -> DiffusionGRPOConfig:
        if args is None:
            return self.config_class(output_dir=f"{type(self).__name__}-output")
        if isinstance(args, self.config_class):
            return args
        if not isinstance(args, GRPOConfig):
            raise ValueError(
                f"`args` must be a {self.config_class.__name__} or a trl.GRPOConfig. Found {type(args).__name__}. "
                f"Construct a {self.config_class.__name__}(output_dir=...)."
            )
        return self.config_class.from_grpo_config(args)

    @staticmethod
    def _load_kwargs(model: Any, args: DiffusionGRPOConfig, peft_config: Any) -> dict[str, Any]:
        kwargs = dict(args.model_init_kwargs or {})
        if kwargs and not isinstance(model, str):
            raise ValueError(
                "`model_init_kwargs` needs `model` to be a name. Found a loaded pipeline. Pass them when you load it."
            )
        dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
        if dtype is None and isinstance(model, str) and (args.bf16 or args.fp16):
            dtype = torch.bfloat16 if args.bf16 else torch.float16  # frozen weights need no more
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype)
        return kwargs if dtype is None else {**kwargs, **dtype_argument(dtype)}

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
        self._window(args, iteration=0)

    def _encode_prompts(self, args: DiffusionGRPOConfig, datasets: list, own_pipeline: bool) -> None:
        self.args = args
        self._embeddings = open_embeddings(self.policy, args.max_sequence_length, args.prompt_cache_dir)
        if args.precompute_prompts:
            precompute(self._embeddings, datasets, shared=args.prompt_cache_dir is not None)
        unload = own_pipeline and args.precompute_prompts
        if unload if args.unload_text_encoders is None else args.unload_text_encoders:
            self._negative(guidance_scale=2.0)  # any that needs it: evaluation may have another than training
            unload_encoders(self.policy, own_pipeline)
            self._embeddings.close(
                "The text encoders were unloaded once the prompts of `train_dataset` and `eval_dataset` were encoded."
            )

    def _window(self, args: DiffusionGRPOConfig, iteration: int) -> range:
        steps, size, where = args.num_inference_steps, args.sde_window_size, args.sde_window_range
        return sde_window(steps, size, where, args.seed, iteration)

    def _plan_updates(self, args: DiffusionGRPOConfig, num_prompts: int) -> None:
        window = len(self._window(args, 0))
        samples = args.per_device_train_batch_size * args.steps_per_generation
        rows_per_step = args.per_device_train_batch_size * args.timestep_batch_size
        rows_per_update = rows_per_step * args.gradient_accumulation_steps
        if samples * window % rows_per_update:
            raise ValueError(
                "An iteration must split into whole updates: images per device x trained steps must be a multiple of "
                "per_device_train_batch_size x timestep_batch_size x gradient_accumulation_steps. Found "
                f"{samples} x {window} rows and {args.per_device_train_batch_size} x {args.timestep_batch_size} x "
                f"{args.gradient_accumulation_steps} = {rows_per_update} rows an update. For one update an iteration set "
                f"gradient_accumulation_steps={max(samples * window // rows_per_step, 1)}."
            )
        self.updates_per_pass = samples * window // rows_per_update
        self.updates_per_iteration = self.updates_per_pass * args.num_iterations
        self.steps_per_iteration = self.updates_per_iteration * args.gradient_accumulation_steps
        groups = args.generation_batch_size // args.num_generations
        GroupSampler(num_prompts, groups, args.num_generations, 1, False, 0)  # raises where prompts are too few

    def _prepare_denoiser(self, model: Any, args: DiffusionGRPOConfig, peft_config: Any) -> nn.Module:
        denoiser = self.policy.denoiser
        if args.compile_denoiser:
            compile_blocks(denoiser)
        # Trainer calls these transformers names; diffusers has its own.
        for name in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
            setattr(
                denoiser, name, types.MethodType(lambda self, **kwargs: self.enable_gradient_checkpointing(), denoiser)
            )
        for name in ("gradient_checkpointing_disable", "activation_checkpointing_disable"):
            setattr(denoiser, name, types.MethodType(lambda self: self.disable_gradient_checkpointing(), denoiser))
        if peft_config is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(args.seed)  # equal on all ranks, also where an engine does not broadcast
                return add_adapter(denoiser, peft_config, self.policy)
        if isinstance(model, str):
            denoiser.float()  # trained weights are float32; autocast does the rest
        if args.beta > 0:
            self._reference = copy.deepcopy(denoiser).eval().requires_grad_(False)
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
        resume_from_checkpoint = self._resume_point(resume_from_checkpoint)
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
            raise RuntimeError(
                f"Training was stopped at step {self.state.global_step}, with a checkpoint saved: {self.save_and_stop}"
            )
        return result

    def _resume_point(self, wanted) -> str | None:
        """The whole checkpoint behind `resume_from_checkpoint`, the same on every rank; None to start anew."""
        if wanted is None or wanted is False:
            return None
        found = None
        with failing_together("the choice of a checkpoint"):
            if self.accelerator.is_main_process:
                found = str(to_resume_from(wanted, self.args.output_dir))
                check_engine(found, self._engine, self.accelerator.num_processes)
                clear_partial(self.args.output_dir)
        return gather_list([found])[0]

    @property
    def _engine(self) -> str:
        """What saves and loads the state: "ddp" (one process too), "zero1" to "zero3" or "fsdp"."""
        if self.is_deepspeed_enabled:
            return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}"
        return "fsdp" if self.is_fsdp_enabled else "ddp"

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

    def request_stop(self, cause: str) -> None:
        """Save a checkpoint at the end of the iteration, then stop with `cause` as the error."""
        logger.error("%s", cause)
        self.save_and_stop = cause

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super(GRPOTrainer, self)._load_optimizer_and_scheduler(checkpoint)
        self.resumed_from = checkpoint
        if checkpoint is not None and (Path(checkpoint) / MONITOR_FILE).is_file():
            self._watch.load_state_dict(json.loads((Path(checkpoint) / MONITOR_FILE).read_text()))

    # One iteration

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """One micro-batch. DeepSpeed steps inside the backward, so that an update without a signal is left out here."""
        if not self.is_deepspeed_enabled:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        self.update_is_dead = inputs["dead"] and self.args.skip_dead_updates and self.beta == 0
        if not self.update_is_dead:
            return super().training_step(model, inputs, num_items_in_batch)
        self._step += 1
        return torch.zeros((), device=self.accelerator.device)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if isinstance(generation_batch, dict):  # prepared already
            return generation_batch
        position = self._step % self.steps_per_iteration
        if position == 0 or self._iteration_rollout is None:
            if position:
                raise RuntimeError(
                    f"Step {self._step} lies inside an iteration of {self.steps_per_iteration} steps, but its rollout "
                    "is gone. Resume from a checkpoint that this trainer saved, with the same batch settings."
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
        rollouts, pending = [], []
        with self._rollout_weights(), self._failing_together_unless_sharded():
            for start in range(0, len(inputs), chunk):
                rows = inputs[start : start + chunk]
                rollout = self._rollout([row["prompt"] for row in rows], first + start)
                rollouts.append(rollout)
                if self.args.reward_overlap:
                    pending.append(self._submit(self._scorer, rows, rollout.images))
        sampled = time.perf_counter()
        with failing_together("the rewards"):
            if not self.args.reward_overlap:
                pending = [self._submit(self._scorer, inputs, torch.cat([r.images for r in rollouts]))]
            scored = [future.result() for future in pending]
        metrics["time/rollout"].append(sampled - started)
        metrics["time/rewards_wait"].append(time.perf_counter() - sampled)
        self._log_scoring(scored)

        rewards = gather_rows(torch.cat([s.rewards for s in scored]).to(device))
        group_ids = torch.arange(len(rewards), device=device) // self.num_generations
        advantages, normalized = self._compute_advantages(rewards, group_ids)
        self._log_rewards(rewards, advantages, inputs, rollouts)
        here = local_slice(len(inputs), self.accelerator.process_index)
        return {
            "latents": torch.cat([r.trajectory.latents for r in rollouts]),
            "old_log_prob": torch.cat([r.trajectory.log_prob for r in rollouts]),
            "window": rollouts[0].trajectory.steps,
            "advantages": advantages[here].float(),
            "normalized": normalized[here].float(),
            "prompts": [row["prompt"] for row in inputs],
            "dead": bool((advantages == 0).all()),
        }

    def _rollout_weights(self):
        """Whole weights on every rank for the length of a rollout, where an engine shards them and memory allows."""
        return gathered_for_rollout(self.model_wrapped) if self.args.gather_for_rollout else nullcontext()

    def _failing_together_unless_sharded(self):
        """Sharded layers are gathered in each forward; a rank that fails there leaves the others in that collective."""
        if not self.args.gather_for_rollout and any(map(is_sharded, self.model.parameters())):
            return nullcontext()
        return failing_together("the rollout")

    def _rollout(self, prompts: list[str], first_sample: int) -> Rollout:
        args, device = self.args, self.accelerator.device
        seed, iteration = args.seed, self._iteration
        window = self._window(args, iteration)
        samples = range(first_sample, first_sample + len(prompts))
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
        return self._sample(prompts, initial, window, noise, self.sampler, args.guidance_scale, representative)

    def _sample(self, prompts, initial, window, noise, sampler, guidance_scale, representative=None) -> Rollout:
        model, embeddings = self._rollout_model(), self._embeddings(prompts, self.accelerator.device)
        negative = self._negative(guidance_scale)
        return sample(
            self.policy, model, sampler, embeddings, negative, guidance_scale, initial, window, noise, representative
        )

    def _negative(self, guidance_scale: float):
        if guidance_scale == 1.0 or not self.policy.batched_guidance:
            return None
        if self._negative_embeddings is None:
            encoded = self.policy.encode_negative(self.args.negative_prompt, self.args.max_sequence_length)
            self._negative_embeddings = {name: value.to(self.args.device) for name, value in encoded.items()}
        return self._negative_embeddings

    def _rollout_model(self) -> nn.Module:
        """The model to sample with: through an engine's wrapper where it shards weights, else without DDP's."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return self.model_wrapped
        return self.model

    def _submit(self, scorer: RewardScorer, rows: list[dict[str, Any]], images: Tensor):
        completions = numpy_to_pil(to_numpy(images))
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("prompt", "completion")}
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

        The one method that `APEXTrainer` overrides.
        """
        weights, groups = self.reward_weights.to(rewards), group_rows(group_ids)
        if self.args.multi_objective_aggregation == "normalize_then_sum":
            scores, advantages = normalize_then_sum(rewards, weights, groups)
        else:
            scores, advantages = sum_then_normalize(rewards, weights, groups, self.args.scale_rewards)
        return advantages, scores

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Sample one image per evaluation prompt, without noise on the way, and average every reward.

        Deterministic: `eval_num_inference_steps` ODE steps from noise keyed by the prompt's row, with the averaged
        weights where there are any. Each row counts once on any number of processes.

        Args:
            eval_dataset (`datasets.Dataset` or dict of them, *optional*): instead of the trainer's own.
            ignore_keys: accepted for compatibility.
            metric_key_prefix (`str`): of the metrics' names.

        Returns:
            `dict`: `{prefix}_rewards/{name}/mean` and `/se` (standard error over prompts) of each reward and monitored
            function, and `{prefix}_reward`, the weighted sum of means. The images and their scores are kept in
            `eval_records` on the main process.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics = {}
            for name, part in dataset.items():
                metrics.update(self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}"))
            return metrics
        if dataset is None:
            raise ValueError(
                "Evaluation needs a dataset. Found none. Pass `eval_dataset` to the trainer or to `evaluate`."
            )
        started = time.perf_counter()
        funcs = [*self.reward_funcs, *self.monitor_funcs]
        names = reward_names(funcs)
        records = self._evaluation_records(dataset, funcs, names)
        metrics = {}
        for name in names:
            values = torch.tensor([r["rewards"][name] for r in records], dtype=torch.float64)
            values = values[values.isfinite()]
            if len(values):
                metrics[f"{metric_key_prefix}_rewards/{name}/mean"] = values.mean().item()
            if len(values) > 1:
                metrics[f"{metric_key_prefix}_rewards/{name}/se"] = values.std().item() / len(values) ** 0.5
        means = [metrics.get(f"{metric_key_prefix}_rewards/{name}/mean", 0.0) for name in self.reward_func_names]
        metrics[f"{metric_key_prefix}_reward"] = sum(
            w * m for w, m in zip(self.reward_weights.tolist(), means, strict=True)
        )
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
        self.eval_records = records
        if self.monitor_funcs:
            self._watch.see(metric_key_prefix, names, records, self.state.global_step)
        Trainer.log(self, dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluation_records(self, dataset, funcs: list, names: list[str]) -> list[dict[str, Any]]:
        """One record a row of `dataset`, in order: row, prompt, image and rewards; on every rank."""
        args, world, rank = self.args, self.accelerator.num_processes, self.accelerator.process_index
        schedule = self.policy.schedule(args.eval_num_inference_steps, self.height, self.width)
        sampler = Sampler(schedule, self.transition, args.noise_level)
        guidance = args.guidance_scale if args.eval_guidance_scale is None else args.eval_guidance_scale
        share = -(-len(dataset) // world)  # every rank makes as many forwards; what is beyond the end is not counted
        mine = [min(rank + i * world, len(dataset) - 1) for i in range(share)]
        records = []
        scorer = self._open_scorer(funcs, names)
        averaged = self._ema.averaged() if self._ema is not None else nullcontext()
        with averaged, closing(scorer):
            for start in range(0, share, args.per_device_eval_batch_size):
                indices = mine[start : start + args.per_device_eval_batch_size]
                rows = [dataset[i] for i in indices]
                initial = evaluation_noise(args.seed, indices, self.latent_shape)
                empty = initial.new_zeros(len(rows), 0, *self.latent_shape)
                prompts = [row["prompt"] for row in rows]
                images = self._sample(prompts, initial, range(0), empty, sampler, guidance).images
                scored = self._submit(scorer, rows, images).result().rewards.tolist()
                for row, image, prompt, rewards in zip(
                    indices, numpy_to_pil(to_numpy(images)), prompts, scored, strict=True
                ):
                    record = {"row": row, "prompt": prompt, "image": image}
                    records.append({**record, "rewards": dict(zip(names, rewards, strict=True))})
        by_row = {record["row"]: record for record in gather_list(records)}
        return [by_row[i] for i in range(len(dataset))]

    # The update

    def _rows(self, rollout: dict[str, Any], position: int) -> dict[str, Any]:
        args, samples = self.args, len(rollout["prompts"])
        steps_per_pass = self.updates_per_pass * args.gradient_accumulation_steps
        pass_number, step = divmod(position, steps_per_pass)
        update, micro = divmod(step, args.gradient_accumulation_steps)
        key = (args.seed, ROW_ORDER, self._iteration, pass_number)
        first = self.accelerator.process_index * samples
        dealt = update_rows(samples, len(rollout["window"]), self.updates_per_pass, first, key)[update]
        count = args.per_device_train_batch_size * args.timestep_batch_size
        rows = dealt[micro * count : (micro + 1) * count]
        sample, window_step = rows.to(self.accelerator.device).unbind(1)
        return {
            "latents": rollout["latents"][sample, window_step],
            "next_latents": rollout["latents"][sample, window_step + 1],
            "old_log_prob": rollout["old_log_prob"][sample, window_step],
            "advantages": rollout["advantages"][sample],
            "normalized": rollout["normalized"][sample],
            "steps": window_step + rollout["window"].start,
            "samples": sample + first,
            "prompts": [rollout["prompts"][i] for i in sample.tolist()],
            "dead": rollout["dead"],
        }

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Clipped surrogate, plus `beta` times the KL divergence to the reference, over the rows of one micro-batch."""
        prediction, transition, log_prob = self._step_log_prob(model, inputs)
        surrogate = clipped_surrogate(
            log_prob,
            inputs["old_log_prob"],
            inputs["advantages"],
            self.epsilon_low,
            self.epsilon_high,
            self.args.delta,
        )
        loss = surrogate.loss.mean()
        kl = None
        if self.beta > 0:
            kl = self._kl(model, inputs, transition)
            loss = loss + self.beta * kl
        self.update_is_dead &= inputs["dead"]
        self._log_update(surrogate, kl)
        return loss / self.current_gradient_accumulation_steps

    def _kl(self, model: nn.Module, inputs: dict[str, Any], transition: Transition) -> Tensor:
        """Mean KL divergence of `transition` to that of the model without its adapter, or of the frozen copy."""
        with torch.no_grad():
            if self._reference is None:
                with self.accelerator.unwrap_model(model).disable_adapter():
                    _, reference, _ = self._step_log_prob(model, inputs)
            else:
                if self.args.offload_reference:
                    self._reference.to(self.accelerator.device)
                _, reference, _ = self._step_log_prob(self._reference, inputs)
                if self.args.offload_reference:
                    self._reference.to("cpu")
        return gaussian_kl(transition.mean, reference.mean, transition.std).mean()

    def _step_log_prob(self, model: nn.Module, inputs: dict[str, Any]):
        guidance = self.args.guidance_scale
        embeddings = self._embeddings(inputs["prompts"], self.accelerator.device)
        timesteps = self.sampler.timesteps(inputs["steps"])
        negative = self._negative(guidance)
        prediction = guided_prediction(
            self.policy, model, inputs["latents"], timesteps, embeddings, negative, guidance
        )
        transition = self.sampler.stochastic(inputs["latents"], prediction, inputs["steps"])
        return prediction, transition, self.sampler.log_prob(inputs["next_latents"], transition)

    # Logs

    def _log_update(self, surrogate, kl: Tensor | None) -> None:
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
        mean = all_reduce_sum(torch.stack(list(values.values()))) / self.accelerator.num_processes
        for name, value in zip(values, mean.tolist(), strict=True):
            metrics[name].append(value)

    def _log_scoring(self, scored: list) -> None:
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
            images = numpy_to_pil(to_numpy(torch.cat([r.images for r in rollouts])))
            prompts = gather_list([row["prompt"] for row in inputs])
            self._logs["prompt"].extend(prompts)
            self._logs["completion"].extend(["<image>"] * len(prompts))
            self._logs["images"].extend([[image] for image in gather_list(images)])
            for name, column in zip(self.reward_func_names, rewards.T.tolist(), strict=True):
                self._logs["rewards"][name].extend(column)
            self._logs["advantages"].extend(advantages.tolist())
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

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what a plain diffusers pipeline loads: an adapter, or all weights under `transformer/`.

        Every rank must call it; the main process writes.
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
        if self._ema is not None:
            self._ema.save(output_dir)
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if isinstance(model, PeftModel):
            super()._save(output_dir, state_dict)
            save_diffusers_lora(model, self.policy, output_dir, state_dict)
        elif self._partial_dir is not None:
            super()._save(output_dir, state_dict)  # to resume from
        else:
            save_denoiser(model, Path(output_dir, self.policy.denoiser_name), state_dict)
        for name, state in self._extra_state().items():
            Path(output_dir, name).write_text(json.dumps(state, indent=1))
        if self._partial_dir is None and Path(output_dir) == Path(self.args.output_dir):
            self.create_model_card()  # in place of PEFT's

    def _extra_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside Trainer's own files: file name to JSON content."""
        return {MONITOR_FILE: self._watch.state_dict()} if self.monitor_funcs else {}

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's own, but into a place that no resume looks at, renamed once it is whole."""
        for name, state in self._extra_state().items():
            check_equal(name, state)
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._partial_dir = run / PARTIAL
        try:
            Trainer._save_checkpoint(self, model, trial)
        finally:
            self._partial_dir = None
        wait_for_all()
        with failing_together(f"saving {name}"):
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

    def _get_output_dir(self, trial) -> str:
        return str(self._partial_dir or super()._get_output_dir(trial))
