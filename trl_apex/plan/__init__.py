"""Memory and compute of a training configuration, from shapes alone: no weights, no GPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

from .compute import Compute, count_passes
from .fit import check_fit
from .memory import Memory, PerRow, measure_rows, memory
from .settings import PlanSettings, settings_from_config
from .shapes import Shapes, load_shapes
from .text import describe

__all__ = ["Compute", "Memory", "PlanSettings", "count_passes", "estimator", "load_shapes", "plan_text"]


def estimator(shapes: Shapes) -> tuple[Callable[[PlanSettings], Memory], Callable[[PlanSettings], PerRow]]:
    """Functions from [`PlanSettings`] to [`Memory`] and to [`PerRow`] that measure each way of training once."""

    @cache
    def rows(height, width, rank, targets, half, sharded, length):
        settings = PlanSettings(
            height, width, lora_rank=rank, lora_targets=targets, half=half, zero_stage=int(sharded),
            max_sequence_length=length, windows=(range(1),),
        )  # fmt: skip
        return measure_rows(shapes, settings)

    def per_row(s: PlanSettings) -> PerRow:
        sharded = s.zero_stage > 0
        return rows(s.height, s.width, s.lora_rank, s.lora_targets, s.half, sharded, s.max_sequence_length)

    def estimate(settings: PlanSettings) -> Memory:
        return memory(shapes, settings, per_row(settings), shapes.policy.batched_guidance)

    return estimate, per_row


def plan_text(
    model: str,
    config: Any,
    *,
    revision: str | None = None,
    lora_rank: int = 32,
    lora_targets: list[str] | None = None,
    gpus: int = 1,
    zero_stage: int = 0,
    gpu_memory_gb: float | None = None,
    prompts: int = 0,
    rewards_gb: float = 0.0,
) -> str:
    """What a training run will take: parameters, memory by part and phase on each GPU, passes of one iteration.

    Args:
        model (`str`): hub id, short name ("sd3.5-medium") or folder in diffusers' format.
        config ([`DiffusionGRPOConfig`]): of the run; `generation_batch_size` counts the images of all GPUs.
        revision (`str`, *optional*): of a hub id.
        lora_rank (`int`): of the adapter; 0 for full fine-tuning.
        lora_targets (`list[str]`, *optional*): its layers; the family's own by default.
        gpus (`int`): processes.
        zero_stage (`int`): of DeepSpeed; 0 for none.
        gpu_memory_gb (`float`, *optional*): of one GPU, in 1e9 bytes; None accepts every plan.
        prompts (`int`): distinct prompts, for the size of their embeddings.
        rewards_gb (`float`): memory of reward networks on each GPU.

    Returns:
        `str`: some sixty lines.

    Raises:
        ValueError: if the run needs more than `gpu_memory_gb`, with what to change.
    """
    shapes = load_shapes(model, revision)
    settings = settings_from_config(
        config, shapes.policy.default_size(), lora_rank=lora_rank, lora_targets=lora_targets, gpus=gpus,
        zero_stage=zero_stage, prompts=prompts, rewards_gb=rewards_gb,
    )  # fmt: skip
    estimate, per_row = estimator(shapes)
    if gpu_memory_gb is not None:
        check_fit(settings, gpu_memory_gb, estimate)
    passes = count_passes(settings, shapes.policy.batched_guidance)
    return describe(shapes, settings, per_row(settings), estimate(settings), passes)
