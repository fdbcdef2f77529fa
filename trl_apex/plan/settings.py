"""What of a configuration decides memory and compute."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class PlanSettings:
    """One way to run.

    Args:
        height, width (`int`): pixels.
        lora_rank (`int`): 0 for full fine-tuning.
        lora_targets (`tuple[str, ...]`, *optional*): endings of module names; the family's own by default.
        half (`bool`): bf16 or fp16 autocast, and frozen weights in half precision; False for float32 throughout.
        zero_stage (`int`): of DeepSpeed; 0 for one process or plain data parallelism.
        gpus (`int`): processes.
        samples (`int`): images of one iteration over all processes, `generation_batch_size`.
        group (`int`): images a prompt, `num_generations`.
        micro_batch (`int`), steps_per_row (`int`): `per_device_train_batch_size` and `timestep_batch_size`; their product is the
            rows of one forward pass of the update.
        accumulation (`int`), passes (`int`): `gradient_accumulation_steps` and `num_iterations`.
        rollout_batch (`int`): images sampled at a time on a device.
        steps (`int`): denoising steps of a rollout.
        windows (`tuple[range, ...]`): every window of trained steps that an iteration may draw, each as likely.
        share_noise (`bool`): images of a prompt share their initial noise, and so the steps before the window.
        guidance (`float`): 1 for none.
        kl (`bool`): `beta` > 0.
        offload_reference, checkpointing, ema, gather (`bool`): as in the configuration.
        unload_encoders (`bool`): text encoders are gone once prompts are encoded.
        max_sequence_length (`int`): text tokens.
        prompts (`int`): distinct prompts, for the size of their embeddings.
        rewards_gb (`float`): memory of reward networks on each GPU.
    """

    height: int
    width: int
    lora_rank: int = 32
    lora_targets: tuple[str, ...] | None = None
    half: bool = True
    zero_stage: int = 0
    gpus: int = 1
    samples: int = 64
    group: int = 8
    micro_batch: int = 1
    steps_per_row: int = 1
    accumulation: int = 1
    passes: int = 1
    rollout_batch: int = 64
    steps: int = 10
    windows: tuple[range, ...] = (range(9),)
    share_noise: bool = False
    guidance: float = 1.0
    kl: bool = False
    offload_reference: bool = False
    checkpointing: bool = False
    ema: bool = False
    gather: bool = True
    unload_encoders: bool = True
    max_sequence_length: int = 256
    prompts: int = 0
    rewards_gb: float = 0.0

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"`zero_stage` must be 0, 1, 2 or 3. Found {self.zero_stage}. Use 0 for none.")
        if self.gpus < 1 or self.samples % self.gpus:
            raise ValueError(
                "`generation_batch_size`, the images of one iteration over all GPUs, must be a multiple of their number. "
                f"Found {self.samples} and {self.gpus}. Use e.g. {-(-self.samples // max(self.gpus, 1)) * max(self.gpus, 1)}."
            )
        rows, update = self.samples_here * len(self.windows[0]), self.rows_per_forward * self.accumulation
        if rows % update:
            raise ValueError(
                "An iteration must split into whole updates: images per GPU x trained steps must be a multiple of "
                f"per_device_train_batch_size x timestep_batch_size x gradient_accumulation_steps. Found {rows} rows and "
                f"{update} an update. Change one of them."
            )

    @property
    def samples_here(self) -> int:
        """Images of one iteration on one GPU."""
        return self.samples // self.gpus

    @property
    def rows_per_forward(self) -> int:
        return self.micro_batch * self.steps_per_row

    def but(self, **changes: Any) -> "PlanSettings":
        return replace(self, **changes)


def settings_from_config(
    config: Any,
    size: tuple[int, int],
    *,
    lora_rank: int,
    lora_targets: list[str] | None = None,
    gpus: int = 1,
    zero_stage: int = 0,
    prompts: int = 0,
    rewards_gb: float = 0.0,
) -> PlanSettings:
    """The settings behind a [`DiffusionGRPOConfig`].

    Args:
        config ([`DiffusionGRPOConfig`]): `generation_batch_size` counts the images of all GPUs.
        size (`tuple[int, int]`): the model's own height and width, where the configuration says nothing.
        lora_rank, lora_targets: of the adapter; rank 0 for full fine-tuning.
        gpus, zero_stage, prompts, rewards_gb: as in [`PlanSettings`].
    """
    samples_here = max(config.generation_batch_size // gpus, 1)
    return PlanSettings(
        height=config.height or size[0],
        width=config.width or size[1],
        lora_rank=lora_rank,
        lora_targets=tuple(lora_targets) if lora_targets else None,
        half=bool(config.bf16 or config.fp16),
        zero_stage=zero_stage,
        gpus=gpus,
        samples=config.generation_batch_size,
        group=config.num_generations,
        micro_batch=config.per_device_train_batch_size,
        steps_per_row=config.timestep_batch_size,
        accumulation=config.gradient_accumulation_steps,
        passes=config.num_iterations,
        rollout_batch=min(config.rollout_batch_size or samples_here, samples_here),
        steps=config.num_inference_steps,
        windows=_windows(config),
        share_noise=config.share_initial_noise,
        guidance=config.guidance_scale,
        kl=config.beta > 0,
        offload_reference=config.offload_reference,
        checkpointing=bool(config.gradient_checkpointing or getattr(config, "activation_checkpointing", None)),
        ema=config.ema_decay is not None,
        gather=config.gather_for_rollout,
        unload_encoders=config.unload_text_encoders is not False and config.precompute_prompts,
        max_sequence_length=config.max_sequence_length,
        prompts=prompts,
        rewards_gb=rewards_gb,
    )


def _windows(config: Any) -> tuple[range, ...]:
    from ..policy.sampler import sde_window

    steps, size, where = config.num_inference_steps, config.sde_window_size, config.sde_window_range
    first = sde_window(steps, size, where, 0, 0)  # raises where it does not fit
    if size is None:
        return (first,)
    low, high = where or (0, min(max(steps // 2, size), steps - 1))
    return tuple(range(start, start + size) for start in range(low, high - size + 1))
