"""The configurations of the three trainers."""

import argparse
import dataclasses
import functools
import inspect
import json
import logging
import math
import os
import reprlib
import typing
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.dataclasses import type_validator
from transformers import SchedulerType
from trl import GRPOConfig

from ..aggregation.options import AGGREGATION_OPTIONS, ApexOptions, did_you_mean
from ..aggregation.rules import GRADIENT_RULES, RULES
from ..diffusion.losses import AWM_DECAY, GUARDS, NFT_DECAY, SHIFTED, TIMESTEP_SAMPLING, WEIGHTINGS, Decay
from ..diffusion.schedule import SOLVERS, TRANSITIONS

logger = logging.getLogger(__name__)

STATIC_RULES = ("sum_then_normalize", "normalize_then_sum")

# Inherited fields that have an effect. Those that are in neither list must stay at their default.
HONOURED_FIELDS = frozenset(
    """
    output_dir seed full_determinism use_cpu tf32 bf16 fp16 debug skip_memory_metrics torch_empty_cache_steps
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_train_epochs max_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args optim_target_modules weight_decay
    adam_beta1 adam_beta2 adam_epsilon max_grad_norm activation_checkpointing gradient_checkpointing
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica
    disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay eval_on_start load_best_model_at_end metric_for_best_model greater_is_better
    save_strategy save_steps save_total_limit save_only_model ignore_data_skip
    restore_callback_states_from_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    accelerator_config parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order
    model_init_kwargs disable_dropout num_generations generation_batch_size steps_per_generation
    num_iterations beta epsilon epsilon_high delta loss_type reward_weights multi_objective_aggregation scale_rewards
    shuffle_dataset log_completions num_completions_to_print log_unique_prompts
    """.split()  # noqa: SIM905
)
# Inherited fields without an effect that launchers and scripts set, or whose values mean the same here.
HARMLESS_FIELDS = frozenset(
    """
    local_rank do_train do_eval do_predict resume_from_checkpoint dataloader_drop_last average_tokens_across_devices
    activation_checkpointing_kwargs gradient_checkpointing_kwargs
    """.split()  # noqa: SIM905
)
REFUSED_FIELDS = frozenset(f.name for f in dataclasses.fields(GRPOConfig)) - HONOURED_FIELDS - HARMLESS_FIELDS
# Of refused fields: why, and what to do instead.
NO_MEANING = ("it has no meaning for a text-to-image model", "Leave it out.")
REASONS = {
    "enable_jit_checkpoint": (
        "it saves inside an iteration, and training would go on",
        "Leave it out: on SIGTERM `trl-apex train` saves and stops at the end of the iteration; a script can call the trainer's "
        "`request_stop`.",
    ),
    "ds3_gather_for_generation": ("it is about language models", "Use `gather_for_rollout`."),
    "data_seed": ("it has no effect", "Use `seed`."),
    "train_sampling_strategy": ("it has no effect", "Use `shuffle_dataset`."),
    "trust_remote_code": ("it has no effect", "Load the pipeline yourself and pass it as `model`."),
    "bf16_full_eval": ("evaluation computes as training does", "Use `bf16`."),
    "fp16_full_eval": ("evaluation computes as training does", "Use `fp16`."),
    "num_generations_eval": ("evaluation makes one image per prompt", "Leave it out."),
    "remove_unused_columns": ("the dataset's columns are passed to the rewards", "Leave it out."),
    "torch_compile": (
        "it would compile the update alone, and the importance ratio would not start at 1",
        "Use compile_denoiser=True, which compiles rollout and update alike.",
    ),
    "save_on_each_node": (
        "checkpoints are written once, to a disk that all nodes see",
        "Leave it out, and put `output_dir` on a shared disk.",
    ),
}

