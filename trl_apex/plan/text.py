"""A plan as text."""

from .compute import Compute
from .memory import CONTEXT_GB, Memory, PerRow, state_bytes
from .settings import PlanSettings
from .shapes import Shapes


def describe(shapes: Shapes, settings: PlanSettings, rows: PerRow, found: Memory, passes: Compute) -> str:
    """Parameters, memory by part and rank, and passes of one iteration."""
    adapter = shapes.adapter_parameters(
        settings.lora_rank or 32, list(settings.lora_targets) if settings.lora_targets and settings.lora_rank else None
    )
    return "\n\n".join(
        [
            f"{shapes.name} at {settings.width} x {settings.height} pixels",
            _parameters(shapes, settings.lora_rank or 32, adapter),
            _states(shapes, adapter, settings.gpus),
            _rows(settings, rows),
            _memory(settings, found),
            _passes(settings, passes),
        ]
    )


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M"


def _parameters(shapes: Shapes, rank: int, adapter: int) -> str:
    lines = [f"  denoiser          {_millions(shapes.parameters):>12}"]
    if shapes.buffer:
        lines.append(f"  position buffer   {_millions(shapes.buffer):>12}")
    lines.append(f"  LoRA adapter r{rank:<4}{_millions(adapter):>12}")
    lines.append(f"  VAE               {_millions(shapes.vae):>12}")
    lines += [f"  {name:<18}{_millions(size):>12}" for name, size in shapes.encoders.items()]
    return "Parameters\n" + "\n".join(lines)


def _states(shapes: Shapes, adapter: int, gpus: int) -> str:
    head = f"{'':<16}{'weights':>10}{'gradients':>11}{'master+Adam':>13}{'sum (half)':>12}{'sum (float32)':>15}"
    lines = [f"GB of weights and optimizer on each of {gpus} GPU(s)", head]
    for name, trained, frozen in (("LoRA", adapter, shapes.parameters), ("full", shapes.parameters, 0)):
        for stage in range(4):
            half = [size / 1e9 for size in state_bytes(trained, frozen, True, stage, gpus).values()]
            full = sum(state_bytes(trained, frozen, False, stage, gpus).values()) / 1e9
            label = f"{name}, ZeRO-{stage}" if stage else f"{name}, no ZeRO"
            lines.append(f"{label:<16}{half[0]:>10.2f}{half[1]:>11.2f}{half[2]:>13.2f}{sum(half):>12.2f}{full:>15.2f}")
    return "\n".join(lines)


def _rows(settings: PlanSettings, rows: PerRow) -> str:
    total = f", {rows.embedding * settings.prompts / 1e9:.1f} GB for all" if settings.prompts else ""
    return (
        "Per image and pass\n"
        f"  activations kept for the backward pass  {rows.saved / 1e9:8.2f} GB\n"
        f"  the same with gradient checkpointing    {rows.saved_checkpointed / 1e9:8.2f} GB\n"
        f"  forward pass of the rollout             {rows.inference / 1e9:8.2f} GB\n"
        f"  decoding                                {rows.decode / 1e9:8.2f} GB\n"
        f"  prompt embeddings (CPU or disk)         {rows.embedding / 1e6:8.2f} MB a prompt{total}"
    )


def _memory(settings: PlanSettings, found: Memory) -> str:
    kind = f"LoRA r{settings.lora_rank}" if settings.lora_rank else "full fine-tuning"
    zero = f"ZeRO-{settings.zero_stage}" if settings.zero_stage else "no ZeRO"
    precision = "half precision" if settings.half else "float32"
    lines = [f"This run: {kind}, {zero}, {precision}, {settings.gpus} GPU(s); GB on each"]
    lines += [f"  {name:<40}{size:8.2f}" for name, size in found.always.items()]
    for phase, parts in found.phases.items():
        lines += [f"  {phase}: {name}".ljust(42) + f"{size:8.2f}" for name, size in parts.items()]
        lines.append(f"  = {phase}".ljust(42) + f"{found.total(phase):8.2f}")
    note = "" if settings.rewards_gb else " Reward networks come on top: pass their memory as rewards_gb."
    lines.append(f"Peak {found.peak:.1f} GB, during {found.peak_phase}.{note} ({CONTEXT_GB:g} GB is an allowance.)")
    return "\n".join(lines)


def _passes(settings: PlanSettings, passes: Compute) -> str:
    rows = [
        ("rollout forwards", passes.rollout_calls, passes.rollout_rows),
        ("update forwards", passes.update_calls, passes.update_rows),
        ("reference forwards (KL)", passes.reference_calls, passes.reference_rows),
        ("backwards", passes.backward_calls, passes.backward_rows),
    ]
    lines = [
        f"One iteration on each GPU: {settings.samples_here} images, {passes.updates} optimizer step(s)",
        f"  {'':<26}{'calls':>8}{'image passes':>15}",
    ]
    lines += [f"  {name:<26}{calls:>8,}{images:>15,.0f}" for name, calls, images in rows]
    if passes.recomputed_rows:
        lines.append(f"  {'recomputed (checkpoints)':<26}{'':>8}{passes.recomputed_rows:>15,}")
    if passes.rows_saved_by_sharing:
        lines.append(f"  {'spared by sharing noise':<26}{'':>8}{passes.rows_saved_by_sharing:>15,.0f}")
    return "\n".join(lines)
