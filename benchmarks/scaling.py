"""Memory, traffic and compute of training SD3.5 on 1 to 1,024 GPUs, from the models' configurations alone.

    python benchmarks/scaling.py          # prints the tables of docs/scaling.md

Parameters, activations and operations are counted on the meta device; no weights are needed and nothing is timed.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

GPUS = (1, 8, 64, 256, 1024)
TEXT_TOKENS = 77 + 256
LORA_RANK = 32
# Configurations of stabilityai/stable-diffusion-3.5-medium and -large.
MODELS = {
    "SD3.5-M": {"num_layers": 24, "heads": 24, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))},
    "SD3.5-L": {"num_layers": 38, "heads": 38, "pos_embed_max_size": 192, "dual_attention_layers": ()},
}
ENGINES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3 / FSDP2")


@dataclass(frozen=True)
class Counts:
    """What one model consists of, in numbers of elements."""

    parameters: int
    position_buffer: int
    lora: int
    largest_block: int


def denoiser(name: str, lora: bool = False) -> nn.Module:
    """The transformer of a model, on the meta device."""
    from diffusers import SD3Transformer2DModel

    entry = MODELS[name]
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=entry["num_layers"],
            attention_head_dim=64,
            num_attention_heads=entry["heads"],
            caption_projection_dim=64 * entry["heads"],
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            pos_embed_max_size=entry["pos_embed_max_size"],
            dual_attention_layers=entry["dual_attention_layers"],
            qk_norm="rms_norm",
        )
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    from trl_apex.policy.sd3 import SD3Policy

    with torch.device("meta"):
        return get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules=list(SD3Policy.lora_targets)))


@cache
def counts(name: str) -> Counts:
    """Elements of a model, counted."""
    model, adapted = denoiser(name), denoiser(name, lora=True)
    return Counts(
        parameters=sum(p.numel() for p in model.parameters()),
        position_buffer=sum(b.numel() for b in model.buffers()),
        lora=sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        largest_block=max(sum(p.numel() for p in block.parameters()) for block in model.transformer_blocks),
    )


def _inputs(name: str, pixels: int) -> dict[str, torch.Tensor]:
    side = pixels // 8
    shapes = {
        "hidden_states": (1, 16, side, side),
        "encoder_hidden_states": (1, TEXT_TOKENS, 4096),
        "pooled_projections": (1, 2048),
        "timestep": (1,),
    }
    return {key: torch.empty(shape, device="meta", dtype=torch.bfloat16) for key, shape in shapes.items()}


def _bf16(model: nn.Module) -> nn.Module:
    return nn.Module.to(model, torch.bfloat16)  # diffusers' own warns of weights that would lose precision


def activation_bytes(name: str, pixels: int, lora: bool, checkpointing: bool) -> int:
    """Bytes that one sample keeps for the backward in bf16, with fused attention, which keeps no attention matrices.

    With checkpointing, one block's share of the other number comes on top while that block is recomputed.
    """
    model = _bf16(denoiser(name, lora)).train()
    if checkpointing:
        (model.base_model.model if lora else model).enable_gradient_checkpointing()
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # a storage's address is its identity only as long as it lives

    def pack(tensor):
        storage = tensor.untyped_storage()
        attention_matrix = tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2] > TEXT_TOKENS
        if not attention_matrix and storage._cdata not in weights and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**_inputs(name, pixels), return_dict=False)
    return sum(kept.values())


def forward_flops(name: str, pixels: int) -> int:
    """Operations of one forward over one sample (a multiplication and an addition count as two)."""
    model = _bf16(denoiser(name))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**_inputs(name, pixels), return_dict=False)
    return counter.get_total_flops()


def state_bytes(c: Counts, lora: bool, engine: str, gpus: int) -> float:
    """Bytes of weights, gradients and optimizer state on each GPU, in bf16 with float32 masters.

    An element that trains takes 2 (bf16 weight) + 2 (bf16 gradient) + 12 (float32 master and Adam's two moments) = 16;
    under DDP the weight is float32 itself: 4 + 4 + 8, also 16. A frozen one takes 2. The position buffer (bf16) is on
    every GPU.
    """
    trained = c.lora if lora else c.parameters
    frozen = c.parameters if lora else 0
    share = 1 / gpus
    per_trained = {
        "DDP": 16,
        "ZeRO-1": 4 + 12 * share,
        "ZeRO-2": 2 + 14 * share,
        "ZeRO-3 / FSDP2": 16 * share,
    }[engine]
    per_frozen = 2 * share if engine == "ZeRO-3 / FSDP2" else 2
    return trained * per_trained + frozen * per_frozen + 2 * c.position_buffer


def update_traffic(c: Counts, lora: bool, engine: str, gpus: int, accumulation: int) -> float:
    """Bytes that each GPU sends for one optimizer step; a ring sends (N - 1) / N of what is exchanged."""
    trained = c.lora if lora else c.parameters
    ring = (gpus - 1) / gpus
    if engine == "DDP":
        return 2 * 4 * trained * ring  # all-reduce of float32 gradients: reduce-scatter and all-gather
    if engine in ("ZeRO-1", "ZeRO-2"):
        reductions = accumulation if engine == "ZeRO-2" else 1  # ZeRO-2 keeps no whole gradient between micro-batches
        return (2 * trained * reductions + 2 * trained) * ring
    everything = c.parameters + (c.lora if lora else 0)
    return accumulation * (2 * 2 * everything + 2 * trained) * ring  # gathered in forward and backward


def rollout_traffic(c: Counts, lora: bool, gpus: int, forwards: int) -> float:
    """Bytes that each GPU sends for the weights of one rollout under ZeRO-3 or FSDP2, by `forwards` layerwise gathers."""
    return forwards * 2 * (c.parameters + (c.lora if lora else 0)) * (gpus - 1) / gpus


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f}" if value < 1e10 else f"{value / 1e9:.1f}"


def counts_table() -> str:
    rows = []
    for name in MODELS:
        c = counts(name)
        rows.append([name, *(f"{n / 1e6:,.1f} M" for n in (c.parameters, c.position_buffer, c.lora, c.largest_block))])
    return table(["", "parameters", "position buffer", f"LoRA, rank {LORA_RANK}", "largest block"], rows)


def memory_table(lora: bool) -> str:
    rows = []
    for name in MODELS:
        c = counts(name)
        for engine in ENGINES:
            rows.append([name, engine, *(_gb(state_bytes(c, lora, engine, n)) for n in GPUS)])
    return table(["", "engine", *(f"{n:,}" for n in GPUS)], rows)


def traffic_table(lora: bool, accumulation: int = 4) -> str:
    rows = []
    for name in MODELS:
        c = counts(name)
        for engine in ENGINES:
            rows.append([name, engine, *(_gb(update_traffic(c, lora, engine, n, accumulation)) for n in GPUS)])
    return table(["", "engine", *(f"{n:,}" for n in GPUS)], rows)


def rollout_table(forwards: int = 10) -> str:
    rows = []
    for name in MODELS:
        c = counts(name)
        for label, times in (("gathered once", 1), (f"per layer, {forwards} forwards", forwards)):
            rows.append([name, label, *(_gb(rollout_traffic(c, False, n, times)) for n in GPUS)])
    return table(["", "`gather_for_rollout`", *(f"{n:,}" for n in GPUS)], rows)


def sample_table() -> str:
    rows = []
    for name in MODELS:
        for pixels in (512, 1024):
            kept = [activation_bytes(name, pixels, lora, check) for lora in (False, True) for check in (False, True)]
            rows.append([name, str(pixels), f"{forward_flops(name, pixels) / 1e12:.2f}", *map(_gb, kept)])
    header = ["", "pixels", "TFLOP a forward", "full", "full, checkpointed", "LoRA", "LoRA, checkpointed"]
    return table(header, rows)


TABLES = {
    "counts": counts_table,
    "memory of full fine-tuning": lambda: memory_table(lora=False),
    "memory of LoRA": lambda: memory_table(lora=True),
    "traffic of full fine-tuning": lambda: traffic_table(lora=False),
    "traffic of LoRA": lambda: traffic_table(lora=True),
    "rollout": rollout_table,
    "a sample": sample_table,
}

if __name__ == "__main__":
    for title, make in TABLES.items():
        print(f"{title}\n\n{make()}\n")
