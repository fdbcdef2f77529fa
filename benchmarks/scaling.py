"""Memory, traffic and compute of training SD3.5 on 1 to 1,024 GPUs, from the models' configurations alone.

    python benchmarks/scaling.py          # prints the tables and the sums of docs/scaling.md; a minute or two

Parameters, bytes, activations and operations are those of `trl-apex plan`; traffic is worked out here from the same
shapes, on the meta device. No weights are needed and nothing is timed.
"""

from functools import cache
from typing import NamedTuple

from _bench import table

from trl_apex import DiffusionGRPOConfig
from trl_apex.plan import PerRow, PlanSettings, Shapes, load_shapes, measure_rows, memory

GPUS = (1, 8, 64, 256, 1024)
MODELS = {"SD3.5-M": "sd3.5-medium", "SD3.5-L": "sd3.5-large"}
ENGINES = {"DDP": 0, "ZeRO-1": 1, "ZeRO-2": 2, "ZeRO-3 / FSDP2": 3}  # as stages of ZeRO
LORA_RANK = 32
PIXELS = (512, 1024)
SPEED = 300e12  # operations a second of one GPU, assumed
NETWORK = 50e9  # bytes a second that one GPU sends, assumed


@cache
def shapes(name: str) -> Shapes:
    return load_shapes(MODELS[name])


class Elements(NamedTuple):
    """How many elements are trained, how many are not."""

    trained: int
    frozen: int


def elements(name: str, lora: bool) -> Elements:
    parameters = shapes(name).parameters
    return Elements(shapes(name).adapter_parameters(LORA_RANK), parameters) if lora else Elements(parameters, 0)


def blocks(name: str) -> int:
    return len(shapes(name).policy.denoiser.transformer_blocks)


def largest_block(name: str) -> int:
    found = shapes(name).policy.denoiser.transformer_blocks
    return max(sum(parameter.numel() for parameter in block.parameters()) for block in found)


@cache
def settings(pixels: int, lora: bool, zero_stage: int, gpus: int = 1) -> PlanSettings:
    config = DiffusionGRPOConfig(
        output_dir="unused", use_cpu=True, bf16=True, height=pixels, width=pixels, num_generations=8,
        generation_batch_size=8 * gpus, gradient_accumulation_steps=1,
    )  # fmt: skip
    return PlanSettings(config, LORA_RANK if lora else 0, zero_stage=zero_stage, gpus=gpus)


def held_bytes(name: str, lora: bool, engine: str, gpus: int) -> float:
    """Bytes of the denoiser on each GPU, all but activations, as the planner counts them."""
    always = memory(shapes(name), settings(512, lora, ENGINES[engine], gpus)).always
    others = ("VAE", "trajectories and images", "CUDA context", "DeepSpeed buckets")
    return 1e9 * sum(size for part, size in always.items() if part not in others)


def gathered_bytes(name: str, lora: bool) -> int:
    """All weights in half precision, which `gather_for_rollout` holds during a rollout."""
    return 2 * sum(elements(name, lora))


@cache
def rows(name: str, pixels: int, lora: bool, zero_stage: int) -> PerRow:
    """What one image keeps, as the planner works it out."""
    return measure_rows(shapes(name), settings(pixels, lora, zero_stage))


@cache
def forward_flops(name: str, pixels: int) -> int:
    """Operations of one forward over one image (a multiplication and an addition count as two)."""
    return shapes(name).forward_flops(pixels, pixels, 256)


def ring(gpus: int) -> float:
    """The share of what is exchanged that each GPU of a ring sends."""
    return (gpus - 1) / gpus


def update_traffic(name: str, lora: bool, engine: str, gpus: int, accumulation: int = 4) -> float:
    """Bytes that each GPU sends for one optimizer step."""
    e = elements(name, lora)
    if engine == "DDP":
        return 2 * 4 * e.trained * ring(gpus)  # all-reduce of float32 gradients: reduce-scatter and all-gather
    if engine in ("ZeRO-1", "ZeRO-2"):
        reductions = accumulation if engine == "ZeRO-2" else 1  # ZeRO-2 keeps no whole gradient between micro-batches
        return (2 * e.trained * reductions + 2 * e.trained) * ring(gpus)
    return accumulation * (2 * 2 * (e.trained + e.frozen) + 2 * e.trained) * ring(gpus)  # gathered twice


def rollout_traffic(name: str, gpus: int, forwards: int) -> float:
    """Bytes that each GPU sends for the weights of one rollout under ZeRO-3 or FSDP2, gathered `forwards` times."""
    return forwards * gathered_bytes(name, lora=False) * ring(gpus)


def gb(value: float) -> str:
    return f"{value / 1e9:.2f}" if value < 1e10 else f"{value / 1e9:.1f}"


def millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M"


def counts_table() -> str:
    lines = []
    for name in MODELS:
        s = shapes(name)
        numbers = (s.parameters, s.buffer, s.adapter_parameters(LORA_RANK), largest_block(name))
        lines.append([name, *map(millions, numbers)])
    return table(["", "parameters", "position buffer", f"LoRA, rank {LORA_RANK}", "largest block"], lines)


def _by_gpus(of) -> str:
    lines = [[name, engine, *(gb(of(name, engine, n)) for n in GPUS)] for name in MODELS for engine in ENGINES]
    return table(["", "engine", *(f"{n:,}" for n in GPUS)], lines)


def memory_table(lora: bool) -> str:
    return _by_gpus(lambda name, engine, gpus: held_bytes(name, lora, engine, gpus))


def traffic_table(lora: bool) -> str:
    return _by_gpus(lambda name, engine, gpus: update_traffic(name, lora, engine, gpus))


