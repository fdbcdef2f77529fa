"""The configurations of the three trainers."""

import argparse
import dataclasses
import json
import logging
import math
import os
import types
import typing
import warnings
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from trl import GRPOConfig

from ..aggregation.options import AGGREGATION_OPTIONS, ApexOptions
from ..aggregation.rules import GRADIENT_RULES, RULES
from ..diffusion.losses import TIMESTEP_SAMPLING, WEIGHTINGS


def check_types(config: Any, names: set[str], finite: set[str]) -> None:
    """Raise where a field holds something of another type than its annotation says, or NaN.

    Args:
        config (dataclass instance): annotated with bool, int, float, str, lists of these, None and unions.
        names (`set[str]`): the fields to look at.
        finite (`set[str]`): those that must not be infinite either.

    Raises:
        ValueError: names the field, the type and what was found.

    Example:
        ```python
        >>> @dataclasses.dataclass
        ... class Options:
        ...     steps: int | None = 3
        >>> check_types(Options(steps="many"), {"steps"}, set())
        Traceback (most recent call last):
        ValueError: `steps` must be of type int | None. Found 'many' (str). Correct or remove it.

        ```
    """
    hints = typing.get_type_hints(type(config))
    for entry in dataclasses.fields(config):
        if entry.name not in names:
            continue
        value, hint = getattr(config, entry.name), hints[entry.name]
        if not _fits(value, hint):
            raise ValueError(
                f"`{entry.name}` must be of type {_name(hint)}. Found {_short(value)} ({type(value).__name__}). "
                "Correct or remove it."
            )
        numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, float)]
        if entry.name in finite and any(not math.isfinite(number) for number in numbers):
            raise ValueError(f"`{entry.name}` must be finite. Found {_short(value)}. Correct or remove it.")


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in arguments)
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _name(hint: Any) -> str:
    return (
        hint.__name__
        if isinstance(hint, type) and not typing.get_args(hint)
        else str(hint).replace("NoneType", "None")
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


logger = logging.getLogger(__name__)

STATIC_RULES = ("sum_then_normalize", "normalize_then_sum")

# What of GRPOConfig has no meaning for a denoiser. Found at another value than GRPOConfig's default: an error.
LANGUAGE_FIELDS = (
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "generation_kwargs",
    "chat_template_kwargs",
    "repetition_penalty",
    "cache_implementation",
    "use_vllm",
    "use_liger_kernel",
    "mask_truncated_completions",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "importance_sampling_level",
    "max_tool_calling_iterations",
    "off_policy_mask_threshold",
    "use_bias_correction_kl",
    "use_transformers_continuous_batching",
    "use_transformers_paged",
    "router_aux_loss_coef",
    "log_completions_hub_repo",
)


# What `None` means for each loss. The flow-matching losses are published without guidance.
LOSS_DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo": {"guidance_scale": 4.5, "epsilon": 1e-4},
    "awm": {"guidance_scale": 1.0, "epsilon": 1.0, "timesteps_per_image": 6},
    "nft": {"guidance_scale": 1.0, "epsilon": 1e-4, "timesteps_per_image": 4},
    "fpo": {"guidance_scale": 1.0, "epsilon": 0.01, "timesteps_per_image": 4},
}