# What None means for each loss. The flow-matching losses are published without guidance.
LOSS_DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo": {"guidance_scale": 4.5, "epsilon": 1e-4},
    "awm": {"guidance_scale": 1.0, "epsilon": 1.0, "timesteps_per_image": 6, "anchor_decay": list(AWM_DECAY)},
    "nft": {"guidance_scale": 1.0, "epsilon": 1e-4, "timesteps_per_image": 4, "anchor_decay": list(NFT_DECAY)},
    "fpo": {"guidance_scale": 1.0, "epsilon": 0.01, "timesteps_per_image": 4},
}
CHOICES: dict[str, tuple[str | None, ...]] = {
    "loss_type": tuple(LOSS_DEFAULTS),
    "transition": (*TRANSITIONS, None),
    "rollout_solver": SOLVERS,
    "ratio_guard": (*GUARDS, None),
    "timestep_sampling": TIMESTEP_SAMPLING,
    "awm_weighting": WEIGHTINGS,
    "lr_scheduler_type": tuple(kind.value for kind in SchedulerType),
}
# Inherited fields whose types are checked here as well.
TYPED_FIELDS = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "generation_batch_size", "steps_per_generation",
    "num_generations", "num_iterations", "max_steps", "seed", "beta", "delta", "epsilon_high", "max_grad_norm",
    "reward_weights", "save_total_limit", "logging_steps", "save_steps",
}  # fmt: skip
MAY_BE_INFINITE = {"delta", "max_grad_norm", "reward_weights", "target_movement"}
WHOLE_TOO: dict[Any, Any] = {
    float: float | int,
    float | None: float | int | None,
    list[float]: list[float | int],
    list[float] | None: list[float | int] | None,
}
POSITIVE = (
    "noise_level", "timestep_shift", "advantage_max", "fpo_scale", "nft_beta", "kl_mask_threshold", "target_movement",
    "reward_timeout", "dead_prompt_rate",
)  # fmt: skip
LEAST = {
    **dict.fromkeys((
        "per_device_train_batch_size", "per_device_eval_batch_size", "generation_batch_size", "steps_per_generation",
        "num_iterations", "gradient_accumulation_steps", "num_inference_steps", "eval_num_inference_steps", "height",
        "width", "eval_height", "eval_width", "max_sequence_length", "sde_window_size", "timesteps_per_image",
        "timestep_batch_size", "rollout_batch_size", "ema_update_steps", "max_nonfinite_updates",
    ), 1),
    **dict.fromkeys((
        "learning_rate", "weight_decay", "adam_epsilon", "epsilon", "beta", "guidance_scale", "eval_guidance_scale",
        "awm_trust_region",
    ), 0),
}  # fmt: skip


Refusal = tuple[Any, Any, str, str]
"""What is wrong if it is true, what was found, what must hold, what to do."""


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def refuse(rows: list[Refusal]) -> None:
    """Raise for the first row that is wrong."""
    for wrong, found, rule, remedy in rows:
        if wrong:
            raise ValueError(f"{rule}. Found {found!r}. {remedy}")


def naming_the_nearest(config_class: Any) -> Any:
    """Give a configuration's constructor an error that names the nearest field for one that does not exist."""
    init = config_class.__init__
    known = [f.name for f in dataclasses.fields(config_class) if f.init]

    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{config_class.__name__} has no field {name!r}. {did_you_mean(name, known)}"
                    "`trl-apex train --help-all` lists all."
                )
        init(self, *args, **kwargs)

    config_class.__init__ = __init__
    return config_class


