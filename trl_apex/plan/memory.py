"""Memory on one GPU, by part and by phase."""

from dataclasses import dataclass

import torch

from ..policy.base import DiffusionPolicy
from .measure import peak_bytes, saved_bytes
from .settings import PlanSettings
from .shapes import Shapes

CONTEXT_GB = 1.0
"""An allowance for the CUDA context, its libraries and fragments."""


def state_bytes(trained: int, frozen: int, half: bool, zero_stage: int, gpus: int) -> dict[str, float]:
    """Weights, gradients and optimizer states of one GPU.

    ```
    half precision, stage 0 (plain data parallelism, float32 weights, autocast):  4 N | 4 N | 8 N
    half precision, stages 1 to 3 (DeepSpeed):                                    2 N | 2 N | 12 N (float32 copy and Adam)
    float32:                                                                      4 N | 4 N | 8 N
    stage 1 divides the last by the number of GPUs, stage 2 gradients too, stage 3 weights too; frozen weights: 2 or 4 each
    ```

    Args:
        trained (`int`): N, parameters that are trained.
        frozen (`int`): parameters that are not, held on every GPU beside them.
        half (`bool`): bf16 or fp16.
        zero_stage (`int`): of DeepSpeed.
        gpus (`int`): that share.

    Example:
        ```python
        >>> {name: round(size / 1e9, 1) for name, size in state_bytes(2_243_000_000, 0, True, 2, 8).items()}
        {'weights': 4.5, 'gradients': 0.6, 'master + Adam': 3.4}

        ```
    """
    width = 2 if half and zero_stage > 0 else 4
    weights = trained * width + frozen * (2 if half else 4)
    parts = {
        "weights": (weights, 3),
        "gradients": (trained * width, 2),
        "master + Adam": (trained * (12 if width == 2 else 8), 1),
    }
    return {name: size / (gpus if zero_stage >= stage else 1) for name, (size, stage) in parts.items()}


@dataclass(frozen=True)
class PerRow:
    """What one image takes, in bytes, whatever the batch.

    Args:
        saved, saved_checkpointed (`int`): kept by a forward pass for its backward pass, without and with gradient
            checkpointing.
        inference (`int`): most that a forward pass without gradients takes at one time.
        decode (`int`): most that decoding an image takes.
        embedding (`int`): the prompt's embeddings.
    """

    saved: int
    saved_checkpointed: int
    inference: int
    decode: int
    embedding: int


def measure_rows(shapes: Shapes, settings: PlanSettings) -> PerRow:
    """Run the denoiser and the VAE on the meta device for one image, as training would call them."""
    policy = shapes.policy
    dtype = torch.bfloat16 if settings.half else torch.float32
    latents = torch.empty(1, *policy.latent_shape(settings.height, settings.width), device="meta")
    embeddings = shapes.embeddings(1, settings.max_sequence_length, dtype)
    lora = settings.lora_rank > 0
    denoiser = _prepared(policy, settings, lora, dtype)
    autocast = dtype if settings.half and (lora or settings.zero_stage == 0) else None
    timesteps = torch.empty(1, device="meta")

    def forward() -> torch.Tensor:
        return policy.predict(denoiser, latents, timesteps, embeddings, settings.guidance)

    try:
        policy.denoiser.disable_gradient_checkpointing()
        saved = saved_bytes(denoiser, forward, autocast)
        policy.denoiser.enable_gradient_checkpointing()
        checkpointed = saved_bytes(denoiser, forward, autocast)
        inference = peak_bytes(denoiser, forward, autocast)
    finally:
        policy.denoiser.disable_gradient_checkpointing()
        if lora:
            denoiser.unload()
    vae = torch.nn.Module.to(policy.pipeline.vae, dtype)
    return PerRow(
        saved=saved,
        saved_checkpointed=checkpointed,
        inference=inference,
        decode=peak_bytes(vae, lambda: policy.decode(latents)),
        embedding=sum(value.numel() * value.element_size() for value in embeddings.values()),
    )


def _prepared(policy: DiffusionPolicy, settings: PlanSettings, lora: bool, dtype: torch.dtype):
    denoiser = policy.denoiser
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.nn.Module.to(denoiser, dtype).requires_grad_(False)
        targets = list(settings.lora_targets or policy.lora_targets)
        return get_peft_model(denoiser, LoraConfig(r=settings.lora_rank, target_modules=targets)).train()
    half = settings.half and settings.zero_stage > 0
    return torch.nn.Module.to(denoiser, dtype if half else torch.float32).requires_grad_(True).train()