def rollout_table(forwards: int = 10) -> str:
    lines = []
    for name in MODELS:
        for label, times in (("gathered once", 1), (f"per layer, {forwards} forwards", forwards)):
            lines.append([name, label, *(gb(rollout_traffic(name, n, times)) for n in GPUS)])
    return table(["", "`gather_for_rollout`", *(f"{n:,}" for n in GPUS)], lines)


def sample_table() -> str:
    lines = []
    for name in MODELS:
        for pixels in PIXELS:
            autocast, half, adapter = (rows(name, pixels, *way) for way in ((False, 0), (False, 1), (True, 0)))
            kept = (autocast.saved, half.saved, half.saved_checkpointed, adapter.saved, adapter.saved_checkpointed)
            lines.append([name, str(pixels), f"{forward_flops(name, pixels) / 1e12:.2f}", *map(gb, kept)])
    header = ["", "pixels", "TFLOP a forward", "full, DDP", "full, ZeRO", "full, checkpointed", "LoRA"]
    return table([*header, "LoRA, checkpointed"], lines)


TABLES = {
    "counts": counts_table,
    "memory of full fine-tuning": lambda: memory_table(lora=False),
    "memory of LoRA": lambda: memory_table(lora=True),
    "traffic of full fine-tuning": lambda: traffic_table(lora=False),
    "traffic of LoRA": lambda: traffic_table(lora=True),
    "rollout": rollout_table,
    "a sample": sample_table,
}


def sums() -> list[str]:
    """The sums in the page's text, as it states them."""
    medium, large = elements("SD3.5-M", False).trained, elements("SD3.5-L", False).trained
    buffer, sharded = shapes("SD3.5-M").buffer, medium * (2 + 14 / 8)
    flops = round(forward_flops("SD3.5-M", 512) / 1e12, 2)  # as the table says
    images, steps = 48 * 24, 10
    whole, window = (images * (steps + 3 * trained) for trained in (9, 3))
    at_speed = whole * flops * 1e12 / SPEED
    rollout = 16 * steps * flops * 1e12 / SPEED
    asked = {n: n * 16 / rollout for n in (8, 1024)}
    lora = elements("SD3.5-M", True)
    sent = {engine: update_traffic("SD3.5-M", False, engine, 1024) for engine in ENGINES}
    by_layer = update_traffic("SD3.5-M", True, "ZeRO-3 / FSDP2", 1024) / update_traffic("SD3.5-M", True, "DDP", 1024)
    return [
        f"{millions(medium)} x (2 + 14 / 8) = {gb(sharded)} GB, and {millions(buffer)} x 2 = {gb(2 * buffer)} GB for the "
        f"position buffer: {gb(held_bytes('SD3.5-M', False, 'ZeRO-2', 8))} GB",
        f"{millions(medium)} x (4 + 4 + 8) = {gb(16 * medium)} GB, {millions(medium)} x 2 = {gb(2 * medium)} GB for the "
        f"copies, {millions(medium)} x 4 = {gb(4 * medium)} GB for the buckets and {millions(buffer)} x 4 = "
        f"{gb(4 * buffer)} GB for the position buffer: {gb(held_bytes('SD3.5-M', False, 'DDP', 8))} GB",
        f"2 bytes each, {gb(gathered_bytes('SD3.5-M', False))} GB for M and {gb(2 * large)} GB for L. With `False` it is "
        f"one block at a time: {gb(2 * largest_block('SD3.5-M'))} and {gb(2 * largest_block('SD3.5-L'))} GB.",
        f"{images:,} x {steps + 27} x {flops:.2f} = {round(whole * flops, -2):,.0f} TFLOP",
        f"On 8 GPUs at an assumed {SPEED / 1e12:.0f} TFLOP/s each that is {at_speed / 8:.0f} s; on 64 it is "
        f"{at_speed / 64:.1f} s for the same batch. With a window of W = 3 it is {images:,} x {steps + 9} x {flops:.2f} = "
        f"{round(window * flops, -2):,.0f} TFLOP",
        f"{gb(update_traffic('SD3.5-M', True, 'DDP', 1024))} GB an update. ZeRO-3 with LoRA sends the frozen weights "
        f"around as well, {by_layer:.0f} times as much",
        f"16 x {steps} x {flops:.2f} / {SPEED / 1e12:.0f} = {rollout:.1f} s",
        f"8 GPUs ask for {asked[8]:.0f} scores/s and 1,024 for {round(asked[1024], -2):,.0f}/s",
        f"needs {-(-asked[8] // 25):.0f} GPUs beside 8, and {asked[1024] / 25:.0f} beside 1,024",
        f"an update of M takes {sent['DDP'] / NETWORK:.2f} s of sending under DDP and {sent['ZeRO-1'] / NETWORK:.2f} s "
        f"under ZeRO-1, against 16 x 3 x {flops:.2f} / {SPEED / 1e12:.0f} = {48 * flops * 1e12 / SPEED:.2f} s of compute",
        f"FSDP2 and ZeRO-3 over 1,024 GPUs send {gb(sent['ZeRO-3 / FSDP2'])} GB for it, "
        f"{sent['ZeRO-3 / FSDP2'] / NETWORK:.1f} s",
        f"({blocks('SD3.5-M')} blocks for M, {blocks('SD3.5-L')} for L)",
        f"{lora.trained * 4 / 1e6:.0f} MB of gradients under DDP",
    ]


if __name__ == "__main__":
    for title, make in TABLES.items():
        print(f"{title}\n\n{make()}\n")
    print("\n".join(sums()))
