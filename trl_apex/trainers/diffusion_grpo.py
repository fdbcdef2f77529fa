"""GRPO for text-to-image models. Read "One iteration" and "The update": prompts, rollout, rewards, advantages, loss."""

import copy
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import ProgressCallback as TqdmCallback
from trl import GRPOTrainer

from .. import distributed
from ..aggregation.normalize import group_moments, group_rows
from ..aggregation.options import checked_weights
from ..aggregation.rules import normalize_then_sum, sum_then_normalize, wide_enough
from ..diffusion import losses
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
from ..prompts.datasets import decoded, load_prompts, undecoded
from ..prompts.embeddings import open_embeddings, prepare_embeddings
from ..prompts.sampler import GroupSampler, update_rows, updates_per_pass
from ..redact import redacted
from ..report.figures import reward_grid
from ..rewards.base import wants_whole_groups
from ..rewards.registry import load_rewards
from ..rewards.scoring import RewardFailureRateError, RewardScorer
from . import evaluation
from .adapters import prepare_denoiser, take_adapter
from .callbacks import GradientGuardCallback, IterationCallback, ProgressCallback, RewardHackingWatch
from .checkpoint import save_before_failing
from .config import DiffusionGRPOConfig, refuse
from .detectors import LearningDetectors
from .inputs import (
    Sources,
    as_list,
    check_images,
    check_inputs,
    check_optimizer,
    check_whole,
    image_size,
    image_sizes,
    load_model,
    named_parts,
    submit,
    upgraded,
)
from .logs import (
    COLUMNS,
    ROWS,
    RewardLog,
    log_from_rewards,
    log_rewards,
    log_scoring,
    newest_samples,
    read_updates,
    send_picture,
    shown_pictures,
    sum_counts,
    update_metrics,
)
from .step_size import StepSizeControl
from .trl_seam import RunTrainer
from .weights import ADAPTER_RATE, ANCHOR_FILE, FULL_RATE, CopiesCallback, WeightCopy

logger = logging.getLogger(__name__)


def _loaded(data: Any, split: str) -> Any:
    """A dataset, or a dictionary of them, with names replaced by what they name."""
    if isinstance(data, dict):
        return {name: _loaded(part, split) for name, part in data.items()}
    return load_prompts(data, split) if isinstance(data, str) else data