# Of GRPOConfig's fields, those whose types are checked here as well.
TYPED_FIELDS = {
    "per_device_train_batch_size", "per_device_eval_batch_size", "generation_batch_size", "steps_per_generation",
    "num_generations", "num_iterations", "max_steps", "seed", "beta", "delta", "epsilon_high", "max_grad_norm",
    "reward_weights", "save_total_limit", "logging_steps", "save_steps",
}  # fmt: skip
MAY_BE_INFINITE = {"delta", "max_grad_norm", "reward_weights"}
LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "generation_batch_size": 1,
    "steps_per_generation": 1, "num_iterations": 1, "num_inference_steps": 1, "eval_num_inference_steps": 1,
    "max_sequence_length": 1, "height": 1, "width": 1, "sde_window_size": 1, "timestep_batch_size": 1,
    "rollout_batch_size": 1, "ema_update_steps": 1, "max_nonfinite_updates": 1, "learning_rate": 0, "weight_decay": 0,
    "timesteps_per_image": 1, "timestep_shift": 0, "guidance_scale": 0, "advantage_max": 0, "fpo_scale": 0, "nft_beta": 0,
    "adam_epsilon": 0, "epsilon": 0, "beta": 0, "eval_guidance_scale": 0, "gradient_accumulation_steps": 1,
}  # fmt: skip


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass
class DiffusionGRPOConfig(GRPOConfig):
    """`trl.GRPOConfig` for text-to-image models.

    TRL's fields keep their meaning where a denoiser has one. `num_generations` images are sampled for each of
    `generation_batch_size / num_generations` prompts; each image contributes one row per trained denoising step, and one
    training step is a forward and a backward over `per_device_train_batch_size * timestep_batch_size` rows. Fields that
    only a language model understands must stay at their default.

    Note:
        Defaults that differ from TRL's: `learning_rate` 3e-4 (1e-5 for all weights), `epsilon` 1e-4 (log-probabilities
        are means over latent elements), `adam_epsilon` 1e-15 (gradients here are far below AdamW's usual 1e-8),
        `max_grad_norm` 1.0, `gradient_checkpointing` True unless FSDP checkpoints, `ddp_find_unused_parameters` False,
        `report_to` "none", `remove_unused_columns` False (columns reach the rewards).

    Raises:
        ValueError: for a batch that holds no whole groups, a window that does not fit, a language-only field that was set.
    """

    gradient_accumulation_steps: int = field(
        default=1, metadata=_help("Micro-batches an optimizer step. `updates_per_iteration` may set it for you.")
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata=_help("Initial learning rate of AdamW. None: 3e-4 for an adapter, 1e-5 for all weights."),
    )
    adam_epsilon: float = field(
        default=1e-15, metadata=_help("AdamW's epsilon; 1e-8 would swallow gradients of this size.")
    )
    weight_decay: float = field(default=1e-4, metadata=_help("Weight decay of AdamW."))
    lr_scheduler_type: str = field(default="constant", metadata=_help("Learning rate schedule."))
    epsilon: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata=_help("Clip range of the importance ratio. None: 1e-4 for 'grpo', 1 for 'awm', 0.01 for 'fpo'."),
    )
    bf16: bool | None = field(
        default=None, metadata=_help("bfloat16 autocast. None: on, unless `fp16` or `use_cpu` is set.")
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata=_help(
            "Recompute activations in the backward pass. None: yes, unless `fsdp_config` says that FSDP does."
        ),
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata=_help("transformers' newer name of `gradient_checkpointing`; goes first if both are set."),
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata=_help("As in TrainingArguments; every adapter weight is used in each forward.")
    )
    report_to: None | str | list[str] = field(default="none", metadata=_help("Where to log, as in TrainingArguments."))
    remove_unused_columns: bool | None = field(
        default=False, metadata=_help("Must be False: dataset columns are passed to the reward functions.")
    )

    num_generations_eval: int | None = field(
        default=1, metadata=_help("Unused: evaluation makes one image per prompt.")
    )
    height: int | None = field(
        default=None, metadata=_help("Image height in pixels. None: 512 for SD3 and FLUX, else the model's own.")
    )
    width: int | None = field(
        default=None, metadata=_help("Image width in pixels. None: 512 for SD3 and FLUX, else the model's own.")
    )
    num_inference_steps: int = field(default=10, metadata=_help("Denoising steps of a rollout."))
    loss_type: str = field(
        default="grpo",
        metadata=_help(
            "What an update minimizes. 'grpo': the clipped ratio of stochastic denoising steps. 'awm' (Advantage Weighted "
            "Matching), 'nft' (DiffusionNFT), 'fpo' (ratio of flow-matching losses): from the final latents alone."
        ),
    )
    guidance_scale: float | None = field(
        default=None,
        metadata=_help(
            "Classifier-free guidance of rollout and update; 1 for none. None: 4.5 for 'grpo'; the other losses need 1."
        ),
    )
    timesteps_per_image: int | None = field(
        default=None,
        metadata=_help("'awm', 'nft', 'fpo': noise levels that each image is trained on. None: 6, 4 and 4."),
    )
    timestep_sampling: str = field(
        default="grid",
        metadata=_help("'awm', 'nft', 'fpo': where noise levels come from: " + ", ".join(TIMESTEP_SAMPLING) + "."),
    )
    timestep_range: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata=_help("'awm', 'nft', 'fpo': lowest and highest noise level that is trained."),
    )
    timestep_shift: float = field(
        default=3.0, metadata=_help("Shift of 'uniform' and 'logit_normal' noise levels towards noise; 1 for none.")
    )
    awm_weighting: str = field(
        default="ghuber", metadata=_help("'awm': likelihood of a squared error: " + ", ".join(WEIGHTINGS) + ".")
    )
    advantage_max: float = field(
        default=1.0, metadata=_help("'awm': advantages, clipped to +-5, are scaled to at most this.")
    )
    fpo_scale: float = field(default=10.0, metadata=_help("'fpo': how much a change of the loss changes the ratio."))
    nft_beta: float = field(
        default=1.0, metadata=_help("'nft': how far its two branches lie from the policy that sampled.")
    )
    negative_prompt: str = field(default="", metadata=_help("Prompt of the unconditional branch."))
    max_sequence_length: int = field(default=256, metadata=_help("Tokens of the longest text encoder."))
    prompt_cache_dir: str | None = field(
        default=None,
        metadata=_help("Keep prompt embeddings in files of this folder, for later runs too. None: in memory."),
    )
    precompute_prompts: bool = field(
        default=True, metadata=_help("Encode all prompts of the training and evaluation datasets at the start.")
    )
    unload_text_encoders: bool | None = field(
        default=None,
        metadata=_help(
            "Free the text encoders once all prompts are encoded (a pipeline object that was passed keeps its own, on the "
            "CPU). None: where the trainer loaded the pipeline from a name."
        ),
    )
    transition: str | None = field(
        default=None,
        metadata=_help("Stochastic step: 'flow_sde', 'cps' or 'ddim'. None for the model family's default."),
    )
    noise_level: float = field(default=0.7, metadata=_help("Noise of a stochastic step (a of Flow-SDE, eta of DDIM)."))
    sde_window_size: int | None = field(
        default=None,
        metadata=_help("Stochastic, trained steps an iteration; None for all but the last, which is noise-free."),
    )
    sde_window_range: list[int] | None = field(
        default=None, metadata=_help("First step a window may hold, and one past the last. None for the first half.")
    )
    share_initial_noise: bool = field(
        default=False, metadata=_help("Images of one group start from the same noise and differ by the window's.")
    )
    timestep_batch_size: int = field(
        default=1, metadata=_help("Trained steps of one image that share a forward pass of the update.")
    )
    updates_per_iteration: int | None = field(
        default=None,
        metadata=_help("Optimizer steps per pass over a rollout; sets `gradient_accumulation_steps` for you."),
    )
    rollout_batch_size: int | None = field(
        default=8, metadata=_help("Images sampled at a time on a device; None for the whole generation batch.")
    )
    offload_reference: bool = field(
        default=False,
        metadata=_help("Full fine-tuning with `beta` > 0: keep the frozen reference on the CPU between its forwards."),
    )
    gather_for_rollout: bool = field(
        default=True,
        metadata=_help(
            "Under ZeRO-3 and FSDP2, gather all weights once a rollout; False gathers each layer in each forward."
        ),
    )
    compile_denoiser: bool = field(
        default=False, metadata=_help("Compile the denoiser's repeated blocks, for rollout and update alike.")
    )
    ema_decay: float | None = field(
        default=None, metadata=_help("Decay of an exponential moving average of the trained weights; None for none.")
    )
    ema_update_steps: int = field(default=1, metadata=_help("Optimizer steps between two updates of the average."))
    reward_overlap: bool = field(
        default=True, metadata=_help("Score a rollout batch while the next is sampled. Changes no result.")
    )
    reward_timeout: float | None = field(
        default=None,
        metadata=_help("Seconds after which a reward function's call counts as failed; None for no limit."),
    )
    max_reward_failure_rate: float = field(
        default=0.5, metadata=_help("Share of failed scores of one objective above which the run saves and stops.")
    )
    eval_num_inference_steps: int = field(default=40, metadata=_help("Denoising steps in evaluation (deterministic)."))
    eval_guidance_scale: float | None = field(
        default=None, metadata=_help("Guidance in evaluation; None for `guidance_scale`.")
    )
    skip_dead_updates: bool = field(
        default=True, metadata=_help("Leave the weights alone where every advantage of an update is 0.")
    )
    max_nonfinite_updates: int = field(
        default=5, metadata=_help("Updates in a row with non-finite gradients before the run saves and stops.")
    )

    def __post_init__(self) -> None:
        inherited = {f.name for f in dataclasses.fields(GRPOConfig)}
        own = {f.name for f in dataclasses.fields(self)} - inherited
        ours = set(DiffusionGRPOConfig.__annotations__) - {"args"}
        check_types(self, own | ours | TYPED_FIELDS, (ours | TYPED_FIELDS) - MAY_BE_INFINITE)
        for name, least in LEAST.items():
            value = getattr(self, name)
            self._check(value is None or value >= least, f"`{name}` must be at least {least}", value, "Correct it.")
        if self.num_generations is None or self.num_generations < 2:
            raise ValueError(
                "`num_generations` must be at least 2: an advantage compares the images of one prompt. "
                f"Found {self.num_generations}. Use e.g. 8."
            )
        if self.bf16 is None and self.use_cpu:
            self.bf16 = False
        self._set_checkpointing()
        self._check(
            self.loss_type in LOSS_DEFAULTS, f"`loss_type` must be one of {', '.join(LOSS_DEFAULTS)}", self.loss_type,
            "'grpo' is the clipped ratio of denoising steps.",
        )  # fmt: skip
        for name, value in LOSS_DEFAULTS[self.loss_type].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._reject_language_fields()
        updates = self.updates_per_iteration
        if updates is not None and (self.generation_batch_size is None or self.gradient_accumulation_steps != 1):
            raise ValueError(
                "`updates_per_iteration` needs `generation_batch_size`, and sets `gradient_accumulation_steps` itself. "
                f"Found generation_batch_size={self.generation_batch_size} and "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}. Pass the first and leave out the other."
            )
        self._plan_best_model()
        super().__post_init__()
        if self._follows_plateaus():  # PyTorch's default waits for a loss that no longer falls
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs: Any = {"mode": mode, **(self.lr_scheduler_kwargs or {})}
        self._check_choices()
        if updates is not None:
            self.gradient_accumulation_steps = self._accumulation_for(updates)

    def _set_checkpointing(self) -> None:
        """Gradient checkpointing is on by default; transformers' new name for it is `activation_checkpointing`."""
        if self.activation_checkpointing is not None:
            return
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
    def rows_per_image(self) -> int:
        """Rows that one image contributes to a pass: trained denoising steps, or noise levels."""
        return self.timesteps_per_image or self.sde_window_size or self.num_inference_steps - 1

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

    def _plan_best_model(self: Any) -> None:
        """Pick the best model by the reward, where the user asks for one and names no metric."""
        asked = self.load_best_model_at_end or self.save_strategy == "best"
        if (asked or self._follows_plateaus()) and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"

    def _follows_plateaus(self) -> bool:
        return self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")

    def _reject_language_fields(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
        for name in LANGUAGE_FIELDS:
            if name in defaults and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"`{name}` has no meaning for a text-to-image model and must stay at its default "
                    f"({defaults[name]!r}). Found {getattr(self, name)!r}. Remove it from the configuration."
                )

    def _check_choices(self) -> None:
        self._check(
            self.multi_objective_aggregation in self.allowed_rules(),
            f"`multi_objective_aggregation` must be one of {', '.join(self.allowed_rules())} for {type(self).__name__}",
            self.multi_objective_aggregation,
            "Pick one of these; `APEXConfig` has more.",
        )
        if self.flow_matching:
            self._check(
                self.guidance_scale == 1.0,
                f"`guidance_scale` must be 1 with loss_type={self.loss_type!r}: its target is the velocity of the image "
                "itself, which a guided prediction does not predict",
                self.guidance_scale,
                "Leave it out; `eval_guidance_scale` is free.",
            )
            self._check(
                self.sde_window_size is None and self.sde_window_range is None,
                f"`sde_window_size` and `sde_window_range` need loss_type='grpo': with {self.loss_type!r} no step is stochastic",
                f"{self.sde_window_size} and {self.sde_window_range}",
                "Leave them out; `timesteps_per_image` and `timestep_range` choose what is trained.",
            )
        else:
            self._check(
                self.timesteps_per_image is None,
                "`timesteps_per_image` needs loss_type 'awm', 'nft' or 'fpo'",
                self.timesteps_per_image,
                "Use sde_window_size with 'grpo'.",
            )
        for name, allowed in (("timestep_sampling", TIMESTEP_SAMPLING), ("awm_weighting", WEIGHTINGS)):
            self._check(
                getattr(self, name) in allowed, f"`{name}` must be one of {', '.join(allowed)}", getattr(self, name),
                f"The default is {allowed[0]!r}.",
            )  # fmt: skip
        self._check(
            len(self.timestep_range) == 2 and 0 <= self.timestep_range[0] < self.timestep_range[1] <= 1,
            "`timestep_range` must be two rising numbers in [0, 1]",
            self.timestep_range,
            "Use e.g. [0.1, 1.0].",
        )
        self._check(self.noise_level > 0, "`noise_level` must be positive", self.noise_level, "Use e.g. 0.7.")
        self._check(
            self.transition in (None, "flow_sde", "cps", "ddim"),
            "`transition` must be 'flow_sde', 'cps', 'ddim' or None",
            self.transition,
            "None picks the model family's default.",
        )
        self._check(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "`ema_decay` must lie between 0 and 1",
            self.ema_decay,
            "Use e.g. 0.9, or None for no average.",
        )
        self._check(
            self.reward_timeout is None or self.reward_timeout > 0,
            "`reward_timeout` must be positive",
            self.reward_timeout,
            "None sets no limit.",
        )
        self._check(
            0 <= self.max_reward_failure_rate <= 1,
            "`max_reward_failure_rate` must lie between 0 and 1",
            self.max_reward_failure_rate,
            "Use e.g. 0.5; 1 never stops.",
        )
        self._check(
            self.remove_unused_columns is False,
            "`remove_unused_columns` must be False, since the dataset's columns are passed to the rewards",
            self.remove_unused_columns,
            "Remove it from the configuration.",
        )
        self._check(
            not self.torch_compile,
            "`torch_compile` must be False: it would compile the update alone, and the importance ratio start away from 1",
            self.torch_compile,
            "Use compile_denoiser=True, which compiles rollout and update alike.",
        )
        self._check(
            self.precompute_prompts or not self.unload_text_encoders,
            "`unload_text_encoders` needs `precompute_prompts`, since prompts cannot be encoded later",
            self.unload_text_encoders,
            "Set precompute_prompts=True, or unload_text_encoders=False.",
        )
        self._check(not self.sync_ref_model, "`sync_ref_model` must be False", self.sync_ref_model, "Remove it.")

        self._check(
            not self.save_on_each_node,
            "`save_on_each_node` must be False: checkpoints are written once, to a disk that all nodes see",
            self.save_on_each_node,
            "Leave it out, and put `output_dir` on a shared disk.",
        )
        self._check(
            not (self.load_best_model_at_end or self.save_strategy == "best") or self.eval_strategy != "no",
            "Picking the best model needs evaluations, set by `eval_strategy` and `eval_steps`",
            f"eval_strategy={self.eval_strategy.value!r}",
            "Use e.g. eval_strategy='steps' and eval_steps=10.",
        )

    @classmethod
    def allowed_rules(cls) -> tuple[str, ...]:
        """Values of `multi_objective_aggregation` that this trainer knows."""
        return STATIC_RULES

    @staticmethod
    def _check(holds: bool, rule: str, found: Any, remedy: str) -> None:
        if not holds:
            raise ValueError(f"{rule}. Found {found!r}. {remedy}")

    @classmethod
    def from_grpo_config(cls, config: GRPOConfig) -> "DiffusionGRPOConfig":
        """Upgrade a plain `trl.GRPOConfig`: what its author set is kept, what was left at TRL's default becomes ours.

        Args:
            config (`trl.GRPOConfig`): or a subclass of it.
        """
        values = {}
        replaced = {}
        own_defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if f.init and value != default:
                values[f.name] = value
            elif f.init and own_defaults.get(f.name, value) != value and f.name in DiffusionGRPOConfig.__annotations__:
                own = "3e-4, or 1e-5 without an adapter" if f.name == "learning_rate" else repr(own_defaults[f.name])
                replaced[f.name] = f"{f.name} {value!r} -> {own}"
        if "generation_batch_size" in values:  # both are filled in after construction; either one determines the other
            values.pop("steps_per_generation", None)
        if "updates_per_iteration" in values:
            values.pop("gradient_accumulation_steps", None)
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(config, DiffusionGRPOConfig):
            # Filled in by TRL where the user says nothing, so not the user's wish.
            values.pop("bf16", None) if config.bf16 and not config.fp16 and config.use_cpu else None
            if values.get("remove_unused_columns") is True:
                values.pop("remove_unused_columns")
            if values.get("metric_for_best_model") == "loss":
                del values["metric_for_best_model"]
                values.pop("greater_is_better", None)
            if replaced:
                logger.warning(
                    "Fields at GRPOConfig's default take %s's: %s. Pass a %s to set them.",
                    cls.__name__,
                    ", ".join(replaced.values()),
                    cls.__name__,
                )
        return cls(**{name: value for name, value in values.items() if name in known})


