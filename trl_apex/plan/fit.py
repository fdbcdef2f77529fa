"""Whether a plan fits, and what would make it fit."""

from collections.abc import Callable, Iterator

from .memory import Memory
from .settings import PlanSettings


def check_fit(settings: PlanSettings, gpu_memory_gb: float, estimate: Callable[[PlanSettings], Memory]) -> None:
    """Raise where the plan takes more than a GPU has.

    Args:
        settings ([`PlanSettings`]): the plan.
        gpu_memory_gb (`float`): of one GPU, 1e9 bytes each.
        estimate (`Callable`): settings to [`Memory`].

    Raises:
        ValueError: with the largest parts, and the fewest changes found that make it fit.
    """
    found = estimate(settings)
    if found.peak <= gpu_memory_gb:
        return
    phase = found.peak_phase
    parts = sorted({**found.always, **found.phases[phase]}.items(), key=lambda part: -part[1])[:3]
    largest = ", ".join(f"{name} {size:.1f}" for name, size in parts)
    raise ValueError(
        f"The plan must fit into {gpu_memory_gb:g} GB a GPU. Found {found.peak:.1f} GB during {phase} ({largest}). "
        + remedy(settings, gpu_memory_gb, estimate)
    )


def remedy(settings: PlanSettings, gpu_memory_gb: float, estimate: Callable[[PlanSettings], Memory]) -> str:
    """A sentence with the changes that make the plan fit: one if one is enough, else as many as it takes."""
    for text, changed in _changes(settings):
        if (peak := estimate(changed).peak) <= gpu_memory_gb:
            return f"Set {text}: then it takes {peak:.1f} GB."
    for with_adapter in (False, True):  # rather than give up full fine-tuning
        texts, lowest = _combine(settings, gpu_memory_gb, estimate, with_adapter)
        if lowest <= gpu_memory_gb:
            return f"Set {' and '.join(texts)}: then it takes {lowest:.1f} GB."
    done = f" Even with {' and '.join(texts)} it takes {lowest:.1f} GB." if texts else ""
    return f"No setting makes it fit.{done} Use larger or more GPUs, smaller images, or a smaller model."


def _combine(
    settings: PlanSettings, gpu_memory_gb: float, estimate: Callable[[PlanSettings], Memory], with_adapter: bool
) -> tuple[list[str], float]:
    """Make the change that helps most, again and again."""
    texts: list[str] = []
    current, lowest = settings, estimate(settings).peak
    while lowest > gpu_memory_gb:
        changes = [c for c in _changes(current) if with_adapter or not c[0].startswith("lora_r")]
        options = [(estimate(changed).peak, text, changed) for text, changed in changes]
        if not options or min(options, key=lambda o: o[0])[0] >= lowest - 1e-6:
            break
        lowest, text, current = min(options, key=lambda option: option[0])
        texts = [t for t in texts if t.split("=")[0] != text.split("=")[0]] + [text]
    return texts, lowest


def _changes(settings: PlanSettings) -> Iterator[tuple[str, PlanSettings]]:
    """Single changes, those that cost least first."""
    if not settings.unload_encoders:
        yield "unload_text_encoders=true", settings.but(unload_encoders=True)
    batch = settings.rollout_batch
    while batch > 1:
        batch //= 2
        yield f"rollout_batch_size={batch}", settings.but(rollout_batch=batch)
    if not settings.checkpointing:
        yield "gradient_checkpointing=true", settings.but(checkpointing=True)
    micro = settings.micro_batch
    while micro % 2 == 0:
        micro //= 2
        accumulation = settings.accumulation * settings.micro_batch // micro
        changed = settings.but(micro_batch=micro, accumulation=accumulation)
        yield f"per_device_train_batch_size={micro} with gradient_accumulation_steps={accumulation}", changed
    if settings.kl and settings.lora_rank == 0 and not settings.offload_reference:
        yield "offload_reference=true", settings.but(offload_reference=True)
    if settings.gpus > 1:
        for stage in range(settings.zero_stage + 1, 4):
            yield f"zero_stage={stage}", settings.but(zero_stage=stage)
    if settings.zero_stage == 3 and settings.gather:
        yield "gather_for_rollout=false", settings.but(gather=False)
    if settings.lora_rank == 0:
        yield "lora_r=32", settings.but(lora_rank=32)