class DiffusionGRPOTrainer(RunTrainer):
    """Trains the denoiser of a text-to-image pipeline with GRPO.

    One iteration: sample a group of images for each of a few prompts, score them, turn scores into advantages, and make
    denoising steps that led to better images more likely. Constructor, reward functions, logs, checkpoints and
    distributed training are those of `trl.GRPOTrainer`.

    Args:
        model (`str`, `Path` or `diffusers.DiffusionPipeline`): hub id, folder or loaded pipeline; "tiny" for the small one that
            ships with the package.
        reward_funcs (callable or `list`): called with keywords `prompts`, `completions` (PIL images), `images` (float
            tensor `[B, 3, H, W]` in [0, 1], where the signature takes it), every dataset column, `trainer_state`,
            `log_metric` and `log_extra`; return one number, or None, per image. May be async. A string names a built-in
            reward, as in `["ocr", "pickscore", my_function]`.
        args ([`DiffusionGRPOConfig`] or `trl.GRPOConfig`, *optional*): a plain GRPOConfig is upgraded field by field.
        train_dataset (`datasets.Dataset` or `str`): with a `prompt` column, or a name for [`load_prompts`]. A model that edits
            needs `source_image` beside it: PIL images, or paths.
        eval_dataset (`datasets.Dataset`, dict of them or `str`, *optional*): likewise. Without `eval_strategy`, training
            evaluates it at the end.
        processing_class, reward_processing_classes: accepted for compatibility; a pipeline brings its own.
        callbacks, optimizers: as in `transformers.Trainer`.
        quantization_config (*optional*): how the denoiser is quantized when it is loaded: diffusers' `BitsAndBytesConfig`,
            `TorchAoConfig` or another, its dictionary, or a `PipelineQuantizationConfig`. Instead of the field of `args`.
        peft_config (`peft.LoraConfig`, *optional*): train an adapter instead of all weights.
        monitor_funcs (callable or `list`, *optional*): reward functions that evaluation reports and training never sees.
        adapter (`str` or `Path`, *optional*): run folder or hub id of an adapter to go on from. An adapter that is on
            the pipeline already is gone on from likewise. `beta` measures the KL divergence to that start.

    What cannot work is a ValueError before any compute.
    """

    _tag_names = ["trl", "grpo", "diffusers", "text-to-image"]
    _name = "GRPO"
    config_class: type[DiffusionGRPOConfig] = DiffusionGRPOConfig
    args: DiffusionGRPOConfig
    model: nn.Module
    num_generations: int
    train_dataset: Any
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
        adapter=None,
    ):
        if args is None:
            args = self.config_class(output_dir=f"{type(self).__name__}-output")
        self.args = args = copy.copy(upgraded(args, self.config_class))
        self._hub_token, args.hub_token = args.hub_token, None  # every checkpoint holds the arguments
        model = str(model) if isinstance(model, Path) else model
        self.sources = Sources.of(model, train_dataset, eval_dataset, reward_funcs, monitor_funcs)
        train_dataset, eval_dataset = _loaded(train_dataset, "train"), _loaded(eval_dataset, "test")
        reward_funcs, self.monitor_funcs = (load_rewards(as_list(funcs)) for funcs in (reward_funcs, monitor_funcs))
        every_name = check_inputs(args, reward_funcs, self.monitor_funcs, train_dataset, eval_dataset, callbacks)
        names = every_name[: len(reward_funcs)]
        self.reward_func_names, self.reward_weights = names, args.reward_weights
        train_dataset = train_dataset.select(range(len(train_dataset)))  # our own view: Trainer may format it

        with distributed.whole_models():
            self.policy = load_model(model, args, quantization_config)
        args.model_init_kwargs = redacted(args.model_init_kwargs)  # may hold a token as well
        check_whole(self.policy.pipeline)
        evaluated = named_parts(eval_dataset)
        for name, dataset in [("train_dataset", train_dataset), *evaluated]:
            check_images(self.policy, name, dataset)
        sizes = image_sizes(self.policy, train_dataset, "train_dataset", (args.height, args.width))
        sized = [(train_dataset, sizes), *((part, self._eval_sizes(part)) for _, part in evaluated)]
        self._plan_rollout(sizes)
        self._plan_updates(train_dataset, sizes)
        start = take_adapter(self.policy, adapter)
        denoiser, self._reference = prepare_denoiser(self.policy, args, peft_config, start)
        check_optimizer(optimizers[0], denoiser)
        if args.learning_rate is None:
            args.learning_rate = ADAPTER_RATE if isinstance(denoiser, PeftModel) else FULL_RATE
        self.policy.move_frozen(args.device)
        self._conditions = open_embeddings(self.policy, args)
        # Before the denoiser moves to the device: it and the text encoders need not fit there together.
        prepare_embeddings(self._conditions, self.policy, args, sized, own_pipeline=isinstance(model, str))

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
        if self.policy.quantized and self._engine != "ddp":
            raise ValueError(
                f"A quantized base trains on one GPU or with DDP: engines do not shard or cast its weights. Found {self._engine}. "
                "Launch without DeepSpeed and FSDP, or leave out `quantization_config`."
            )
        self._skip_overflows()
        self._set_inherited_attributes(reward_funcs, names)
        self._keep_inputs()
        self._prepare_reference(starts_from_adapter=start is not None)
        self._scorer: RewardScorer | None = None  # while training
        self._iteration_rollout: dict[str, Any] | None = None
        self.eval_records: list[dict[str, Any]] = []
        self._unsent_images = False
        self._unread: list[dict[str, Tensor]] = []  # metrics of micro-batches, still on the device
        self._unscored: set[str] = set()  # what an evaluation has warned of
        self._add_callbacks(names)

    # Set-up

    def _plan_rollout(self, sizes: list[tuple[int, int]]) -> None:
        args, known, name = self.args, self.policy.transitions, type(self.policy.pipeline).__name__
        self.transition = args.transition or known[0]
        refuse([
            (self.transition not in known, self.transition,
             f"`transition` must be one of {known} for {name}", "None picks the first."),
            (args.ratio_guard == "grpo_guard" and self.transition != "flow_sde", self.transition,
             "ratio_guard='grpo_guard' needs transition='flow_sde', whose ratios it normalizes",
             "Use ratio_guard='kl_mask'."),
            (args.flow_matching and "flow_sde" not in known, name,
             f"loss_type={args.loss_type!r} needs a model that predicts a flow's velocity, not one that predicts noise",
             "Use loss_type='grpo'."),
        ])  # fmt: skip
        for size in dict.fromkeys(reversed(sizes)):
            self._use_size(size)
            if args.flow_matching:
                self._levels(range(1), iteration=0)  # raises where the schedule has too few
        self._window(iteration=0)

    def _eval_sizes(self, dataset: Any) -> list[tuple[int, int]]:
        given = self.args.eval_height or self.args.height, self.args.eval_width or self.args.width
        return image_sizes(self.policy, dataset, "eval_dataset", given)

    def _size_of(self, row: dict[str, Any]) -> tuple[int, int]:
        return image_size(row, (self.args.height, self.args.width), self.policy.default_size())

    def _use_size(self, size: tuple[int, int]) -> None:
        """Sample and train images of this size from now on."""
        self.height, self.width = size
        self.latent_shape = self.policy.latent_shape(*size)
        self.sampler = self._sampler_of(self.args.num_inference_steps, size, self.args.rollout_solver)

    def _sampler_of(self, num_steps: int, size: tuple[int, int], solver: str = "euler") -> Sampler:
        return Sampler(self.policy.schedule(num_steps, *size), self.transition, self.args.noise_level, solver)

    def _plan_updates(self, dataset: Any, sizes: list[tuple[int, int]]) -> None:
        args = self.args
        self.updates_per_pass = updates_per_pass(
            args.per_device_train_batch_size * args.steps_per_generation,
            args.rows_per_image,
            args.per_device_train_batch_size,
            args.timestep_batch_size,
            args.gradient_accumulation_steps,
        )
        self.updates_per_iteration = self.updates_per_pass * args.num_iterations
        self.steps_per_iteration = self.updates_per_iteration * args.gradient_accumulation_steps
        group, repeats, rate = args.num_generations, self.steps_per_iteration, args.dead_prompt_rate
        groups = args.generation_batch_size // group
        mix: Any = args.prompt_mix  # a dictionary by now
        kinds = None if mix is None else dataset[args.prompt_mix_column][:]
        mixed_sizes = sizes if len(set(sizes)) > 1 else None
        self._prompts = GroupSampler(
            len(dataset), groups, group, repeats, args.shuffle_dataset, args.seed, kinds, mix, mixed_sizes, rate
        )

    def _get_train_sampler(self, dataset=None) -> GroupSampler:
        return self._prompts

    def get_train_dataloader(self) -> Any:
        """Trainer's own, of rows whose images are not decoded: it draws them for every micro-batch of an iteration."""
        dataset, self.train_dataset = self.train_dataset, undecoded(self.train_dataset)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def _add_callbacks(self, names: list[str]) -> None:
        args = self.args
        if self.pop_callback(TqdmCallback) is not None:  # not with `disable_tqdm`, nor in a notebook
            self.add_callback(ProgressCallback(names))
        self._watch = RewardHackingWatch(len(names))
        self._detectors, self._guard = LearningDetectors(self), GradientGuardCallback(self)
        average = None  # of the weights after the first steps; their start does not count
        if args.ema_decay is not None:
            average = losses.Decay(args.ema_update_steps, 1.0, args.ema_decay)
        self._ema = WeightCopy(self, average, args.ema_update_steps)
        self._anchor = WeightCopy(self, args.anchor, self.updates_per_iteration, ANCHOR_FILE, args.offload_reference)
        self._copies = [self._ema, self._anchor]
        for callback in (IterationCallback(self), self._detectors, self._guard, CopiesCallback(self, self._copies)):
            self.add_callback(callback)
        self._step_size = StepSizeControl(self, args.target_movement) if args.target_movement else None
        if self._step_size is not None:
            self.add_callback(self._step_size)

    def _stateful(self) -> dict[str, Any]:
        """What a checkpoint keeps in `apex_state.json`: objects with `state_dict` and `load_state_dict`, by name."""
        objects: dict[str, Any] = {"monitor": self._watch, "detectors": self._detectors}
        if self._step_size is not None:
            objects["step_size"] = self._step_size
        if self.args.dead_prompt_rate < 1:
            objects["prompts"] = self._prompts
        return objects

    # One iteration

    @property
    def _iteration(self) -> int:
        return self._step // self.steps_per_iteration

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """The rows of the next micro-batch, after a new rollout where an iteration begins."""
        if isinstance(generation_batch, dict):  # prepared already
            return generation_batch
        position = self._step % self.steps_per_iteration
        if position == 0 or self._iteration_rollout is None:
            if position:
                update = position // self.args.gradient_accumulation_steps
                logger.warning(
                    f"The checkpoint lies inside an iteration: update {update} of {self.updates_per_iteration}. Its rollout "
                    "is gone, so the rest of the iteration trains on a fresh one."
                )
            self._iteration_rollout = self._generate_and_score_completions(generation_batch)
            if self._step_size is not None:
                self._step_size.see_rollout(self._iteration_rollout)
        return self._micro_batch(self._iteration_rollout, position)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Rollout, rewards and advantages of this rank's share of one iteration."""
        started = time.perf_counter()
        inputs = [decoded(row, self.train_dataset.features) for row in inputs]
        device, metrics = self.accelerator.device, self._metrics["train"]
        chunk = self.args.rollout_batch_size or len(inputs)
        first = self.accelerator.process_index * len(inputs)
        prompts = [row["prompt"] for row in inputs]
        self._use_size(self._size_of(inputs[0]))  # that of the whole iteration
        rollouts, pending, logs = [], [], []
        compared = any(map(wants_whole_groups, self.reward_funcs))  # within groups, so after the rollout
        self._detectors.note_weights()
        policy = self._anchor.applied() if self.args.loss_type == "nft" else nullcontext()
        with policy, self._rollout_weights(), self._failing_together_unless_sharded("the rollout"):
            self._detectors.probe_velocity()
            keys = self._conditions.keys(inputs, [(self.height, self.width)] * len(inputs))
            embeddings, prompt_of = self._conditions.distinct(keys)
            for start in range(0, len(inputs), chunk):
                rows = slice(start, start + chunk)
                own = {name: value[prompt_of[rows]] for name, value in embeddings.items()}
                numbers = list(range(first + start, first + start + len(inputs[rows])))
                rollouts.append(self._rollout(own, numbers))
                if self.args.reward_overlap and not compared:
                    logs.append(RewardLog(numbers))
                    pending.append(self._submit(self._scorer, inputs[rows], rollouts[-1].images, log=logs[-1]))
        sampled = time.perf_counter()
        mine, numbers = inputs, list(range(first, first + len(inputs)))
        if not pending:
            images = torch.cat([r.images for r in rollouts])
        dealt = compared and len(inputs) % self.num_generations > 0  # ranks share a group
        if dealt:
            mine, numbers, images = distributed.deal_groups(inputs, images, self.num_generations)
        try:
            with distributed.failing_together("the rewards"):
                if mine and not pending:
                    groups = [number // self.num_generations for number in numbers]
                    logs = [RewardLog(numbers)]
                    pending = [self._submit(self._scorer, mine, images, group_ids=groups, log=logs[0])]
                scored = [future.result() for future in pending]
        except Exception:
            save_before_failing(self)
            raise
        metrics["time/rollout"].append(sampled - started)
        metrics["time/rewards_wait"].append(time.perf_counter() - sampled)
        self._stop_if_rewards_fail(*log_scoring(scored, self.reward_func_names, metrics, device))

        own_rewards = torch.cat([torch.empty(0, len(self.reward_funcs)), *(s.rewards for s in scored)])
        if dealt:
            rewards = distributed.collect_dealt(numbers, own_rewards)
        else:
            rewards = distributed.gather_rows(own_rewards.to(device)).cpu()
        if self.args.offload_rewards and self._scorer:  # every rank has its rewards by now
            self._scorer.offload()
        group_ids = torch.arange(len(rewards)) // self.num_generations
        advantages, normalized = self._compute_advantages(rewards, group_ids)
        if self.args.dead_prompt_rate < 1:
            moments = group_moments(rewards.double(), rewards.isfinite(), group_rows(group_ids))
            self._prompts.see(self._iteration, moments.dead.all(1), (moments.count > 1).any(1))
            metrics["dead_prompts"].append(len(self._prompts.dead) / self._prompts.num_prompts)
        self._log_rollout(rewards, advantages, prompts, rollouts)
        log_from_rewards(logs, metrics, self._logs["extra"], len(rewards))
        self._detectors.see_rollout(rollouts, rewards, advantages)
        here = distributed.local_slice(len(inputs), self.accelerator.process_index)
        result = {
            "advantages": advantages[here].to(device, torch.float32),
            "normalized": normalized[here].to(device, torch.float32),
            "embeddings": embeddings,
            "prompt_of": prompt_of,
            "prompts": prompts,
            "dead": bool((advantages == 0).all()),
            "live": (advantages[here] != 0).cpu(),
        }
        result |= self._levels_of(rollouts, first) if self.args.flow_matching else self._steps_of(rollouts)
        return result | self._predictions_before_updates(result)

    # Rollout

    def _rollout(self, embeddings: Embeddings, samples: Sequence[int]) -> Rollout:
        """Images of some of this rank's samples; noise is keyed by the sample, so that it is the same on any rank."""
        args, group, shape = self.args, self.num_generations, self.latent_shape
        window = self._window(self._iteration)
        starts = [i // group for i in samples] if args.share_initial_noise else samples
        initial = keyed_noise(self._keys(INITIAL_NOISE, starts), shape)
        noise = keyed_noise(self._keys(STEP_NOISE, samples), (len(window), *shape))
        representative = None
        if args.share_initial_noise:
            first_of_group = [samples.index(max(i // group * group, samples[0])) for i in samples]
            representative = torch.tensor(first_of_group, device=self.accelerator.device)
        return self._sample(embeddings, initial, self.sampler, args.guidance_scale, window, noise, representative)

    def _keys(self, purpose: int, numbers: Sequence[int]) -> list[tuple[int, ...]]:
        return [(self.args.seed, purpose, self._iteration, i) for i in numbers]

    def _window(self, iteration: int) -> range:
        """The stochastic steps of an iteration; none where the loss needs final latents alone."""
        args = self.args
        if args.flow_matching:
            return range(0)
        steps, size, where = args.num_inference_steps, args.sde_window_size, args.sde_window_range
        return sde_window(steps, size, where, args.seed, iteration)

    def _sample(
        self, embeddings, initial, sampler, guidance_scale, window=range(0), noise=None, representative=None
    ) -> Rollout:
        model, negative = self._rollout_model(), self._conditions.negative(guidance_scale)
        return sample(
            self.policy, model, sampler, embeddings, negative, guidance_scale, initial, window, noise, representative,
            keep_means=self.args.ratio_guard is not None,
        )  # fmt: skip

    # Rewards

    def _open_scorer(self, funcs: list, names: list[str]) -> RewardScorer:
        """Scoring in the background, once every reward is known to work and has loaded its weights."""
        scorer = RewardScorer(funcs, names, timeout=self.args.reward_timeout)
        with distributed.failing_together("the check of the rewards"), distributed.whole_models():
            scorer.check()
        return scorer

    def _submit(
        self, scorer: Any, rows: list, images: Tensor, completions: list | None = None, log: RewardLog | None = None,
        **keywords: Any,
    ):  # fmt: skip
        """Score images in the background, with all that TRL gives to rewards; returns a future of a `ScoredBatch`.

        What the rewards log goes to `log`, and is dropped without one.
        """
        log = log or RewardLog()
        state = copy.copy(self.state)  # what a reward changes in it is not the run's
        state.log_history = list(state.log_history)
        return submit(
            scorer, rows, images, completions, **keywords,
            trainer_state=state, log_metric=log.log_metric, log_extra=log.log_extra,
        )  # fmt: skip

    def _stop_if_rewards_fail(self, failures: dict[str, int], samples: int) -> None:
        limit = self.args.max_reward_failure_rate
        for name, count in failures.items():  # of all ranks, so that they stop together
            if count > limit * samples:
                self.request_stop(
                    f"reward {name!r} failed for {count} of {samples} images, more than max_reward_failure_rate={limit}. "
                    "The warnings above tell why; raise the limit to go on without it.",
                    RewardFailureRateError,
                )

    # Advantages

    @property
    def reward_weights(self) -> Tensor:
        """The user's weight of each reward, float64 `[K]`. A callback may set them, as numbers; 1 each for None."""
        return self._reward_weights

    @reward_weights.setter
    def reward_weights(self, weights: Any) -> None:
        self._reward_weights = checked_weights(self.reward_func_names, weights, self.args.multi_objective_aggregation)

    def _compute_advantages(self, rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Turn gathered rewards `[B, K]` into advantages `[B]`, and the normalized scores of each objective `[B, K]`.

        All on the CPU: some accelerators have no float64. `APEXTrainer` has its aggregator here.
        """
        self._detectors.see_rewards(rewards)
        rewards = wide_enough(rewards)
        weights, groups = self.reward_weights.to(rewards), group_rows(group_ids)
        if self.args.multi_objective_aggregation == "normalize_then_sum":
            scores, advantages = normalize_then_sum(rewards, weights, groups)
        else:
            scores, advantages = sum_then_normalize(rewards, weights, groups, self.args.scale_rewards)
        return advantages, scores

    # Rows: what an update trains on. B samples, each at N places: steps of the window, or noise levels

    def _steps_of(self, rollouts: list[Rollout]) -> dict[str, Any]:
        """For 'grpo': latents `[B, N + 1, C, H, W]`, log-probabilities `[B, N]` and, for a guard, means of stochastic steps."""
        paths = [r.trajectory for r in rollouts]
        found: dict[str, Any] = {
            "latents": torch.cat([path.latents for path in paths]),
            "old": torch.cat([path.log_prob for path in paths]),
            "window": paths[0].steps,
        }
        if paths[0].means is not None:
            found["old_mean"] = torch.cat([path.means for path in paths if path.means is not None])
        return found

    def _levels_of(self, rollouts: list[Rollout], first_sample: int) -> dict[str, Any]:
        """For the other losses: final latents `[B, C, H, W]`, noise levels `[B, N]`, fresh noise `[B, N, C, H, W]`."""
        clean = torch.cat([r.latents for r in rollouts])
        samples = range(first_sample, first_sample + len(clean))
        levels = self._levels(samples, self._iteration)
        noise = keyed_noise(self._keys(ROW_NOISE, samples), (levels.shape[1], *self.latent_shape))
        return {"clean": clean, "levels": levels.to(clean.device), "noise": noise.to(clean.device), "window": range(0)}

    def _levels(self, samples: range, iteration: int) -> Tensor:
        """Noise levels `[B, N]` that these samples of an iteration are trained on."""
        args = self.args
        assert args.timesteps_per_image is not None
        drawn = [
            losses.training_sigmas(
                args.timestep_sampling, self.sampler.schedule.sigmas, (1, args.timesteps_per_image),
                keyed_generator(args.seed, ROW_LEVEL, iteration, i), args.timestep_shift, *args.timestep_range,
            )
            for i in samples
        ]  # fmt: skip
        return torch.cat(drawn)

    def _rows(self, rollout: dict[str, Any], pairs: Tensor) -> dict[str, Any]:
        """The rows of these pairs `[R, 2]` of sample and place: inputs of a forward, and earlier predictions for them."""
        sample, place = pairs.to(self.accelerator.device).unbind(1)
        embeddings = {name: value[rollout["prompt_of"][sample]] for name, value in rollout["embeddings"].items()}
        steps = pairs[:, 1] + rollout["window"].start  # on the CPU, where the schedule is
        rows = {"embeddings": embeddings, "steps": steps}
        if self.args.flow_matching:
            clean, noise = rollout["clean"][sample], rollout["noise"][sample, place]
            sigmas = rollout["levels"][sample, place]
            rows |= {
                "latents": losses.add_noise(clean, noise, sigmas),
                "clean": clean,
                "target": noise - clean,
                "sigmas": sigmas,
            }
            rows["timesteps"] = 1000 * sigmas  # a flow's convention, whatever the family then divides by
        else:
            rows |= {
                "latents": rollout["latents"][sample, place],
                "next_latents": rollout["latents"][sample, place + 1],
            }
            rows["timesteps"] = self.sampler.timesteps(steps).to(place.device)
        known = ("old", "old_mean", "anchor", "reference")
        return rows | {name: rollout[name][sample, place] for name in known if name in rollout}

    @torch.no_grad()
    def _predictions_before_updates(self, rollout: dict[str, Any]) -> dict[str, Tensor]:
        """Predictions for every row before the first update: of the policy that sampled, the slow and the frozen copy.

        `old` `[B, N]` is the likelihood of each row under the policy that sampled, for 'awm' and 'fpo'. `anchor`
        `[B, N, C, H, W]` is the velocity that the slow copy predicts, for 'nft' and 'awm'. Neither is needed where it is
        what the first and only update predicts. `reference` `[B, N, C, H, W]` is the prediction of the frozen copy.
        """
        args, found = self.args, {}
        pairs = torch.cartesian_prod(torch.arange(len(rollout["prompts"])), torch.arange(args.rows_per_image))

        def every_row(model: nn.Module, what: Callable[..., Tensor] | None = None) -> Tensor:
            return self._predict_rows(model, rollout, pairs, what).unflatten(0, (-1, args.rows_per_image))

        several = self.updates_per_iteration > 1
        if args.loss_type in ("awm", "fpo") and several:
            with self._rollout_weights():
                found["old"] = every_row(self._rollout_model(), self._log_prob)
        if args.anchored and (several or args.anchor is not None):
            with self._anchor.applied(), self._rollout_weights():
                found["anchor"] = every_row(self._rollout_model())
        if self._reference is not None:
            with self._reference_on_device() as reference:
                found["reference"] = every_row(reference)
        return found

    @torch.no_grad()
    def _predict_rows(
        self, model: nn.Module, rollout: dict[str, Any], pairs: Tensor, what: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Predictions for these pairs `[R, 2]`, or `what` of them, in eval mode and as many at a time as in an update."""
        was_training, kept = model.training, []
        model.eval()
        for chunk in pairs.split(self.args.per_device_train_batch_size * self.args.timestep_batch_size):
            rows = self._rows(rollout, chunk)
            prediction = self._predict(model, rows)
            kept.append(prediction if what is None else what(prediction, rows))
        model.train(was_training)
        return torch.cat(kept)

    # The update

    def _micro_batch(self, rollout: dict[str, Any], position: int) -> dict[str, Any]:
        """The rows of one training step of an iteration, in an order that each pass draws anew."""
        args, samples = self.args, len(rollout["prompts"])
        pass_number, step = divmod(position, self.updates_per_pass * args.gradient_accumulation_steps)
        update, micro = divmod(step, args.gradient_accumulation_steps)
        first = self.accelerator.process_index * samples
        if step == 0 or "update_rows" not in rollout:  # once a pass
            key = (args.seed, ROW_ORDER, self._iteration, pass_number)
            rollout["update_rows"] = update_rows(samples, args.rows_per_image, self.updates_per_pass, first, key)
        count = args.per_device_train_batch_size * args.timestep_batch_size
        pairs = rollout["update_rows"][update][micro * count : (micro + 1) * count]
        self._metrics["train"]["dead_step_rate"].append(float(not rollout["live"][pairs[:, 0]].any()))
        sample = pairs[:, 0].to(self.accelerator.device)
        return {
            **self._rows(rollout, pairs),
            "advantages": rollout["advantages"][sample],
            "normalized": rollout["normalized"][sample],
            "samples": sample + first,
            "dead": rollout["dead"],
            "first_update": pass_number == 0 and update == 0,
        }

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """DeepSpeed steps inside the backward, so that an update without a signal is left out here as well."""
        if not self.is_deepspeed_enabled:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        self._guard.update_is_dead = inputs["dead"] and self.args.skip_dead_updates and self.beta == 0
        if not self._guard.update_is_dead:
            return super().training_step(model, inputs, num_items_in_batch)
        self.model_wrapped._global_grad_norm = 0.0  # is logged, and would be that of the last update
        self._step += 1
        return torch.zeros((), device=self.accelerator.device)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The surrogate loss of one micro-batch, plus the weighted distances to the reference and the slow copy."""
        prediction = self._predict(model, inputs)
        surrogate = self._surrogate(prediction, inputs)
        distances = self._distances(model, prediction, inputs)
        weights = {"kl": self.beta, "trust_region": self.args.awm_trust_region}
        loss = surrogate.loss.mean() + sum(weights[name] * distance for name, distance in distances.items())
        self._guard.update_is_dead &= inputs["dead"]
        if inputs["first_update"]:
            self._detectors.watch_ratio(surrogate.ratio)
        self._unread.append(update_metrics(surrogate, distances))
        self._guard.remember(surrogate.ratio, inputs)
        return loss / self.current_gradient_accumulation_steps

    def _predict(self, model: nn.Module, rows: dict[str, Any]) -> Tensor:
        """The model's prediction `[R, C, H, W]` for rows, with the rollout's guidance."""
        guidance: Any = self.args.guidance_scale  # a number by now
        negative = self._conditions.negative(guidance)
        return guided_prediction(
            self.policy, model, rows["latents"], rows["timesteps"], rows["embeddings"], negative, guidance
        )

    def _surrogate(self, prediction: Tensor, rows: dict[str, Any]) -> losses.Surrogate:
        """What `loss_type` minimizes, row by row."""
        args, advantages = self.args, rows["advantages"]
        if args.loss_type == "nft":
            old = rows.get("anchor", prediction.detach())
            loss = losses.nft_loss(
                prediction, old, rows["latents"], rows["clean"], rows["sigmas"], advantages, args.nft_beta
            )
            never = torch.zeros_like(loss, dtype=torch.bool)
            return losses.Surrogate(loss, 1 + 0 * loss.detach(), never, never)  # nothing to clip; NaN stays NaN
        if args.loss_type == "awm":
            advantages = advantages.clamp(-5, 5) / 5 * args.advantage_max
        clip = self.epsilon_low, self.epsilon_high, args.delta
        if args.ratio_guard == "grpo_guard":
            mean, std = self.sampler.stochastic(rows["latents"], prediction, rows["steps"])
            length = self.sampler.step_lengths(rows["steps"]).to(advantages)
            drawn = rows["next_latents"]
            return losses.grpo_guard_surrogate(mean, rows["old_mean"], drawn, std, length, advantages, *clip)
        log_prob = self._log_prob(prediction, rows)
        old = rows.get("old", log_prob.detach())
        if args.ratio_guard == "kl_mask":
            mean, std = self.sampler.stochastic(rows["latents"], prediction, rows["steps"])
            kl = losses.gaussian_kl(mean, rows["old_mean"], std)
            return losses.kl_masked_surrogate(log_prob, old, advantages, kl, args.kl_mask_threshold)
        return losses.clipped_surrogate(log_prob, old, advantages, *clip)

    def _log_prob(self, prediction: Tensor, rows: dict[str, Any]) -> Tensor:
        """Log-probability `[R]` of a denoising step, or what stands for it: the likelihood at a noise level."""
        args = self.args
        if args.loss_type == "awm":
            return losses.awm_log_likelihood(prediction, rows["target"], rows["sigmas"], args.awm_weighting)
        if args.loss_type == "fpo":
            return losses.fpo_log_likelihood(prediction, rows["target"], args.fpo_scale)
        transition = self.sampler.stochastic(rows["latents"], prediction, rows["steps"])
        return self.sampler.log_prob(rows["next_latents"], transition)

    def _distances(self, model: nn.Module, prediction: Tensor, rows: dict[str, Any]) -> dict[str, Tensor]:
        """Mean distances that the loss keeps small: `kl` to the reference, and for 'awm' `trust_region` to the slow copy."""
        found = {}
        if self.beta > 0:
            found["kl"] = self._distance(model, prediction, rows)
        if self.args.loss_type == "awm" and "anchor" in rows:
            found["trust_region"] = losses.squared_error(prediction, rows["anchor"]).mean()
        return found

    def _distance(self, model: nn.Module, prediction: Tensor, rows: dict[str, Any]) -> Tensor:
        """Mean distance to the model without its adapter, or to the frozen start: KL divergence, or squared velocity."""
        reference = rows.get("reference")
        if reference is None:
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                reference = self._predict(model, rows)
        if self.args.flow_matching:
            return (prediction - reference).square().mean()
        own, other = (self.sampler.stochastic(rows["latents"], p, rows["steps"]) for p in (prediction, reference))
        return losses.gaussian_kl(own.mean, other.mean, own.std).mean()

    # Evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Sample one image per evaluation prompt, without noise on the way, and average every reward.

        Deterministic: `eval_num_inference_steps` ODE steps from noise keyed by the prompt's row, with the averaged
        weights where there are any. Each row counts once on any number of processes.

        Args:
            eval_dataset (`datasets.Dataset` or dict of them, or `str`, *optional*): instead of the trainer's own, or the
                name of one of these.

        Returns:
            `dict`: `{prefix}_rewards/{name}/mean` and `/se` (standard error over prompts) of each reward and monitored
            function, `{prefix}_reward`, the weighted sum of means, and `{prefix}_reward_std`, the standard deviation of
            the weighted sum over prompts. A mean of which no prompt has a score is left out; these two as well, where the
            reward failed or an earlier evaluation had its mean. `eval_records` keeps row, prompt and scores of every
            prompt, and on the main process the images of its first 64 (`"image"` is None elsewhere).
        """
        return evaluation.evaluate(self, eval_dataset, metric_key_prefix)

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's own, and with `log_completions` a table and a picture of each iteration's images with their rewards."""
        read_updates(self._unread, self._metrics["train"])
        sum_counts(self._metrics["train"])
        wanted = self.log_completions
        self.log_completions = wanted and self._unsent_images
        super().log(logs, start_time)
        self.log_completions = wanted
        if self._unsent_images:
            self._unsent_images = False
            samples = newest_samples(self._logs, self.reward_func_names)
            self._send_samples("images/rollout", samples, min(self.num_generations, COLUMNS))

    def _send_samples(self, name: str, samples: list[dict[str, Any]], columns: int = COLUMNS) -> None:
        """Log a grid of samples (prompt, image, rewards) with the trackers of `report_to`."""
        if self.accelerator.is_main_process:
            picture = reward_grid(samples[: columns * ROWS], columns)
            send_picture(self.callback_handler.callbacks, name, picture, self.state.global_step)

    def _log_rollout(self, rewards: Tensor, advantages: Tensor, prompts: list[str], rollouts: list[Rollout]) -> None:
        names, metrics = self.reward_func_names, self._metrics["train"]
        log_rewards(rewards, names, self.reward_weights, self.num_generations, metrics)
        if self.log_completions:
            prompts, size = distributed.gather_list(prompts), len(rewards)
            pictures: list[list[Any]] = [[]] * size
            if self.accelerator.is_main_process:  # pictures are not gathered
                pictures = shown_pictures(torch.cat([r.images for r in rollouts]), self.num_generations, size)
            columns: dict[str, list] = {"prompt": prompts, "completion": ["<image>"] * size, "images": pictures}
            for column, values in (columns | {"advantages": advantages.tolist()}).items():
                self._logs[column].extend(values)
            for name, scores in zip(names, rewards.double().T.tolist(), strict=True):
                self._logs["rewards"][name].extend(scores)
            self._unsent_images = True