FLAT = (
    "need_coef",
    "need_mode",
    "reward_targets",
    "need_scale",
    "warmup_iterations",
    "ramp_iterations",
    "priority_floor",
    "normalize_objectives",
)
OF_TRL = ("scale_rewards",)  # a field of trl.GRPOConfig, with its meaning and default
NEW = ("gd2po_agreement",)  # never were fields
# Fields of 0.1.0, hidden from `--help`: accepted with a warning for one release.
OLD = tuple(name for name in AGGREGATION_OPTIONS if name not in (*FLAT, *OF_TRL, *NEW))


def _flat(name: str) -> Any:
    default, text = AGGREGATION_OPTIONS[name]
    return field(default=default, metadata={"help": text})


_TYPES = typing.get_type_hints(ApexOptions)
_OldFields: Any = dataclasses.make_dataclass(
    "_OldFields",
    [(n, _TYPES[n], field(default=AGGREGATION_OPTIONS[n][0], metadata={"help": argparse.SUPPRESS})) for n in OLD],
    kw_only=True,
)


@dataclass(kw_only=True)
class AggregationFields(_OldFields):
    """Fields of a trainer's configuration for its [`MultiObjectiveRewardAggregator`].

    A value in `aggregation_options` counts where the field of the same name is left at its default.
    """

    need_coef: float = _flat("need_coef")
    need_mode: str = _flat("need_mode")
    reward_targets: list[float] | None = _flat("reward_targets")
    need_scale: str = _flat("need_scale")
    warmup_iterations: int = _flat("warmup_iterations")
    ramp_iterations: int = _flat("ramp_iterations")
    priority_floor: float = _flat("priority_floor")
    normalize_objectives: bool = _flat("normalize_objectives")
    aggregation_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "All other options of the aggregator: a dictionary of fields of ApexOptions, or an ApexOptions. On the "
            "command line as JSON, e.g. '{\"scale_blend\": 0.5}'."
        },
    )

    def _plain_aggregation_options(self) -> None:
        """Make `aggregation_options` a plain dictionary, whatever it was given as.

        Raises:
            ValueError: if it is text that is not JSON.
        """
        given: Any = self.aggregation_options
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"`aggregation_options` must be JSON. Found {given!r} ({error}). "
                    "Pass e.g. '{\"scale_blend\": 0.5}'."
                ) from error
        self.aggregation_options = given.changed() if isinstance(given, ApexOptions) else given

    def _checked_aggregation_options(self) -> ApexOptions:
        """The options as one object; warns about fields of 0.1.0.

        Raises:
            ValueError: for an unknown option, a value out of its range, or two values for one option.
        """
        ApexOptions.read(typing.cast(dict, self.aggregation_options))
        options = self.apex_options()
        old = [name for name in OLD if getattr(self, name) != AGGREGATION_OPTIONS[name][0]]
        if old:
            values = ", ".join(f"{name!r}: {getattr(self, name)!r}" for name in old)
            warnings.warn(
                f"Options of the aggregator that are set seldom stand in `aggregation_options`. Found the fields "
                f"{', '.join(old)}, which the next release will refuse. Pass aggregation_options={{{values}}}.",
                FutureWarning,
                stacklevel=4,
            )
        return options

    def apex_options(self) -> ApexOptions:
        """The options of the aggregator, as one object."""
        options = self._given()
        for name in (*FLAT, *OF_TRL, *OLD):
            value, default = getattr(self, name), AGGREGATION_OPTIONS[name][0]
            if name not in options:
                options[name] = value
            elif value != default and value != options[name]:
                raise ValueError(
                    f"`{name}` must have one value. Found {value!r}, and {options[name]!r} in `aggregation_options`. "
                    "Leave out one of the two."
                )
        return ApexOptions(**options)

    def _given(self) -> dict[str, Any]:
        return dict(typing.cast(dict, self.aggregation_options) or {})

    def aggregator_options(self) -> dict[str, Any]:
        """The options of the aggregator, by name."""
        return dataclasses.asdict(self.apex_options())

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values; fields of 0.1.0 are under `aggregation_options`."""
        values = super().to_dict()  # type: ignore[misc]
        rest = {name: value for name, value in self.apex_options().changed().items() if name in (*OLD, *NEW)}
        return {
            **{name: value for name, value in values.items() if name not in OLD},
            "aggregation_options": {**self._given(), **rest} or None,
        }


@dataclass
class APEXConfig(AggregationFields, DiffusionGRPOConfig):
    """[`DiffusionGRPOConfig`] plus the options of the aggregator: eight as fields, all of [`ApexOptions`] in one.

    `multi_objective_aggregation` is "apex" by default and may name any rule of
    [`MultiObjectiveRewardAggregator`], so that baselines run in the same trainer.
    """

    multi_objective_aggregation: str = field(
        default="apex", metadata=_help(f"How rewards become one advantage: one of {', '.join(RULES)}.")
    )

    gradient_probe: bool | None = field(
        default=None,
        metadata=_help(
            "Measure the objectives' gradients during training. None: where the rule or `conflict_source` needs them."
        ),
    )
    probe_every: int = field(default=10, metadata=_help("Optimizer steps between two probes; 1 with 'population'."))
    probe_layers: list[str] | None = field(
        default=None,
        metadata=_help(
            "Regular expressions of the linear layers to probe. None: every trainable one (right for LoRA)."
        ),
    )

    def __post_init__(self) -> None:
        self._plain_aggregation_options()
        DiffusionGRPOConfig.__post_init__(self)
        options = self._checked_aggregation_options()
        needed = options.conflict_source != "advantage" or self.multi_objective_aggregation in GRADIENT_RULES
        self._check(
            not (needed and self.gradient_probe is False),
            "`gradient_probe` must not be False where gradients are asked for",
            f"gradient_probe=False with conflict_source={options.conflict_source!r} and the rule "
            f"{self.multi_objective_aggregation!r}",
            "Leave it out.",
        )
        if self.gradient_probe is None:
            self.gradient_probe = needed
        self._check(self.probe_every >= 1, "`probe_every` must be at least 1", self.probe_every, "Use e.g. 10.")
        self._check(
            not (self.gradient_probe and self.loss_type == "nft"),
            "The gradient probe needs a loss that is linear in the advantage",
            "gradient_probe (or a rule that needs it) and loss_type='nft'",
            "Use 'awm' or 'fpo', or turn the probe off.",
        )
        self._check(
            not (self.gradient_probe and self.compile_denoiser),
            "The gradient probe listens to layers that compiled code does not call",
            "gradient_probe and compile_denoiser",
            "Turn off one of the two.",
        )

    @classmethod
    def allowed_rules(cls) -> tuple[str, ...]:
        return RULES


@dataclass
class APEXGRPOConfig(AggregationFields, GRPOConfig):
    """`trl.GRPOConfig` plus the options of the aggregator: eight as fields, all of [`ApexOptions`] in one.

    Nothing of TRL's is changed or forbidden; only `multi_objective_aggregation` is "apex" by default and may name any
    rule of [`MultiObjectiveRewardAggregator`]. `scale_rewards` is TRL's option and reaches the rules that know it.

    Raises:
        ValueError: for an unknown rule, an option out of its range, or a conflict source that needs the gradient probe,
            which the language trainer does not have.

    Example:
        >>> config = APEXGRPOConfig("run", use_cpu=True, bf16=False, warmup_iterations=5)
        >>> config.multi_objective_aggregation, config.warmup_iterations, config.epsilon
        ('apex', 5, 0.2)
    """

    multi_objective_aggregation: str = field(
        default="apex", metadata={"help": f"How rewards become one advantage: one of {', '.join(RULES)}."}
    )

    def __post_init__(self) -> None:
        self._plain_aggregation_options()
        self._check_aggregation(self._checked_aggregation_options())
        GRPOConfig.__post_init__(self)

    def _check_aggregation(self, options: ApexOptions) -> None:
        if self.multi_objective_aggregation not in RULES:
            raise ValueError(
                f"`multi_objective_aggregation` must be one of {', '.join(RULES)}. "
                f"Found {self.multi_objective_aggregation!r}. Pass one of these."
            )
        if options.conflict_source != "advantage":
            raise ValueError(
                "`conflict_source` must be 'advantage' for APEXGRPOTrainer, which has no gradient probe. "
                f"Found {options.conflict_source!r}. Remove it from the configuration."
            )

    @classmethod
    def from_grpo_config(cls, config: GRPOConfig) -> "APEXGRPOConfig":
        """A plain `trl.GRPOConfig` with the aggregator's defaults beside it; every value of TRL's is kept as it is.

        `multi_objective_aggregation` is the exception: TRL's default, "sum_then_normalize", becomes "apex".

        Args:
            config (`trl.GRPOConfig`): or a subclass of it.
        """
        # Copied rather than constructed anew: TRL's __post_init__ fills fields that it refuses to be given together.
        upgraded = object.__new__(cls)
        upgraded.__dict__.update({f.name: f.default for f in dataclasses.fields(AggregationFields)})
        upgraded.__dict__.update(config.__dict__)
        if config.multi_objective_aggregation == "sum_then_normalize":
            upgraded.multi_objective_aggregation = "apex"
        upgraded._check_aggregation(upgraded._checked_aggregation_options())
        return upgraded