@dataclass(frozen=True)
class Memory:
    """Gigabytes (1e9 bytes) on one GPU.

    Args:
        always (`dict[str, float]`): what stays for the whole run.
        phases (`dict[str, dict[str, float]]`): what "encoding prompts", "rollout" and "update" take beside it.
    """

    always: dict[str, float]
    phases: dict[str, dict[str, float]]

    def total(self, phase: str) -> float:
        return sum(self.always.values()) + sum(self.phases[phase].values())

    @property
    def peak(self) -> float:
        return max(map(self.total, self.phases))

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)


def memory(shapes: Shapes, settings: PlanSettings, rows: PerRow, batched_guidance: bool) -> Memory:
    """What one GPU holds, from shapes alone.

    Args:
        shapes ([`Shapes`]): the model.
        settings ([`PlanSettings`]): the run.
        rows ([`PerRow`]): of [`measure_rows`], for the same size, precision and way of training.
        batched_guidance (`bool`): whether guidance takes a second branch in this family.
    """
    lora = settings.lora_rank > 0
    trained = shapes.parameters
    if lora:
        trained = shapes.adapter_parameters(settings.lora_rank, list(settings.lora_targets or ()) or None)
    frozen = shapes.parameters if lora else 0
    state = state_bytes(trained, frozen, settings.half, settings.zero_stage, settings.gpus)
    width, shards = (2 if settings.half else 4), (settings.gpus if settings.zero_stage == 3 else 1)
    trained_width = 2 if settings.half and settings.zero_stage > 0 else 4
    branches = 2 if batched_guidance and settings.guidance != 1.0 else 1
    here, chunk, rows_now = settings.samples_here, settings.rollout_batch, settings.rows_per_forward * branches
    encoders = sum(shapes.encoders.values()) * width

    always = {f"denoiser {name}": size for name, size in state.items()}
    always["denoiser buffers"] = shapes.buffer * (width if lora or settings.zero_stage else 4)
    if settings.half and not lora and settings.zero_stage == 0:
        always["half-precision copies (autocast)"] = trained * 2
    if settings.gpus > 1 and settings.zero_stage == 0:
        always["gradient buckets (data parallel)"] = state["gradients"]
    if settings.ema:
        always["moving average"] = trained * trained_width / shards
    if settings.kl and not lora and not settings.offload_reference:
        always["reference"] = trained * trained_width / shards
    always["VAE"] = shapes.vae * width
    if not settings.unload_encoders:
        always["text encoders"] = encoders
    latent = torch.Size(shapes.policy.latent_shape(settings.height, settings.width)).numel() * 4
    window = len(settings.windows[0])
    always["trajectories and images"] = here * (latent * (window + 1) + 12 * settings.height * settings.width)
    always["reward networks"] = settings.rewards_gb * 1e9
    always["CUDA context (allowance)"] = CONTEXT_GB * 1e9

    rollout: dict[str, float] = {"noise and embeddings": chunk * (latent * (window + 3) + rows.embedding * branches)}
    rollout["denoising or decoding"] = chunk * max(rows.inference * branches, rows.decode)
    if settings.zero_stage == 3 and settings.gather and settings.gpus > 1:
        whole = (trained + frozen) * width
        rollout["gathered weights"] = whole - whole / settings.gpus
    update: dict[str, float] = {"embeddings": rows_now * rows.embedding}
    if settings.checkpointing:
        update["activations (checkpointed)"] = rows_now * rows.saved_checkpointed
        update["one live block"] = rows_now * max(rows.saved - rows.saved_checkpointed, 0) / shapes.blocks
    else:
        update["activations"] = rows_now * rows.saved
    if settings.kl and not lora and settings.offload_reference:
        update["reference, while it is used"] = trained * trained_width / shards
    # Prompts are encoded before anything but encoders and VAE is on the device.
    encoding = {"text encoders": float(encoders), "what comes later": -sum(always.values())}
    encoding["what comes later"] += always["VAE"] + always["CUDA context (allowance)"]
    if not settings.unload_encoders:
        encoding.pop("text encoders")
        encoding["what comes later"] += encoders
    phases = {"encoding prompts": encoding, "rollout": rollout, "update": update}
    return Memory(
        {name: size / 1e9 for name, size in always.items() if size},
        {phase: {name: size / 1e9 for name, size in parts.items() if size} for phase, parts in phases.items()},
    )