@naming_the_nearest
@dataclass
class DiffusionGRPOConfig(GRPOConfig):
    """`trl.GRPOConfig` for text-to-image models.

    TRL's fields keep their meaning where a denoiser has one. `num_generations` images are sampled for each of
    `generation_batch_size / num_generations` prompts; each image contributes one row per trained denoising step, and one
    training step is a forward and a backward over `per_device_train_batch_size * timestep_batch_size` rows. Fields that
    have no meaning for a denoiser must stay at their default. `docs/trainer.md` lists the defaults that differ from TRL's.

    Raises:
        ValueError: for a batch that holds no whole groups, a window that does not fit, a field without a meaning here.
    """

    gradient_accumulation_steps: int = _field(1, "Micro-batches of an update; `updates_per_iteration` may set it.")
    learning_rate: float | None = _field(  # type: ignore[assignment]
        None, "Initial learning rate of AdamW. None: 3e-4 for an adapter, 1e-5 for all weights."
    )
    adam_epsilon: float = _field(1e-15, "AdamW's epsilon; 1e-8 would swallow gradients of this size.")
    weight_decay: float = _field(1e-4, "Weight decay of AdamW.")
    lr_scheduler_type: str = _field("constant", "Learning rate schedule.")
    epsilon: float | None = _field(
        None,
        "Clip range of the importance ratio. None: 1e-4 for 'grpo' (2e-6 with ratio_guard='grpo_guard'), 1 for 'awm', 0.01 "
        "for 'fpo'. With ratio_guard='kl_mask', which clips no ratio, only the measure of a warning.",
    )
    bf16: bool | None = _field(None, "bfloat16 autocast. None: on, but for `fp16`, `use_cpu` or no accelerator.")
    gradient_checkpointing: bool | None = _field(
        None, "Recompute activations in the backward pass. None: yes, unless `fsdp_config` says that FSDP does."
    )
    activation_checkpointing: bool | None = _field(None, "Newer name of `gradient_checkpointing`; goes first.")
    ddp_find_unused_parameters: bool | None = _field(False, "As in TrainingArguments; all adapter weights are used.")
    report_to: None | str | list[str] = _field("none", "Where to log, as in TrainingArguments.")
    remove_unused_columns: bool | None = _field(False, "Must be False: rewards are given the dataset's columns.")

    num_generations_eval: int | None = _field(1, "Must be 1: evaluation makes one image per prompt.")
    height: int | None = _field(
        None, "Image height in pixels. None: the column `height`, else 512 for flow models, else the model's own."
    )
    width: int | None = _field(
        None, "Image width in pixels. None: the column `width`, else 512 for flow models, else the model's own."
    )
    num_inference_steps: int = _field(10, "Denoising steps of a rollout.")
    loss_type: str = _field(
        "grpo",
        "What an update minimizes. 'grpo': the clipped ratio of stochastic denoising steps. 'awm' (Advantage Weighted "
        "Matching), 'nft' (DiffusionNFT), 'fpo' (ratio of flow-matching losses): from the final latents alone.",
    )
    guidance_scale: float | None = _field(
        None, "Classifier-free guidance of rollout and update; 1 for none. None: 4.5 for 'grpo'; other losses need 1."
    )
    timesteps_per_image: int | None = _field(
        None, "'awm', 'nft', 'fpo': noise levels that each image is trained on. None: 6, 4 and 4."
    )
    timestep_sampling: str = _field(
        "grid", "'awm', 'nft', 'fpo': where noise levels come from: " + ", ".join(TIMESTEP_SAMPLING) + "."
    )
    timestep_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "'awm', 'nft', 'fpo': lowest and highest noise level that is trained."},
    )
    timestep_shift: float = _field(3.0, "Shift of 'uniform' and 'logit_normal' levels towards noise; 1 for none.")
    awm_weighting: str = _field("ghuber", "'awm': likelihood of a squared error: " + ", ".join(WEIGHTINGS) + ".")
    advantage_max: float = _field(1.0, "'awm': advantages, clipped to +-5, are scaled to at most this.")
    fpo_scale: float = _field(10.0, "'fpo': how much a change of the loss changes the ratio.")
    nft_beta: float = _field(1.0, "'nft': how far its two branches lie from the policy that sampled.")
    anchor_decay: list[float] | None = _field(
        None,
        "'nft', 'awm': decay of the slow copy of the weights that 'nft' samples with and 'awm' stays close to: 0 for so many "
        "updates, then this much more each update, up to this. None: 0, 0.001, 0.5 for 'nft' and 0, 0.001, 0.3 for 'awm'. "
        "0 0 0: no slow copy, but the weights at the start of the iteration.",
    )
    awm_trust_region: float = _field(1.0, "'awm': weight of the mean squared distance to the slow copy; 0 for none.")
    negative_prompt: str = _field("", "Prompt of the unconditional branch.")
    max_sequence_length: int = _field(256, "Tokens of the longest text encoder.")
    prompt_cache_dir: str | None = _field(None, "Folder that keeps prompt embeddings for later runs. None: in memory.")
    precompute_prompts: bool = _field(True, "Encode all prompts of the training and evaluation datasets at the start.")
    unload_text_encoders: bool | None = _field(
        None,
        "Free the text encoders once all prompts are encoded (a pipeline object that was passed keeps its own, on the "
        "CPU). None: where the trainer loaded the pipeline from a name.",
    )
    prompt_mix: dict[str, float | int] | str | None = _field(
        None, "Share of each kind of prompts an iteration, e.g. {'ocr': 0.5, 'plain': 0.5}; JSON on the command line."
    )
    prompt_mix_column: str = _field("kind", "'prompt_mix': column of the dataset with the kind of each prompt.")
    dead_prompt_rate: float = _field(
        1.0,
        "How likely a prompt takes part in a round of the prompts, where its images were equal in every objective when it was "
        "last drawn. 1: as any other.",
    )
    transition: str | None = _field(None, "Stochastic step: 'flow_sde', 'cps' or 'ddim'. None: the family's own.")
    noise_level: float = _field(0.7, "Noise of a stochastic step (a of Flow-SDE, eta of DDIM).")
    sde_window_size: int | None = _field(None, "Stochastic, trained steps an iteration. None: all but the last.")
    sde_window_range: list[int] | None = _field(
        None, "First step for windows, one past the last. None: the first half."
    )
    rollout_solver: str = _field(
        "euler", "Noise-free steps of a flow's rollout: 'euler', 'heun' (two calls a step) or 'dpmpp_2m'."
    )
    ratio_guard: str | None = _field(
        None,
        "'grpo': a trust region in place of the plain clip. 'kl_mask' (Flow-DPPO) drops rows that moved too far, 'grpo_guard' "
        "clips ratios that are normalized per timestep.",
    )
    kl_mask_threshold: float = _field(1e-5, "'kl_mask': KL divergence of a step above which a row may be dropped.")
    target_movement: float | None = _field(
        None,
        "Mean squared change of the prediction that an iteration should make. The learning rate adapts to it, within a tenth "
        "and ten times its own value. inf: only measured. None: the plain schedule.",
    )
    share_initial_noise: bool = _field(False, "A group's images start from one noise and differ by the window's.")
    timestep_batch_size: int = _field(1, "Trained steps of one image that share a forward pass of the update.")
    updates_per_iteration: int | None = _field(None, "Optimizer steps per pass; sets `gradient_accumulation_steps`.")
    rollout_batch_size: int | None = _field(8, "Images sampled at a time on a device. None: the generation batch.")
    offload_reference: bool = _field(
        False,
        "Full fine-tuning with `beta` > 0: keep the frozen reference on the CPU between its forwards. With 'nft' and 'awm' the "
        "slow copy too.",
    )
    gather_for_rollout: bool = _field(
        True,
        "Under ZeRO-3 and FSDP2, gather all weights once a rollout or evaluation; False gathers each layer in each forward.",
    )
    quantization_config: dict[str, Any] | str | None = _field(
        None,
        "How diffusers quantizes the denoiser when it loads it, for an adapter on a frozen base: a dictionary as in a model's "
        "config.json; JSON on the command line.",
    )
    attention_backend: str | None = _field(None, "Attention kernel by diffusers' name, e.g. 'flash'. None: PyTorch's.")
    compile_denoiser: bool = _field(False, "Compile the denoiser's repeated blocks, for rollout and update alike.")
    ema_decay: float | None = _field(None, "Decay of a moving average of the trained weights. None: no average.")
    ema_update_steps: int = _field(1, "Optimizer steps between two updates of the average.")
    reward_overlap: bool = _field(True, "Score a rollout batch while the next is sampled. Changes no result.")
    offload_rewards: bool = _field(
        False, "Keep the rewards' networks in the CPU's memory between rollouts; those of a reward server in its own."
    )
    reward_timeout: float | None = _field(None, "Seconds after which a reward's call has failed. None: no limit.")
    max_reward_failure_rate: float = _field(0.5, "Share of a reward's scores that may fail before a run stops.")
    eval_num_inference_steps: int = _field(40, "Denoising steps in evaluation (deterministic).")
    eval_height: int | None = _field(None, "Image height in evaluation, in pixels. None: as `height` says.")
    eval_width: int | None = _field(None, "Image width in evaluation, in pixels. None: as `width` says.")
    eval_guidance_scale: float | None = _field(None, "Guidance in evaluation; None for `guidance_scale`.")
    skip_dead_updates: bool = _field(True, "Leave the weights alone where every advantage of an update is 0.")
    max_nonfinite_updates: int = _field(5, "Updates in a row with non-finite gradients before a run saves and stops.")

    def __post_init__(self) -> None:
        example = '{"quant_method": "bitsandbytes", "load_in_4bit": true}'
        self.quantization_config = read_json("quantization_config", self.quantization_config, example)
        self.prompt_mix = read_json("prompt_mix", self.prompt_mix, '{"ocr": 1, "plain": 1}')
        self._check_fields()
        updates, accumulation = self.updates_per_iteration, self.gradient_accumulation_steps
        refuse([
            (self.num_generations is None or self.num_generations < 2, self.num_generations,
             "`num_generations` must be at least 2: an advantage compares the images of one prompt", "Use e.g. 8."),
            (updates is not None and (self.generation_batch_size is None or accumulation != 1),
             {"generation_batch_size": self.generation_batch_size, "gradient_accumulation_steps": accumulation},
             "`updates_per_iteration` needs `generation_batch_size`, and sets `gradient_accumulation_steps` itself",
             "Pass the first and leave out the other."),
        ])  # fmt: skip
        if self.bf16 is None and (self.use_cpu or not torch.accelerator.is_available()):
            self.bf16 = False
        self._set_checkpointing()
        if self.ratio_guard == "grpo_guard" and self.epsilon is None:
            self.epsilon = 2e-6
        for name, value in LOSS_DEFAULTS[self.loss_type].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        plateaus = self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        if self._picks_best or plateaus:
            self.metric_for_best_model: Any = self.metric_for_best_model or "reward"
        super().__post_init__()
        if plateaus:  # PyTorch's default waits for a loss that no longer falls
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs: Any = {"mode": mode, **(self.lr_scheduler_kwargs or {})}
        refuse(self._combinations())
        if updates is not None:
            self.gradient_accumulation_steps = self._accumulation_for(updates)

    def _check_fields(self) -> None:
        """Raise for values that are wrong by themselves, before TRL fills in the others."""
        ours = set(DiffusionGRPOConfig.__annotations__) - {"args"}
        own = {f.name for f in dataclasses.fields(self)} - {f.name for f in dataclasses.fields(GRPOConfig)}
        check_types(self, own | ours | TYPED_FIELDS, (ours | TYPED_FIELDS) - MAY_BE_INFINITE)
        for field_ in dataclasses.fields(self):
            name, default = field_.name, default_of(field_)
            value, remedy = getattr(self, name), f"The default is {default!r}."
            choices, least = CHOICES.get(name, (value,)), LEAST.get(name, -math.inf)
            reason, instead = REASONS.get(name, NO_MEANING)
            no = ("no", False)  # YAML reads `no` as false
            same = value == default or (value in no and default in no)
            there = value is not None
            refuse([
                (value not in choices, value, f"`{name}` must be one of {', '.join(map(str, choices))}",
                 did_you_mean(value, [c for c in choices if isinstance(c, str)]) + remedy),
                (there and name in LEAST and value < least, value, f"`{name}` must be at least {least}", remedy),
                (there and name in POSITIVE and value <= 0, value, f"`{name}` must be positive", remedy),
                (there and name in REFUSED_FIELDS and not same, value,
                 f"`{name}` must stay at its default ({default!r}): {reason}", instead),
            ])  # fmt: skip

    def _set_checkpointing(self) -> None:
        """Gradient checkpointing is on by default; transformers' new name for it is `activation_checkpointing`."""
        if self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.activation_checkpointing is None:
            config = self.fsdp_config if isinstance(self.fsdp_config, dict) else {}
            by_fsdp = config.get("activation_checkpointing", os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", False))
            self.activation_checkpointing = str(by_fsdp).lower() not in ("true", "1")

    @property
    def flow_matching(self) -> bool:
        """Whether the loss needs final latents alone, and no stochastic steps."""
        return self.loss_type != "grpo"

    @property
    def anchored(self) -> bool:
        """Whether the loss compares with a slow copy of the weights, or those at the start of the iteration."""
        return self.loss_type == "nft" or (self.loss_type == "awm" and self.awm_trust_region > 0)

    @property
    def anchor(self) -> Decay | None:
        """How the slow copy follows the weights; None where there is none."""
        flat, rise, most = self.anchor_decay or (0, 0, 0)
        return Decay(int(flat), rise, most) if self.anchored and rise * most > 0 else None

    @property
    def rows_per_image(self) -> int:
        """Rows that one image contributes to a pass: trained denoising steps, or noise levels."""
        return self.timesteps_per_image or self.sde_window_size or self.num_inference_steps - 1

    @property
    def _picks_best(self) -> bool:
        return self.load_best_model_at_end or self.save_strategy == "best"

    def _accumulation_for(self, updates: int) -> int:
        window = self.rows_per_image
        steps, rest = divmod(self.steps_per_generation * window, self.timestep_batch_size)
        if updates < 1 or rest or steps % updates:
            raise ValueError(
                "`updates_per_iteration` must divide the micro-batches of an iteration, which are images x trained steps / "
                f"(per_device_train_batch_size x timestep_batch_size x devices) = {self.steps_per_generation} x {window} / "
                f"{self.timestep_batch_size}. Found {updates}. Use a divisor, e.g. 1."
            )
        return steps // updates

    def _combinations(self) -> list[Refusal]:
        """Values that do not fit together; `super().__post_init__()` has filled in what was left out."""
        rules, flow, range_ = self.allowed_rules(), self.flow_matching, self.timestep_range
        loss, accelerator = f"loss_type={self.loss_type!r}", typing.cast(Any, self.accelerator_config)
        anchor = self.anchor_decay or [0.0, 0.0, 0.0]
        return [
            (self.multi_objective_aggregation not in rules, self.multi_objective_aggregation,
             f"`multi_objective_aggregation` must be one of {', '.join(rules)} for {type(self).__name__}",
             did_you_mean(self.multi_objective_aggregation, rules)
             + ("Pick one of these." if rules == RULES else "Pick one of these; `APEXConfig` has more.")),
            (self.dead_prompt_rate > 1, self.dead_prompt_rate, "`dead_prompt_rate` must be at most 1", "Lower it."),
            (self.max_steps == 0 or self.max_steps < -1, self.max_steps,
             "`max_steps` must be positive, or -1 for `num_train_epochs`", "To evaluate only, call `evaluate()`."),
            (flow and self.guidance_scale != 1.0, self.guidance_scale,
             f"`guidance_scale` must be 1 with {loss}: its target is the velocity of the image itself, which a guided "
             "prediction does not predict", "Leave it out; `eval_guidance_scale` is free."),
            (flow and (self.sde_window_size, self.sde_window_range) != (None, None),
             (self.sde_window_size, self.sde_window_range),
             f"`sde_window_size` and `sde_window_range` need loss_type='grpo': with {self.loss_type!r} no step is stochastic",
             "Leave them out; `timesteps_per_image` and `timestep_range` choose what is trained."),
            (flow and self.share_initial_noise, self.share_initial_noise,
             f"`share_initial_noise` needs loss_type='grpo': with {self.loss_type!r} the images of a group differ by their "
             "initial noise alone", "Leave it out."),
            (flow and self.ratio_guard is not None, self.ratio_guard,
             f"`ratio_guard` needs loss_type='grpo': with {self.loss_type!r} no step is stochastic", "Leave it out."),
            (self.target_movement is not None and (self.fp16 or self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")),
             {"fp16": self.fp16, "lr_scheduler_type": getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)},
             "`target_movement` needs bf16 or float32, and a schedule that does not adapt the rate itself",
             "Leave these out."),
            (not flow and self.timesteps_per_image is not None, self.timesteps_per_image,
             "`timesteps_per_image` needs loss_type 'awm', 'nft' or 'fpo'", "Use sde_window_size with 'grpo'."),
            (not (flow and self.loss_type != "fpo") and self.anchor_decay is not None, self.anchor_decay,
             "`anchor_decay` needs loss_type 'nft' or 'awm', which have a slow copy of the weights", "Leave it out."),
            (len(anchor) != 3 or min(anchor) < 0 or anchor[-1] >= 1, anchor,
             "`anchor_decay` must be three numbers from 0, the last below 1: updates at 0, rise of each update, most",
             "Use e.g. [0, 0.001, 0.5]."),
            (len(range_) != 2 or not 0 <= range_[0] < range_[1] <= 1, range_,
             "`timestep_range` must be two rising numbers in [0, 1]", "Use e.g. [0.1, 1.0]."),
            (self.ema_decay is not None and not 0 < self.ema_decay < 1, self.ema_decay,
             "`ema_decay` must lie between 0 and 1", "Use e.g. 0.9, or None for no average."),
            (not 0 <= self.max_reward_failure_rate <= 1, self.max_reward_failure_rate,
             "`max_reward_failure_rate` must lie between 0 and 1", "Use e.g. 0.5; 1 never stops."),
            (self.unload_text_encoders and not self.precompute_prompts, self.unload_text_encoders,
             "`unload_text_encoders` needs `precompute_prompts`, since prompts cannot be encoded later",
             "Set precompute_prompts=True, or unload_text_encoders=False."),
            (self._picks_best and self.eval_strategy == "no", "eval_strategy='no'",
             "Picking the best model needs evaluations, set by `eval_strategy` and `eval_steps`",
             "Use e.g. eval_strategy='steps' and eval_steps=10."),
            (accelerator.split_batches or accelerator.dispatch_batches, accelerator.to_dict(),
             "`accelerator_config` must leave `split_batches` and `dispatch_batches` off: every process samples its own prompts",
             "Leave them out."),
            *self._without_effect(),
        ]  # fmt: skip

    def _without_effect(self) -> list[Refusal]:
        """Options that were changed, and have an effect beside other options alone."""
        loss, flow, mask = self.loss_type, self.flow_matching, self.ratio_guard == "kl_mask"
        needs = [
            ("loss_type='grpo'", not flow, "noise_level transition"),
            ("loss_type='awm'", loss == "awm", "awm_weighting awm_trust_region advantage_max"),
            ("loss_type='fpo'", loss == "fpo", "fpo_scale"),
            ("loss_type='nft'", loss == "nft", "nft_beta"),
            ("loss_type 'awm', 'nft' or 'fpo'", flow, "timestep_sampling timestep_range"),
            ("timestep_sampling 'uniform' or 'logit_normal'", flow and self.timestep_sampling in SHIFTED, "timestep_shift"),
            ("a ratio, which loss_type='nft' has not", loss != "nft", "epsilon"),
            ("a ratio that is clipped, unlike with loss_type='nft' and ratio_guard='kl_mask'",
             loss != "nft" and not mask, "epsilon_high delta"),
            ("ratio_guard='kl_mask'", mask, "kl_mask_threshold"),
            ("`ema_decay`", self.ema_decay is not None, "ema_update_steps"),
        ]  # fmt: skip
        rows: list[Refusal] = []
        defaults = {f.name: default_of(f) for f in dataclasses.fields(self)}
        for what, there, names in needs:
            for name in names.split():
                value = getattr(self, name)
                value = list(value) if isinstance(value, tuple) else value
                filled_in = LOSS_DEFAULTS[loss].get(name)  # and so in a saved configuration
                ignored = not there and value not in (defaults[name], filled_in)
                rows.append((ignored, value, f"`{name}` has no effect: it needs {what}", "Leave it out."))
        return rows

    @classmethod
    def allowed_rules(cls) -> tuple[str, ...]:
        """Values of `multi_objective_aggregation` that this trainer knows."""
        return STATIC_RULES

    @classmethod
    def from_grpo_config(cls, config: GRPOConfig) -> "DiffusionGRPOConfig":
        """Upgrade a plain `trl.GRPOConfig`: what its author set is kept, what was left at TRL's default becomes ours."""
        own = {f.name: f.default for f in dataclasses.fields(cls)}
        given = {f.name: f for f in dataclasses.fields(config) if f.init and f.name in own}
        values = {n: getattr(config, n) for n, f in given.items() if getattr(config, n) != default_of(f)}
        filled_in = {"pad_to_multiple_of"}  # by TRL, and not by the user
        if "generation_batch_size" in values:  # either one determines the other
            filled_in.add("steps_per_generation")
        if "updates_per_iteration" in values:
            filled_in.add("gradient_accumulation_steps")
        plain = not isinstance(config, DiffusionGRPOConfig)
        if plain and config.bf16 and not config.fp16 and config.use_cpu:
            filled_in.add("bf16")
        if plain and values.get("remove_unused_columns") is True:
            filled_in.add("remove_unused_columns")
        if plain and values.get("metric_for_best_model") == "loss":
            filled_in |= {"metric_for_best_model", "greater_is_better"}
        upgraded = cls(**{name: value for name, value in values.items() if name not in filled_in})
        ours = [n for n in given if n in DiffusionGRPOConfig.__annotations__ and n not in values]
        replaced = [n for n in ours if getattr(config, n) != own[n]]
        if replaced and plain:
            new = {name: repr(getattr(upgraded, name)) for name in replaced}
            new["learning_rate"] = "3e-4, or 1e-5 without an adapter"
            changes = ", ".join(f"{name} {getattr(config, name)!r} -> {new[name]}" for name in replaced)
            fields = f"Fields at GRPOConfig's default take {cls.__name__}'s: {changes}"
            logger.warning("%s. Pass a %s to set them.", fields, cls.__name__)
        return upgraded


FLAT = (
    "need_coef", "need_mode", "reward_targets", "need_scale", "warmup_iterations", "ramp_iterations", "priority_floor",
    "normalize_objectives",
)  # fmt: skip
OF_TRL = ("scale_rewards",)  # a field of trl.GRPOConfig, with its meaning and default
NEW = ("gd2po_agreement",)  # never were fields
# Fields of 0.1.0, hidden from `--help`: accepted with a warning for one release.
OLD = tuple(name for name in AGGREGATION_OPTIONS if name not in (*FLAT, *OF_TRL, *NEW))
_TYPES = typing.get_type_hints(ApexOptions)
_OldFields: Any = dataclasses.make_dataclass(
    "_OldFields",
    [(name, _TYPES[name], _field(AGGREGATION_OPTIONS[name][0], argparse.SUPPRESS)) for name in OLD],
    kw_only=True,
)


@dataclass(kw_only=True)
class AggregationFields(_OldFields):
    """Fields of a trainer's configuration for its [`MultiObjectiveRewardAggregator`].

    A value in `aggregation_options` counts where the field of the same name is left at its default.
    """

    need_coef: float = _field(*AGGREGATION_OPTIONS["need_coef"])
    need_mode: str = _field(*AGGREGATION_OPTIONS["need_mode"])
    reward_targets: list[float] | None = _field(*AGGREGATION_OPTIONS["reward_targets"])
    need_scale: str = _field(*AGGREGATION_OPTIONS["need_scale"])
    warmup_iterations: int = _field(*AGGREGATION_OPTIONS["warmup_iterations"])
    ramp_iterations: int = _field(*AGGREGATION_OPTIONS["ramp_iterations"])
    priority_floor: float = _field(*AGGREGATION_OPTIONS["priority_floor"])
    normalize_objectives: bool = _field(*AGGREGATION_OPTIONS["normalize_objectives"])
    aggregation_options: dict[str, Any] | str | None = _field(
        None,
        "All other options of the aggregator: a dictionary of fields of ApexOptions, or an ApexOptions. On the command "
        "line as JSON, e.g. '{\"scale_blend\": 0.5}'.",
    )

    def _read_aggregation_options(self) -> ApexOptions:
        """Make `aggregation_options` a plain dictionary and return all options; warn about fields of 0.1.0."""
        given: Any = read_json("aggregation_options", self.aggregation_options, '{"scale_blend": 0.5}')
        try:
            ApexOptions.read(given)
        except ValueError as error:
            raise ValueError(f"`aggregation_options` cannot be read. {error}") from error
        self.aggregation_options = given.changed() if isinstance(given, ApexOptions) else given
        options = self.apex_options()
        old = {name: getattr(self, name) for name in OLD if getattr(self, name) != AGGREGATION_OPTIONS[name][0]}
        if old:
            warnings.warn(
                f"Options of the aggregator that are set seldom go in `aggregation_options`. Found the fields "
                f"{', '.join(old)}, which the next release will refuse. Pass aggregation_options={old}.",
                FutureWarning,
                stacklevel=5,
            )
        return options

    def apex_options(self) -> ApexOptions:
        """The options of the aggregator, as one object."""
        fields = {name: getattr(self, name) for name in (*FLAT, *OF_TRL, *OLD)}
        options = typing.cast(dict, self.aggregation_options or {})
        for name, value in options.items():
            if name in fields and fields[name] not in (AGGREGATION_OPTIONS[name][0], value):
                raise ValueError(
                    f"`{name}` must have one value. Found {fields[name]!r}, and {value!r} in `aggregation_options`. "
                    "Leave out one of the two."
                )
        return ApexOptions(**fields | options)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values; fields of 0.1.0 are under `aggregation_options`."""
        values = super().to_dict()  # type: ignore[misc]
        rest = {name: value for name, value in self.apex_options().changed().items() if name in (*OLD, *NEW)}
        values["aggregation_options"] = typing.cast(dict, self.aggregation_options or {}) | rest or None
        return {name: value for name, value in values.items() if name not in OLD}


@naming_the_nearest
@dataclass
class APEXConfig(AggregationFields, DiffusionGRPOConfig):
    """[`DiffusionGRPOConfig`] plus the options of the aggregator: eight as fields, all of [`ApexOptions`] in one.

    `multi_objective_aggregation` is "apex" by default and may name any rule of
    [`MultiObjectiveRewardAggregator`], so that baselines run in the same trainer.
    """

    multi_objective_aggregation: str = _field("apex", f"How rewards become one advantage: one of {', '.join(RULES)}.")

    baseline_prompts: int = _field(
        128,
        "For 'apex': prompts that the model before training makes one image each of. Progress is measured from their mean "
        "rewards. 0: from those of the first iteration, which are noisy with few prompts.",
    )
    gradient_probe: bool | None = _field(
        None, "Measure the objectives' gradients in training. None: where the rule or `conflict_source` needs them."
    )
    probe_every: int = _field(10, "Optimizer steps between two probes; 1 with 'population'.")
    probe_layers: list[str] | None = _field(
        None, "Regular expressions of the linear layers to probe. None: every trainable one (right for LoRA)."
    )

    def __post_init__(self) -> None:
        source = self._read_aggregation_options().conflict_source
        needed = source != "advantage" or self.multi_objective_aggregation in GRADIENT_RULES
        if self.gradient_probe is None:
            self.gradient_probe = needed
        DiffusionGRPOConfig.__post_init__(self)
        probe, rule = self.gradient_probe, self.multi_objective_aggregation
        refuse([
            (needed and not probe, {"conflict_source": source, "multi_objective_aggregation": rule},
             "`gradient_probe` must not be False where gradients are asked for", "Leave it out."),
            (self.baseline_prompts < 0, self.baseline_prompts, "`baseline_prompts` must not be negative", "Use e.g. 128, or 0."),
            (self.probe_every < 1, self.probe_every, "`probe_every` must be at least 1", "Use e.g. 10."),
            (probe and self.compile_denoiser, "compile_denoiser",
             "The gradient probe listens to layers that compiled code does not call", "Turn off one of the two."),
        ])  # fmt: skip

    @classmethod
    def allowed_rules(cls) -> tuple[str, ...]:
        return RULES


@naming_the_nearest
@dataclass
class APEXGRPOConfig(AggregationFields, GRPOConfig):
    """`trl.GRPOConfig` plus the options of the aggregator: eight as fields, all of [`ApexOptions`] in one.

    Nothing of TRL's is changed or forbidden; only `multi_objective_aggregation` is "apex" by default and may name any
    rule of [`MultiObjectiveRewardAggregator`]. `scale_rewards` is TRL's option and reaches the rules that know it.

    Example:
        >>> config = APEXGRPOConfig("run", use_cpu=True, bf16=False, warmup_iterations=5)
        >>> config.multi_objective_aggregation, config.warmup_iterations, config.epsilon
        ('apex', 5, 0.2)
    """

    multi_objective_aggregation: str = _field("apex", f"How rewards become one advantage: one of {', '.join(RULES)}.")

    def __post_init__(self) -> None:
        self._check_aggregation(self._read_aggregation_options())
        GRPOConfig.__post_init__(self)

    def _check_aggregation(self, options: ApexOptions) -> None:
        refuse([
            (self.multi_objective_aggregation not in RULES, self.multi_objective_aggregation,
             f"`multi_objective_aggregation` must be one of {', '.join(RULES)}",
             did_you_mean(self.multi_objective_aggregation, RULES) + "Pass one of these."),
            (options.conflict_source != "advantage", options.conflict_source,
             "`conflict_source` must be 'advantage' for APEXGRPOTrainer, which has no gradient probe", "Leave it out."),
        ])  # fmt: skip

    @classmethod
    def from_grpo_config(cls, config: GRPOConfig) -> "APEXGRPOConfig":
        """A plain `trl.GRPOConfig` with the aggregator's defaults beside it; only TRL's default rule becomes "apex"."""
        # Copied rather than constructed anew: TRL's __post_init__ fills fields that it refuses to be given together.
        upgraded = object.__new__(cls)
        upgraded.__dict__.update({f.name: f.default for f in dataclasses.fields(AggregationFields)})
        upgraded.__dict__.update(config.__dict__)
        if config.multi_objective_aggregation == "sum_then_normalize":
            upgraded.multi_objective_aggregation = "apex"
        upgraded._check_aggregation(upgraded._read_aggregation_options())
        return upgraded


def read_json(name: str, given: Any, example: str) -> Any:
    """What the option `name` holds, as an object also where the command line gives it as JSON."""
    try:
        return json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be JSON. Found {given!r} ({error}). Pass e.g. '{example}'.") from error


def check_types(config: Any, names: set[str], finite: set[str]) -> None:
    """Raise where one of these fields has another type than it is annotated with, or one of `finite` is infinite or NaN.

    Integers may stand for floats, and tuples for lists.
    """
    hints = typing.get_type_hints(type(config))
    for name in sorted(names):
        value, hint = getattr(config, name), WHOLE_TOO.get(hints[name], hints[name])
        try:
            type_validator(name, list(value) if isinstance(value, tuple) else value, hint)
        except TypeError:
            raise ValueError(
                f"`{name}` must be of type {inspect.formatannotation(hints[name])}. Found {reprlib.repr(value)} "
                f"({type(value).__name__}). Pass one of that type."
            ) from None
        numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, float)]
        if name in finite and not all(map(math.isfinite, numbers)):
            raise ValueError(f"`{name}` must be finite. Found {reprlib.repr(value)}. Pass a number.")


def default_of(entry: dataclasses.Field) -> Any:
    """The default of a field of a dataclass, also where a factory makes it."""
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
