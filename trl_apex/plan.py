"""What a training run takes of each GPU, by arithmetic from parameter counts and shapes.

Everything here is an estimate, and none of it was measured on a GPU. Models are built on the meta device by diffusers' own
classes, without weights, to count their parameters. Activations are tensors per token and layer times a constant.
"""

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .diffusion.families import FAMILIES, base
from .diffusion.families.base import DiffusionPolicy

Component = tuple[str, dict[str, Any]]
"""The class of a pipeline's component, and its configuration."""
PUBLISHED = json.loads((Path(__file__).parent / "published_models.json").read_text(encoding="utf-8"))
"""What decides shapes, and differs from the classes' defaults, in published configurations."""
CONFIGS: dict[str, tuple[str, dict[str, Component]]] = {
    name: (pipeline, {key: tuple(PUBLISHED["components"][value]) for key, value in components.items()})
    for name, (pipeline, components) in PUBLISHED["models"].items()
}
"""Pipeline class and components of published models."""


# Models


@dataclass(frozen=True)
class Shapes:
    """A model without its weights.

    Args:
        name (`str`): hub id or folder.
        policy ([`DiffusionPolicy`]): over a pipeline on the meta device.
        encoders (`dict[str, int]`): parameters of each text encoder.
    """

    name: str
    policy: DiffusionPolicy
    encoders: dict[str, int]

    @cached_property
    def parameters(self) -> int:
        """Of the denoiser."""
        return count(self.policy.denoiser)

    @cached_property
    def buffer(self) -> int:
        """Elements that the denoiser holds beside its parameters, such as a table of positions."""
        return sum(buffer.numel() for buffer in self.policy.denoiser.buffers())

    @cached_property
    def vae(self) -> int:
        return count(self.policy.pipeline.vae)

    def adapter_parameters(self, rank: int, targets: list[str] | tuple[str, ...] | None = None) -> int:
        """Of a LoRA adapter: `rank (inputs + outputs)` for every layer whose name ends as a target, the family's by default.

        Raises:
            ValueError: if a target matches no layer.
        """
        wanted = tuple(targets or self.policy.lora_targets)
        found, total = set(), 0
        for name, module in self.policy.denoiser.named_modules():
            hit = {target for target in wanted if f".{name}".endswith(f".{target}")}
            if hit and isinstance(module, nn.Linear | nn.Conv2d):
                outputs = module.weight.shape[0]
                total += rank * (module.weight.numel() // outputs + outputs)
                found |= hit
        if found != set(wanted):
            raise ValueError(
                f"Every LoRA target must match a linear layer of {type(self.policy.denoiser).__name__}. Found none for "
                f"{sorted(set(wanted) - found)}. Correct `lora_target_modules`."
            )
        return total

    def embeddings(self, rows: int, max_sequence_length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Prompt embeddings of `rows` prompts, on the meta device."""
        config, pipeline = self.policy.denoiser.config, type(self.policy.pipeline).__name__
        tokens = {"StableDiffusion3Pipeline": 77 + max_sequence_length, "FluxPipeline": max_sequence_length}
        width = getattr(config, "joint_attention_dim", None) or config.cross_attention_dim
        shapes: dict[str, tuple[int, ...]] = {
            "encoder_hidden_states": (tokens.get(pipeline, 77), width)
        }  # CLIP's 77 tokens
        if pipeline in tokens:
            shapes["pooled_projections"] = (config.pooled_projection_dim,)
        elif pipeline == "StableDiffusionXLPipeline":
            size = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            shapes["text_embeds"] = (size,)
        return {name: torch.empty(rows, *shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def load_shapes(model: str, revision: str | None = None) -> Shapes:
    """Build a model on the meta device, from configurations alone.

    Args:
        model (`str`): a folder in diffusers' format, a model of `CONFIGS` by hub id or short name, or another hub id (only
            its small configuration files are read).
        revision (`str`, *optional*): of a hub id.

    Raises:
        ValueError: if it is none of these, or of no supported family.
    """
    import diffusers

    name = model if Path(model).is_dir() else PUBLISHED["short names"].get(model.lower(), model)
    pipeline_name, components = CONFIGS.get(name) or _read_components(name, revision)
    if pipeline_name not in FAMILIES:
        raise ValueError(
            f"`model` must be of a supported family: {', '.join(FAMILIES)}. Found {pipeline_name}. Use another model."
        )
    parts = {key: _build(*value) for key, value in components.items()}
    cls, family = getattr(diffusers, pipeline_name), FAMILIES[pipeline_name]
    parameters = inspect.signature(cls.__init__).parameters
    required = [key for key, p in parameters.items() if key != "self" and p.default is inspect.Parameter.empty]
    given = {key: parts.get(key) for key in {*required, *parts} if key in parameters}
    if "requires_safety_checker" in parameters:
        given["requires_safety_checker"] = False
    encoders = {key: count(parts[key]) for key in family.encoder_names if key in parts}
    return Shapes(name, family(cls(**given)), encoders)


def _build(class_name: str, config: dict[str, Any]) -> Any:
    import diffusers
    import transformers

    with torch.device("cpu" if class_name.endswith("Scheduler") else "meta"):
        if hasattr(diffusers, class_name):
            return getattr(diffusers, class_name).from_config(config)
        cls = getattr(transformers, class_name)
        return cls(cls.config_class(**{key: value for key, value in config.items() if not key.startswith("_")}))


def _read_components(model: str, revision: str | None) -> tuple[str, dict[str, Component]]:
    """Pipeline class and components, as in `CONFIGS`, of a folder or a model on the Hub."""
    import diffusers
    import transformers

    try:
        index = diffusers.DiffusionPipeline.load_config(model, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            "A plan needs a folder in diffusers' format, a hub id that can be reached, or one of "
            f"{', '.join(CONFIGS)}. Found {model!r}: {str(error).splitlines()[0]}."
        ) from error
    components = {}
    for name, value in index.items():
        library, class_name = value if isinstance(value, list) else ("", "")
        where = {"subfolder": name, "revision": revision}
        if library == "diffusers" and hasattr(diffusers, class_name):
            components[name] = (class_name, dict(getattr(diffusers, class_name).load_config(model, **where)))
        elif library == "transformers" and name.startswith("text_encoder") and hasattr(transformers, class_name):
            config_class = getattr(transformers, class_name).config_class
            components[name] = (class_name, config_class.from_pretrained(model, **where).to_dict())
    return index["_class_name"], components


# Settings


@dataclass(frozen=True)
class PlanSettings:
    """A configuration of a trainer, and what decides memory beside it.

    Args:
        config ([`DiffusionGRPOConfig`]): `generation_batch_size` counts the images of all GPUs.
        lora_r (`int`): rank of the adapter; 0 for full fine-tuning.
        lora_targets (`list[str]`, *optional*): its layers; the family's own by default.
        gpus (`int`), zero_stage (`int`): processes, and stage of DeepSpeed (0 for none).
        rewards_gb (`float`): memory of reward networks on each GPU.
    """

    config: Any
    lora_r: int = 32
    lora_targets: list[str] | tuple[str, ...] | None = None
    gpus: int = 1
    zero_stage: int = 0
    rewards_gb: float = 0.0

    def __post_init__(self) -> None:
        images = self.config.generation_batch_size
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"`zero_stage` must be 0, 1, 2 or 3. Found {self.zero_stage}. Use 0 for none.")
        if self.gpus < 1 or images % self.gpus:
            gpus = max(self.gpus, 1)
            raise ValueError(
                "`generation_batch_size`, the images of one iteration over all GPUs, must be a multiple of their number. "
                f"Found {images} and {self.gpus}. Use e.g. {-(-images // gpus) * gpus}."
            )
        rows, update = self.images * self.window, self.rows * self.config.gradient_accumulation_steps
        if rows % update:
            raise ValueError(
                "An iteration must split into whole updates: images per GPU x trained steps must be a multiple of "
                f"per_device_train_batch_size x timestep_batch_size x gradient_accumulation_steps. Found {rows} rows and "
                f"{update} an update. Change one of them."
            )

    def but(self, **changes: Any) -> "PlanSettings":
        """With other values of these fields, or of the configuration's."""
        own = {key: changes.pop(key) for key in list(changes) if key in {f.name for f in fields(self)}}
        config = copy.copy(self.config)
        for key, value in changes.items():
            setattr(config, key, value)
        return replace(self, **{"config": config, **own})

    @property
    def images(self) -> int:
        """Of one iteration on one GPU."""
        return self.config.generation_batch_size // self.gpus

    @property
    def chunk(self) -> int:
        """Images sampled at a time."""
        return min(self.config.rollout_batch_size or self.images, self.images)

    @property
    def rows(self) -> int:
        """Of one forward pass of an update."""
        return self.config.per_device_train_batch_size * self.config.timestep_batch_size

    @property
    def window(self) -> int:
        """Rows of one image that are trained: one a stochastic step."""
        return self.config.rows_per_image

    @property
    def half(self) -> bool:
        return bool(self.config.bf16 or self.config.fp16)

    @property
    def unloads_encoders(self) -> bool:
        return self.config.precompute_prompts and self.config.unload_text_encoders is not False

    @property
    def own_reference(self) -> bool:
        """Whether the KL divergence needs a second denoiser: an adapter can be switched off instead."""
        return self.config.beta > 0 and self.lora_r == 0

    def size(self, policy: DiffusionPolicy) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = policy.default_size()
        return self.config.height or height, self.config.width or width


# Memory

CONTEXT = 1e9
"""Bytes for the CUDA context and its libraries."""
FRAGMENTATION = 0.15
"""Share added to what comes and goes in a phase."""
BUCKET = 500_000_000
"""Elements of each of DeepSpeed's two buckets under ZeRO-1 and 2, its default."""
KEPT = {"LoRA": 22, "half": 29, "autocast": 37}
"""Tensors of [tokens, width], at 2 bytes an element, that a block keeps for its backward pass with fused attention. Inputs of
two norms and their modulated outputs 4, q k v 3 and their normed q k 2, attention's output 1, the feed-forward network's
hidden layer before and after GELU 8, gated outputs and residuals 4: 22. Training the weights keeps their inputs as well: 29;
and float32 norms under autocast: 37."""
KEPT_DUAL = {"LoRA": 9, "half": 14, "autocast": 19}
"""The same for the second attention of SD3.5-medium's first blocks, over image tokens alone."""
KEPT_SINGLE = {"LoRA": 16, "half": 25, "autocast": 29}
"""The same in FLUX's single blocks, whose attention and feed-forward network share norm and output."""
KEPT_UNET = {"LoRA": 32, "half": 29, "autocast": 36}
KEPT_RESNET = {"LoRA": 14, "half": 10, "autocast": 14}
"""The same in a UNet's transformer layers (gated hidden layer, cross-attention) and ResNet layers (norms, SiLU, convolutions)."""
LIVE = 12
"""Tensors of [tokens, width] at the peak of a forward pass without gradients: residual and norm, hidden layer before and after
GELU; half as many again in FLUX's single blocks, where attention and hidden layer are there at once."""
PROBED = 4
"""Float32 tensors of [tokens, width] that the gradient probe keeps of a block: the inputs of the adapters of q, k, v and output,
which autocast keeps in half precision. Elsewhere the probe shares what autograd keeps."""
DECODING = 3
"""Tensors of full resolution and `block_out_channels[1]` channels at the peak of the VAE."""


class PerRow(NamedTuple):
    """Bytes of one image."""

    saved: float  # for its backward pass
    saved_checkpointed: float
    block: float  # the largest that checkpointing recomputes
    inference: float  # at the peak of a forward pass without gradients
    decode: float
    embedding: float  # of its prompt
    probed: float  # what the gradient probe keeps


def measure_rows(shapes: Shapes, settings: PlanSettings) -> PerRow:
    """The bytes of one image: `tensors x tokens x width x bytes`, block by block."""
    s, config = settings, settings.config
    width, autocast = (2 if s.half else 4), s.half and s.zero_stage == 0
    hidden, kept, live = zip(
        *_blocks(shapes, s, "LoRA" if s.lora_r else "autocast" if autocast else "half"), strict=True
    )
    pixels = torch.Size(s.size(shapes.policy)).numel()
    channels = shapes.policy.pipeline.vae.config.block_out_channels[:2][-1]
    embeddings = shapes.embeddings(1, config.max_sequence_length, torch.bfloat16 if s.half else torch.float32)
    probes = bool(getattr(config, "gradient_probe", False)) and s.lora_r > 0 and autocast
    return PerRow(
        saved=width * sum(kept),
        saved_checkpointed=width * sum(hidden),
        block=width * max(kept),
        inference=width * max(live),
        decode=width * DECODING * channels * pixels,
        embedding=sum(value.nbytes for value in embeddings.values()),
        probed=probes * 4 * PROBED * (max(hidden) if config.activation_checkpointing else sum(hidden)),
    )


def _blocks(shapes: Shapes, settings: PlanSettings, kind: str) -> list[tuple[int, int, int]]:
    """Of every block, elements of one hidden state `[tokens, width]`, kept for the backward pass, and live without one."""
    policy, denoiser, config = shapes.policy, shapes.policy.denoiser, shapes.policy.denoiser.config
    _, height, width = policy.latent_shape(*settings.size(policy))
    if hasattr(denoiser, "transformer_blocks"):
        image = height * width // (policy.size_multiple() // policy.vae_scale_factor) ** 2
        prompt = shapes.embeddings(1, settings.config.max_sequence_length, torch.float32)["encoder_hidden_states"]
        channels = config.num_attention_heads * config.attention_head_dim
        one, dual = (image + prompt.shape[1]) * channels, image * channels
        has_dual = getattr(config, "dual_attention_layers", ())
        blocks = [
            (one, KEPT[kind] * one + (KEPT_DUAL[kind] * dual if i in has_dual else 0), LIVE * one)
            for i in range(len(denoiser.transformer_blocks))
        ]
        single = (one, KEPT_SINGLE[kind] * one, LIVE * one * 3 // 2)
        return blocks + [single] * len(getattr(denoiser, "single_transformer_blocks", ()))
    blocks, last = [], len(config.block_out_channels) - 1
    parts = [(block, i) for i, block in enumerate(denoiser.down_blocks)] + [(denoiser.mid_block, last)]
    parts += [(block, last - i) for i, block in enumerate(denoiser.up_blocks)]
    for block, level in parts:
        one = block.resnets[-1].out_channels * height * width // 4**level
        layers = sum(len(a.transformer_blocks) for a in getattr(block, "attentions", None) or ())
        # Skip connections are joined to the inputs: more to keep, and twice as much to hold at one time.
        blocks += [(one * 5 // 2, KEPT_UNET[kind] * one, 2 * LIVE * one)] * layers
        blocks += [(one * 5 // 2, KEPT_RESNET[kind] * one, 2 * LIVE * one)] * len(block.resnets)
    return blocks


def state_bytes(trained: int, frozen: int, half: bool, zero_stage: int, gpus: int) -> dict[str, float]:
    """Weights, gradients and optimizer states of one GPU.

    ```
    half precision, stage 0 (plain data parallelism, float32 weights, autocast):  4 N | 4 N | 8 N
    half precision, stages 1 to 3 (DeepSpeed):                                    2 N | 2 N | 12 N (float32 copy and Adam)
    float32:                                                                      4 N | 4 N | 8 N
    stage 1 divides the last by the number of GPUs, stage 2 gradients too, stage 3 weights too; frozen weights: 2 or 4 each
    ```

    Args:
        trained (`int`), frozen (`int`): N, parameters that are trained, and those held on every GPU beside them.
        half (`bool`): bf16 or fp16.
        zero_stage (`int`), gpus (`int`): of DeepSpeed, and how many share.

    Example:
        ```python
        >>> {name: round(size / 1e9, 1) for name, size in state_bytes(2_243_000_000, 0, True, 2, 8).items()}
        {'weights': 4.5, 'gradients': 0.6, 'master + Adam': 3.4}

        ```
    """
    width = 2 if half and zero_stage > 0 else 4
    weights = trained * width + frozen * (2 if half else 4)
    adam = trained * (12 if width == 2 else 8)
    parts = {"weights": (weights, 3), "gradients": (trained * width, 2), "master + Adam": (adam, 1)}
    return {name: size / (gpus if zero_stage >= stage else 1) for name, (size, stage) in parts.items()}


ALWAYS, ENCODING, ROLLOUT, UPDATE = "always", "encoding prompts", "rollout", "update"


@dataclass(frozen=True)
class Memory:
    """Gigabytes (1e9 bytes) on one GPU, by part."""

    always: dict[str, float]  # stays for the whole run
    phases: dict[str, dict[str, float]]  # rollout and update beside it; all that encoding prompts takes
    formulas: dict[str, str]

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values()) + (sum(self.always.values()) if phase != ENCODING else 0)

    @property
    def peak(self) -> float:
        return max(map(self.total, self.phases))

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)


def memory(shapes: Shapes, settings: PlanSettings) -> Memory:
    """What one GPU holds: every part with its phase and its formula."""
    s, c, policy, row = settings, settings.config, shapes.policy, measure_rows(shapes, settings)
    lora, zero, gpus, half = s.lora_r > 0, s.zero_stage, s.gpus, (2 if s.half else 4)
    trained = shapes.adapter_parameters(s.lora_r, s.lora_targets) if lora else shapes.parameters
    frozen = shapes.parameters if lora else 0
    own = half if zero else 4  # bytes of a trained parameter; `half` is that of all others
    shards = gpus if zero == 3 else 1
    parts: dict[str, dict[str, float]] = {ALWAYS: {}, ENCODING: {}, ROLLOUT: {}, UPDATE: {}}
    formulas: dict[str, str] = {}

    def add(phase: str, name: str, size: float, formula: str) -> None:
        if size:
            parts[phase][name], formulas[name] = size / 1e9, formula

    n, model = f"{trained / 1e6:,.1f} M trained", f"{shapes.parameters / 1e6:,.1f} M x {half}"
    by = [f" / {gpus} GPUs" if zero >= stage and gpus > 1 else "" for stage in range(4)]
    state = state_bytes(trained, frozen, s.half, zero, gpus)
    weights = f"{n} x {own} bytes" + (f" + {frozen / 1e6:,.1f} M frozen x {half}" if lora else "")
    add(ALWAYS, "denoiser weights", state["weights"], weights + by[3])
    add(ALWAYS, "denoiser gradients", state["gradients"], f"{n} x {own}" + by[2])
    add(ALWAYS, "denoiser master + Adam", state["master + Adam"], f"{n} x {12 if own == 2 else 8}" + by[1])
    table = half if lora or zero else 4
    add(ALWAYS, "denoiser buffers", shapes.buffer * table, f"{shapes.buffer / 1e6:,.1f} M positions x {table}")
    if s.half and not lora and zero == 0:
        add(ALWAYS, "half-precision copies (autocast)", trained * 2, f"{n} x 2")
    if gpus > 1 and zero == 0:
        add(ALWAYS, "gradient buckets (data parallel)", trained * 4, f"{n} x 4")
    if gpus > 1 and zero in (1, 2):
        buckets = 2 * min(BUCKET, trained) * own
        add(ALWAYS, "DeepSpeed buckets", buckets, f"2 x min({BUCKET / 1e6:.0f} M, trained) x {own}")
    if c.ema_decay is not None:
        add(ALWAYS, "moving average", trained * own / shards, f"{n} x {own}")
    if s.own_reference:
        where, name = (ROLLOUT, "reference, once an iteration") if c.offload_reference else (ALWAYS, "reference")
        add(where, name, shapes.parameters * half / shards, model)
    for phase in (ALWAYS, ENCODING):
        add(phase, "VAE", shapes.vae * half, f"{shapes.vae / 1e6:,.1f} M x {half}")
        add(phase, "CUDA context", CONTEXT, "an allowance")
    for phase in (ENCODING,) if s.unloads_encoders else (ALWAYS, ENCODING):
        texts = " + ".join(f"{size / 1e6:,.0f}" for size in shapes.encoders.values())
        add(phase, "text encoders", sum(shapes.encoders.values()) * half, f"({texts}) M x {half}")
    height, width = s.size(policy)
    latent, pixels = 4 * torch.Size(policy.latent_shape(height, width)).numel(), height * width
    kept = latent * (s.window + 1 + s.own_reference * s.window) + 12 * pixels
    add(ALWAYS, "trajectories and images", s.images * kept, f"{s.images} images x {kept / 1e6:.1f} MB")
    add(ALWAYS, "reward networks", s.rewards_gb * 1e9, "by the rewards' names, or as given")

    branches = 2 if policy.batched_guidance and c.guidance_scale != 1.0 else 1
    sampled, decoded = s.chunk * branches, min(s.chunk, max(1, base.DECODE_PIXELS // pixels))
    noise, denoising = s.chunk * latent * (s.window + 3), sampled * row.inference
    add(ROLLOUT, "noise and embeddings", noise + sampled * row.embedding, f"{s.chunk} images")
    add(ROLLOUT, "denoising", denoising, f"{sampled} predictions x {row.inference / 1e9:.3f} GB")
    size = max(decoded * row.decode - denoising, 0)
    add(ROLLOUT, "decoding, beyond denoising", size, f"{decoded} images x {row.decode / 1e9:.2f} GB - denoising")
    if zero == 3 and c.gather_for_rollout:
        size = (trained + frozen) * half * (1 - 1 / gpus)
        add(ROLLOUT, "gathered weights", size, f"{(trained + frozen) / 1e6:,.1f} M x {half}")

    rows = s.rows * branches
    add(UPDATE, "embeddings", rows * row.embedding, f"{rows} rows x {row.embedding / 1e6:.1f} MB")
    activations = {"activations": row.saved}
    if c.activation_checkpointing:
        activations = {"activations (checkpointed)": row.saved_checkpointed, "one live block": row.block}
    for name, one in {**activations, "gradient probe's inputs": row.probed}.items():
        add(UPDATE, name, rows * one, f"{rows} rows x {one / 1e9:.2f} GB")
    for phase in (ROLLOUT, UPDATE):
        size = FRAGMENTATION * sum(parts[phase].values()) * 1e9
        add(phase, f"fragmentation of the {phase}", size, f"{FRAGMENTATION:.0%} of these")
    return Memory(parts.pop(ALWAYS), parts, formulas)


REWARD_NETWORKS = {
    "pickscore": ("CLIP-H", 986e6 * 4), "hpsv2": ("CLIP-H of HPSv2", 986e6 * 4), "clip_score": ("CLIP-L", 428e6 * 4),
    "aesthetic": ("CLIP-L", 428e6 * 4), "image_reward": ("BLIP-L", 478e6 * 4), "deqa": ("a VLM of 8.2 B", 8.2e9 * 2),
}  # fmt: skip
"""Rewards by name, their network (one copy where two share it) and its bytes."""


def reward_gb(rewards: list[str] | tuple[str, ...]) -> float:
    """Gigabytes of the networks of rewards by name, one copy where two share it.

    Example:
        ```python
        >>> round(reward_gb(["ocr", "pickscore", "aesthetic", "clip_score"]), 2)
        5.66

        ```
    """
    names = [reward.split("(")[0].strip() for reward in rewards]
    return sum(dict(REWARD_NETWORKS[name] for name in names if name in REWARD_NETWORKS).values()) / 1e9


# Whether it fits


def check_fit(settings: PlanSettings, gpu_memory_gb: float, estimate: Callable[[PlanSettings], Memory]) -> None:
    """Raise where the plan takes more than `gpu_memory_gb` (1e9 bytes each).

    Raises:
        ValueError: with the largest parts, and the fewest changes found that make it fit.
    """
    found = estimate(settings)
    if found.peak <= gpu_memory_gb:
        return
    phase = found.peak_phase
    parts = {**(found.always if phase != ENCODING else {}), **found.phases[phase]}
    largest = ", ".join(f"{name} {size:.1f}" for name, size in sorted(parts.items(), key=lambda p: -p[1])[:3])
    raise ValueError(
        f"The plan must fit into {gpu_memory_gb:g} GB a GPU. Found an estimate of {found.peak:.1f} GB during {phase} "
        f"({largest}). " + remedy(settings, gpu_memory_gb, estimate)
    )


def remedy(settings: PlanSettings, gpu_memory_gb: float, estimate: Callable[[PlanSettings], Memory]) -> str:
    """A sentence with the changes that make the plan fit: the first single one that is enough, else as many as it takes."""
    lowest = estimate(settings).peak
    chosen: dict[str, Any] = {}
    for change in _changes(settings):
        if (peak := estimate(settings.but(**change)).peak) <= gpu_memory_gb:
            return f"Set {_written(change)}: then it takes {peak:.1f} GB."
    while lowest > gpu_memory_gb:
        options = [chosen | change for change in _changes(settings.but(**chosen))]
        peaks = [estimate(settings.but(**option)).peak for option in options]
        if min(peaks, default=lowest) > lowest - 1e-6:
            done = f" Even with {_written(chosen)} it takes {lowest:.1f} GB." if chosen else ""
            return f"No setting makes it fit.{done} Use larger or more GPUs, smaller images, or a smaller model."
        lowest = min(peaks)
        chosen = options[peaks.index(lowest)]
    return f"Set {_written(chosen)}: then it takes {lowest:.1f} GB."


def _changes(settings: PlanSettings) -> Iterator[dict[str, Any]]:
    """Single changes, those that cost least time first."""
    s, c = settings, settings.config
    if not s.unloads_encoders:
        yield {"precompute_prompts": True, "unload_text_encoders": True}
    if s.gpus > 1 and s.zero_stage < 2 and s.lora_r == 0:
        yield {"zero_stage": 2}
    if s.lora_r == 0:
        yield {"lora_r": 32}
    for power in reversed(range((s.chunk - 1).bit_length())):
        yield {"rollout_batch_size": 2**power}
    if not c.activation_checkpointing:
        yield {"activation_checkpointing": True}
    rows, micro = c.per_device_train_batch_size * c.gradient_accumulation_steps, c.per_device_train_batch_size
    while micro % 2 == 0:
        micro //= 2
        yield {"per_device_train_batch_size": micro, "gradient_accumulation_steps": rows // micro}
    if s.own_reference and not c.offload_reference:
        yield {"offload_reference": True}
    if s.gpus > 1 and s.zero_stage < 3:
        yield {"zero_stage": 3}
    if s.zero_stage == 3 and c.gather_for_rollout:
        yield {"gather_for_rollout": False}


def _written(changes: dict[str, Any]) -> str:
    names = {"activation_checkpointing": "gradient_checkpointing"}
    return " and ".join(f"{names.get(key, key)}={str(value).lower()}" for key, value in changes.items())


# The plan as text


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
    rewards_gb: float | None = None,
    rewards: list[str] | tuple[str, ...] = (),
) -> str:
    """What a training run will take: parameters, memory by part and phase on each GPU, passes of one iteration.

    Args:
        model (`str`), revision (`str`, *optional*): hub id, short name ("sd3.5-medium") or folder in diffusers' format.
        config, lora_rank, lora_targets, gpus, zero_stage: as in [`PlanSettings`].
        gpu_memory_gb (`float`, *optional*): of one GPU, in 1e9 bytes; None accepts every plan.
        prompts (`int`): distinct prompts, for the size of their embeddings.
        rewards_gb (`float`, *optional*): memory of reward networks on each GPU. None: by the names in `rewards`.
        rewards (`list[str]`): rewards and monitors by name, as in a YAML file.

    Returns:
        `str`: the estimate, each number beside its formula.

    Raises:
        ValueError: if the run needs more than `gpu_memory_gb`, with what to change.
    """
    shapes = load_shapes(model, revision)
    taken = reward_gb(rewards) if rewards_gb is None else rewards_gb
    s = PlanSettings(config, lora_rank, lora_targets, gpus, zero_stage, taken)
    if gpu_memory_gb is not None:
        check_fit(s, gpu_memory_gb, partial(memory, shapes))
    found, embedding = memory(shapes, s), measure_rows(shapes, s).embedding
    sizes = {"denoiser": shapes.parameters, "position buffer": shapes.buffer, "VAE": shapes.vae, **shapes.encoders}
    if lora_rank:
        sizes[f"LoRA adapter r{lora_rank}"] = shapes.adapter_parameters(lora_rank, lora_targets)
    height, width = s.size(shapes.policy)
    kind = f"LoRA r{lora_rank}" if lora_rank else "full fine-tuning"
    zero, precision = (f"ZeRO-{zero_stage}" if zero_stage else "no ZeRO"), ("half precision" if s.half else "float32")
    lines = [f"An estimate by arithmetic, not measured on a GPU: {shapes.name} at {width} x {height} pixels", ""]
    lines += ["Parameters", *(f"  {name:<24}{size / 1e6:>10,.1f} M" for name, size in sizes.items() if size), ""]
    lines += [f"This run: {kind}, {zero}, {precision}, {gpus} GPU(s); GB on each"]
    for phase, parts in {"through rollout and update": found.always, **found.phases}.items():
        lines += [f"  {phase}"]
        lines += [f"    {name:<36}{size:8.2f}  {found.formulas[name]}" for name, size in parts.items()]
        if phase in found.phases:
            lines += [f"    = {phase}".ljust(40) + f"{found.total(phase):8.2f}"]
    note = "" if taken else " Networks of rewards that are not named come on top: pass their memory as rewards_gb."
    total = f", {embedding * prompts / 1e9:.1f} GB for {prompts:,}" if prompts else ""
    lines += [f"Peak {found.peak:.1f} GB, during {found.peak_phase}.{note}", ""]
    lines += [f"Prompt embeddings (CPU or disk): {embedding / 1e6:.2f} MB a prompt{total}", ""]
    passes = count_passes(s, shapes.policy.batched_guidance)
    updates = passes["backwards"][0] // config.gradient_accumulation_steps
    lines += [f"One iteration on each GPU: {s.images} images, {updates} optimizer step(s)"]
    lines += [f"  {name:<26}{calls:>8,} calls {n:>10,} predictions" for name, (calls, n) in passes.items()]
    return "\n".join(lines)


def count_passes(settings: PlanSettings, batched_guidance: bool) -> dict[str, tuple[int, int]]:
    """Calls of the denoiser in one iteration on one GPU, and predictions, which `batched_guidance` doubles by a second branch.
    What shared initial noise spares is not counted."""
    s, c = settings, settings.config
    branches = 2 if batched_guidance and c.guidance_scale != 1.0 else 1
    chunks, rows = -(-s.images // s.chunk), s.images * s.window * c.num_iterations
    update = (rows // s.rows, rows * branches)
    passes = {
        "rollout forwards": (chunks * c.num_inference_steps, s.images * c.num_inference_steps * branches),
        "update forwards": update,
        "reference forwards (KL)": (chunks * s.window, s.images * s.window * branches) if s.own_reference else update,
        "backwards": update,
    }
    return passes if c.beta > 0 else {name: value for name, value in passes.items() if "KL" not in name}
