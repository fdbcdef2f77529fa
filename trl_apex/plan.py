"""What a training run takes of each GPU, by arithmetic from parameter counts and shapes.

Everything here is an estimate, and none of it was measured on a GPU. Models are built on the meta device by diffusers' own
classes, without weights, to count their parameters. Activations are tensors per token and layer times a constant.
"""

import copy
import inspect
import json
import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .diffusion.families import FAMILIES, base
from .diffusion.families.base import DiffusionPolicy
from .rewards.registry import parse_spec

# Constants

CONTEXT = 1e9
"""Bytes for the CUDA context and its libraries."""
FRAGMENTATION = 0.15
"""Share added to what comes and goes in a phase."""
BUCKET = 500_000_000
"""Elements of each of DeepSpeed's two buckets under ZeRO-1 and 2, its default."""
KEPT = {
    "block": {"LoRA": 22, "half": 29, "autocast": 37},
    "second attention": {"LoRA": 9, "half": 14, "autocast": 19},
    "single block": {"LoRA": 16, "half": 25, "autocast": 29},
    "gated block": {"LoRA": 27, "half": 34, "autocast": 42},
    "gated single block": {"LoRA": 20, "half": 29, "autocast": 33},
    "UNet attention": {"LoRA": 32, "half": 29, "autocast": 36},
    "UNet ResNet": {"LoRA": 14, "half": 10, "autocast": 14},
}
"""Tensors of [tokens, width], at 2 bytes an element, that a layer keeps for its backward pass with fused attention. A block with
LoRA: inputs of two norms and their modulated outputs 4, q k v 3 and their normed q k 2, attention's output 1, the feed-forward
network's hidden layer before and after GELU 8, gated outputs and residuals 4: 22. Training the weights keeps their inputs too: 29;
and float32 norms under autocast: 37. SD3.5-medium's first blocks have a second attention over image tokens alone. In FLUX's single
blocks, attention and feed-forward network share norm and output. Gated hidden layers (FLUX.2, Z-Image) keep four tensors of up to
three times the width, and Z-Image has two norms more. A UNet has gated hidden layers, cross-attention and ResNets."""
LIVE = 12
"""Tensors of [tokens, width] at the peak of a forward pass without gradients: residual and norm, hidden layer before and after
GELU; half as many again in FLUX's single blocks, where attention and hidden layer are there at once."""
PROBED = 4
"""Float32 tensors of [tokens, width] that the gradient probe keeps of a block: the inputs of the adapters of q, k, v and output,
which autocast keeps in half precision. Elsewhere the probe shares what autograd keeps."""
DECODING = 3
"""Tensors of full resolution and the channels of the VAE's second level at the peak of the VAE."""
REWARD_NETWORKS = {
    "pickscore": ("CLIP-H", 986e6 * 4), "hpsv2": ("CLIP-H of HPSv2", 986e6 * 4), "clip_score": ("CLIP-L", 428e6 * 4),
    "aesthetic": ("CLIP-L", 428e6 * 4), "image_reward": ("BLIP-L", 478e6 * 4), "deqa": ("a VLM of 8.2 B", 8.2e9 * 2),
    "geneval": ("Mask2Former of Swin-S, and CLIP-L", (69e6 + 428e6) * 4), "source": ("CLIP-L", 428e6 * 4),
    "dino_source": ("DINO of ViT-S", 22e6 * 4), "safety": ("ViT-B", 86e6 * 4),
    "hpsv3": ("Qwen2-VL of 8.3 B", 8.3e9 * 2), "published_deqa": ("mPLUG-Owl2 of 8.2 B", 8.2e9 * 2),
}  # fmt: skip
"""Rewards by name, their network (one copy where two share it) and its bytes."""
PUBLISHED = json.loads((Path(__file__).parent / "published_models.json").read_text(encoding="utf-8"))
"""What decides shapes, and differs from the classes' defaults, in published configurations."""
CONFIGS: dict[str, tuple[str, dict[str, list]]] = {
    name: (pipeline, {key: PUBLISHED["components"][value] for key, value in components.items()})
    for name, (pipeline, components) in PUBLISHED["models"].items()
}
"""Pipeline class and components (class and configuration) of published models."""


# Models


@dataclass(frozen=True)
class Shapes:
    """A model without its weights: its policy, on the meta device, and how many parameters its parts have."""

    name: str
    policy: DiffusionPolicy
    parameters: int  # of the denoiser
    buffer: int  # elements that the denoiser holds beside them, such as a table of positions
    vae: int
    encoders: dict[str, int]

    def adapter_parameters(self, rank: int, targets: list[str] | tuple[str, ...] | None = None) -> int:
        """Parameters of a LoRA adapter: `rank (inputs + outputs)` for every layer whose name ends with a target."""
        modules = self.policy.denoiser.named_modules()
        layers = {f".{name}": layer.weight for name, layer in modules if isinstance(layer, nn.Linear | nn.Conv2d)}
        ends = tuple(f".{target}" for target in targets or self.policy.lora_targets)
        missing = sorted(end[1:] for end in ends if not any(name.endswith(end) for name in layers))
        if missing:
            raise ValueError(
                f"Every LoRA target must match a linear layer of {type(self.policy.denoiser).__name__}. Found none for "
                f"{missing}. Correct `lora_target_modules`."
            )
        adapted = [weight for name, weight in layers.items() if name.endswith(ends)]
        return sum(rank * (weight.numel() // len(weight) + len(weight)) for weight in adapted)

    def embeddings(self, rows: int, max_sequence_length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Prompt embeddings of `rows` prompts, on the meta device."""
        config, pipeline = self.policy.denoiser.config, type(self.policy.pipeline).__name__
        widths = "joint_attention_dim", "cap_feat_dim", "cross_attention_dim"
        width = next(config[name] for name in widths if name in config)
        tokens = 77 if "StableDiffusion" in pipeline else 0  # CLIP's
        if pipeline not in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
            tokens += max_sequence_length
        shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (tokens, width)}
        if pipeline in ("StableDiffusion3Pipeline", "FluxPipeline", "FluxKontextPipeline"):
            shapes["pooled_projections"] = (config.pooled_projection_dim,)
        elif pipeline == "StableDiffusionXLPipeline":
            size = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            shapes["text_embeds"] = (size,)
        found = {name: torch.empty(rows, *shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
        if pipeline in ("QwenImagePipeline", "QwenImageEditPlusPipeline"):
            found["encoder_hidden_states_mask"] = torch.empty(rows, tokens, dtype=torch.bool, device="meta")
        elif pipeline == "ZImagePipeline":
            found = {"cap_feats": found["encoder_hidden_states"], "lengths": torch.full((rows,), tokens)}
        return found

    def forward_flops(self, height: int, width: int, max_sequence_length: int) -> int:
        """Operations of the denoiser's forward over one image; a multiplication and an addition count as two."""
        latents = torch.empty(1, *self.policy.latent_shape(height, width), device="meta", dtype=torch.bfloat16)
        embeddings = self.embeddings(1, max_sequence_length, torch.bfloat16)
        if self.policy.edits:
            embeddings["source"] = latents
        denoiser = nn.Module.to(self.policy.denoiser, torch.bfloat16)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.policy.predict(denoiser, latents, torch.empty(1, device="meta"), embeddings, 1.0)
        return counter.get_total_flops()


def load_shapes(model: str, revision: str | None = None) -> Shapes:
    """Build a model on the meta device, from configurations alone.

    Args:
        model (`str`): a folder in diffusers' format, a short name ("sd3.5-medium"), or a hub id, whose small configuration
            files are read unless it is in `CONFIGS`.
        revision (`str`, *optional*): of a hub id.
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
    parameters = inspect.signature(cls).parameters
    required = {key: None for key, parameter in parameters.items() if parameter.default is parameter.empty}
    unsafe = {"requires_safety_checker": False} if "requires_safety_checker" in parameters else {}
    policy = family(cls(**{**required, **{key: part for key, part in parts.items() if key in parameters}, **unsafe}))
    buffer = sum(buffer.numel() for buffer in policy.denoiser.buffers())
    encoders = {key: parts[key].num_parameters() for key in family.encoder_names if key in parts}
    return Shapes(name, policy, policy.denoiser.num_parameters(), buffer, parts["vae"].num_parameters(), encoders)


def _build(class_name: str, config: dict[str, Any]) -> Any:
    import diffusers
    import transformers

    with torch.device("cpu" if class_name.endswith("Scheduler") else "meta"):
        if hasattr(diffusers, class_name):
            return getattr(diffusers, class_name).from_config(config)
        cls = getattr(transformers, class_name)
        return cls(cls.config_class(**{key: value for key, value in config.items() if not key.startswith("_")}))


def _read_components(model: str, revision: str | None) -> tuple[str, dict[str, list]]:
    """Pipeline class and components, as in `CONFIGS`, of a folder or a model on the Hub."""
    import diffusers

    try:
        if "/" not in model and not Path(model).is_dir():
            raise ValueError("no folder of this name")
        index = diffusers.DiffusionPipeline.load_config(model, revision=revision)
    except (OSError, ValueError) as error:
        close = get_close_matches(model.lower(), [*PUBLISHED["short names"], *CONFIGS], 1)
        raise ValueError(
            "A plan needs a folder in diffusers' format, a hub id that can be reached, or one of "
            f"{', '.join(CONFIGS)}. Found {model!r}: {str(error).splitlines()[0].rstrip('.')}."
            + (f" Did you mean {close[0]!r}?" if close else "")
        ) from error
    components = {}
    for name, value in index.items():
        library, class_name = value if isinstance(value, list) else ("", "")
        if library == "diffusers" or (library == "transformers" and name.startswith("text_encoder")):
            cls: Any = getattr(diffusers, class_name, diffusers.AutoencoderKL)  # which reads any config.json
            components[name] = [class_name, dict(cls.load_config(model, subfolder=name, revision=revision))]
    return index["_class_name"], components


# Settings


@dataclass
class PlanSettings:
    """A configuration of a trainer, and what decides memory beside it."""

    config: Any  # a DiffusionGRPOConfig; its `generation_batch_size` counts the images of all GPUs
    lora_r: int = 32  # 0 for full fine-tuning
    lora_targets: list[str] | tuple[str, ...] | None = None  # the family's own by default
    gpus: int = 1
    zero_stage: int = 0  # of DeepSpeed; 0 for none
    rewards_gb: float = 0.0  # of reward networks on each GPU

    def __post_init__(self) -> None:
        c, images, gpus = self.config, self.config.generation_batch_size, self.gpus
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"`zero_stage` must be 0, 1, 2 or 3. Found {self.zero_stage}. Use 0 for none.")
        if gpus < 1 or images % gpus:
            raise ValueError(
                "`generation_batch_size`, the images of one iteration over all GPUs, must be a multiple of their number. "
                f"Found {images} and {gpus}. Use e.g. {-(-images // max(gpus, 1)) * max(gpus, 1)}."
            )
        self.half = bool(c.bf16 or c.fp16)
        self.unloads_encoders = c.precompute_prompts and c.unload_text_encoders is not False
        self.own_reference = c.beta > 0 and self.lora_r == 0  # a second denoiser; an adapter can be switched off
        self.images = images // gpus  # of one iteration on one GPU, as all that follows
        self.chunk = min(c.rollout_batch_size or self.images, self.images)  # images sampled at a time
        self.rows = c.per_device_train_batch_size * c.timestep_batch_size  # of one forward pass of an update
        self.trained = self.images * c.rows_per_image  # rows of one pass over the rollout
        accumulation = c.gradient_accumulation_steps
        if c.updates_per_iteration:
            accumulation = self.trained // (self.rows * c.updates_per_iteration)
        update = self.rows * accumulation
        if not update or self.trained % update:
            raise ValueError(
                "An iteration must split into whole updates: images per GPU x trained steps must be a multiple of "
                "per_device_train_batch_size x timestep_batch_size x gradient_accumulation_steps. "
                f"Found {self.trained} rows and {update} an update. Change one of them."
            )
        self.updates = self.trained // update * c.num_iterations  # optimizer steps of one iteration
        self.anchor_forwards = c.anchored and (self.updates > 1 or c.anchor is not None)

    def but(self, **changes: Any) -> "PlanSettings":
        """A copy with other values of these fields, or of the configuration's."""
        own = {f.name: changes.pop(f.name) for f in fields(self) if f.name in changes}
        config = copy.copy(self.config)
        vars(config).update(changes)
        return replace(self, **{"config": config, **own})

    def size(self, policy: DiffusionPolicy) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = policy.default_size()
        return self.config.height or height, self.config.width or width


# Memory


class PerRow(NamedTuple):
    """Bytes of one image."""

    saved: int  # for its backward pass
    saved_checkpointed: int
    block: int  # the largest that checkpointing recomputes
    inference: int  # at the peak of a forward pass without gradients
    decode: int
    embedding: int  # of its prompt
    probed: int  # what the gradient probe keeps


def measure_rows(shapes: Shapes, settings: PlanSettings) -> PerRow:
    """The bytes of one image: `tensors x tokens x width x bytes`, block by block."""
    s, config = settings, settings.config
    width, autocast = (2 if s.half else 4), s.half and s.zero_stage == 0
    kind = "LoRA" if s.lora_r else "autocast" if autocast else "half"
    hidden, kept, live = zip(*_blocks(shapes, s, kind), strict=True)
    pixels = torch.Size(s.size(shapes.policy)).numel()
    vae = shapes.policy.pipeline.vae.config
    channels = vae.base_dim * vae.dim_mult[1] if "dim_mult" in vae else vae.block_out_channels[:2][-1]
    embeddings = shapes.embeddings(1, config.max_sequence_length, torch.bfloat16 if s.half else torch.float32)
    source = torch.Size(shapes.policy.latent_shape(*s.size(shapes.policy))).numel() * shapes.policy.edits
    probes = bool(getattr(config, "gradient_probe", False)) and s.lora_r > 0 and autocast
    return PerRow(
        saved=width * sum(kept),
        saved_checkpointed=width * sum(hidden),
        block=width * max(kept),
        inference=width * max(live),
        decode=width * DECODING * channels * pixels,
        embedding=sum(value.nbytes for value in embeddings.values()) + width * source,
        probed=probes * 4 * PROBED * (max(hidden) if config.activation_checkpointing else sum(hidden)),
    )


def _blocks(shapes: Shapes, settings: PlanSettings, kind: str) -> list[tuple[int, int, int]]:
    """For each block, the elements of a hidden state, those kept for the backward pass, and those live without one."""
    policy, denoiser, config = shapes.policy, shapes.policy.denoiser, shapes.policy.denoiser.config
    _, height, width = policy.latent_shape(*settings.size(policy))
    kept = {layer: tensors[kind] for layer, tensors in KEPT.items()}
    if "cross_attention_dim" not in config:  # a transformer
        image = height * width // (policy.size_multiple() // policy.vae_scale_factor) ** 2
        image *= 1 + policy.edits  # a source as large as what is drawn
        prompt = next(iter(shapes.embeddings(1, settings.config.max_sequence_length, torch.float32).values()))
        channels = config.get("dim") or config.num_attention_heads * config.attention_head_dim
        one, second = (image + prompt.shape[1]) * channels, image * channels * kept["second attention"]
        dual, single = getattr(config, "dual_attention_layers", ()), getattr(denoiser, "single_transformer_blocks", ())
        gated = "gated " if "mlp_ratio" in config or "dim" in config else ""
        # Z-Image's refiners go in pairs: one sees the tokens of the image, the other those of the text.
        count = config.n_layers + config.n_refiner_layers if "n_layers" in config else len(denoiser.transformer_blocks)
        blocks = [(one, kept[gated + "block"] * one + second * (i in dual), LIVE * one) for i in range(count)]
        return blocks + [(one, kept[gated + "single block"] * one, LIVE * one * 3 // 2)] * len(single)
    blocks, last = [], len(config.block_out_channels) - 1
    parts = [*enumerate(denoiser.down_blocks), (last, denoiser.mid_block)]
    parts += [(last - i, block) for i, block in enumerate(denoiser.up_blocks)]
    for level, block in parts:
        one = block.resnets[-1].out_channels * height * width // 4**level
        layers = sum(len(a.transformer_blocks) for a in getattr(block, "attentions", None) or ())
        # Skip connections are joined to the inputs: more to keep, and twice as much to hold at one time.
        blocks += [(one * 5 // 2, kept["UNet attention"] * one, 2 * LIVE * one)] * layers
        blocks += [(one * 5 // 2, kept["UNet ResNet"] * one, 2 * LIVE * one)] * len(block.resnets)
    return blocks


def state_bytes(trained: int, frozen: int, half: bool, zero_stage: int, gpus: int) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer states on one GPU.

    A trained parameter takes 4 + 4 + 8 bytes; in half precision under DeepSpeed 2 + 2 + 12, with a float32 copy beside Adam's
    two. A frozen one takes 2 in half precision, else 4. ZeRO-1 divides the last by the number of GPUs, ZeRO-2 gradients too,
    ZeRO-3 weights too.

    Example:
        >>> {name: round(size / 1e9, 1) for name, size in state_bytes(2_243_000_000, 0, True, 2, 8).items()}
        {'weights': 4.5, 'gradients': 0.6, 'master + Adam': 3.4}
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
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> float:
        return self.total(self.peak_phase)


def _quantized_bytes(config: Any) -> float | None:
    """Bytes of a quantized weight: 4 bits, with a float32 for each 64 weights, or 8 bits; None for neither."""
    text = str(config or "").lower()
    return 4 / 8 + 4 / 64 if re.search("4bit|int4", text) else 1.0 if re.search("8bit|int8|float8", text) else None


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
    stored = _quantized_bytes(c.quantization_config) if lora else None
    if stored:  # in the type of the other weights, where they were counted
        state["weights"] += frozen * (stored - half)
        add(ENCODING, "denoiser weights", frozen * stored, "")  # diffusers quantizes on the device
    weights = f"{n} x {own} bytes" + (f" + {frozen / 1e6:,.1f} M frozen x {stored or half}" if lora else "")
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
        add(ALWAYS, "moving average", trained * 4 / shards, f"{n} x 4")
    if c.anchor is not None and not c.offload_reference:
        add(ALWAYS, "slow copy (anchor)", trained * 4 / shards, f"{n} x 4")
        if own < 4:
            add(ROLLOUT, "weights beside the slow copy", trained * own / shards, f"{n} x {own}")
    if s.own_reference:
        where, name = (ROLLOUT, "reference, once an iteration") if c.offload_reference else (ALWAYS, "reference")
        add(where, name, shapes.parameters * half / shards, model)
    encoders = " + ".join(f"{size / 1e6:,.0f}" for size in shapes.encoders.values())
    for phase in (ALWAYS, ENCODING):
        add(phase, "VAE", shapes.vae * half, f"{shapes.vae / 1e6:,.1f} M x {half}")
        add(phase, "CUDA context", CONTEXT, "an allowance")
        if phase == ENCODING or not s.unloads_encoders:
            add(phase, "text encoders", sum(shapes.encoders.values()) * half, f"({encoders}) M x {half}")
    height, width = s.size(policy)
    latent, pixels = 4 * torch.Size(policy.latent_shape(height, width)).numel(), height * width
    old = c.ratio_guard is not None or s.anchor_forwards
    before = s.own_reference + old  # predictions kept from before the updates
    kept = latent * (1 + c.rows_per_image * (1 + before)) + 12 * pixels
    add(ALWAYS, "trajectories and images", s.images * kept, f"{s.images} images x {kept / 1e6:.1f} MB")
    phase = ROLLOUT if c.offload_rewards else ALWAYS
    add(phase, "reward networks", s.rewards_gb * 1e9, "by the rewards' names, or as given")

    branches = 2 if policy.batched_guidance and c.guidance_scale != 1.0 else 1
    sampled, decoded = s.chunk * branches, min(s.chunk, max(1, base.DECODE_PIXELS // pixels))
    noise, denoising = s.chunk * latent * (c.rows_per_image + 3), sampled * row.inference
    add(ROLLOUT, "noise and embeddings", noise + sampled * row.embedding, f"{s.chunk} images")
    add(ROLLOUT, "denoising", denoising, f"{sampled} predictions x {row.inference / 1e9:.3f} GB")
    size = max(decoded * row.decode - denoising, 0)
    add(ROLLOUT, "decoding, beyond denoising", size, f"{decoded} images x {row.decode / 1e9:.2f} GB - denoising")
    if zero == 3 and c.gather_for_rollout:
        size = (trained + frozen) * half * (1 - 1 / gpus)
        add(ROLLOUT, "gathered weights", size, f"{(trained + frozen) / 1e6:,.1f} M x {half}")

    rows = s.rows * branches
    if c.loss_type == "nft" and getattr(c, "gradient_probe", False):  # each branch of the loss has rows of its own
        rows *= 2
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


def reward_gb(rewards: list[str] | tuple[str, ...]) -> float:
    """Gigabytes of the networks of rewards by name, one copy where two share it.

    Example:
        >>> round(reward_gb(["ocr", 'rank(reward="pickscore")', "aesthetic", "clip_score"]), 2)
        5.66
    """
    specs = [parse_spec(reward) for reward in rewards]
    names = [parse_spec(arguments.get("reward", name))[0] for name, arguments in specs]  # of what `rank` ranks
    return sum(dict(REWARD_NETWORKS[name] for name in names if name in REWARD_NETWORKS).values()) / 1e9


# Whether it fits


def check_fit(shapes: Shapes, settings: PlanSettings, gpu_memory_gb: float) -> None:
    """Raise where the plan takes more than `gpu_memory_gb` (1e9 bytes each), with changes that make it fit."""
    found = memory(shapes, settings)
    if found.peak <= gpu_memory_gb:
        return
    phase = found.peak_phase
    parts = {**(found.always if phase != ENCODING else {}), **found.phases[phase]}
    largest = ", ".join(f"{name} {size:.1f}" for name, size in sorted(parts.items(), key=lambda p: -p[1])[:3])
    raise ValueError(
        f"The plan must fit into {gpu_memory_gb:g} GB a GPU. Found an estimate of {found.peak:.1f} GB during {phase} "
        f"({largest}). " + remedy(shapes, settings, gpu_memory_gb)
    )


def remedy(shapes: Shapes, settings: PlanSettings, gpu_memory_gb: float) -> str:
    """A sentence with changes that make the plan fit: the first that is enough, else several that save most."""
    chosen: dict[str, Any] = {}
    lowest = memory(shapes, settings).peak
    while lowest > gpu_memory_gb:
        options = [chosen | change for change in _changes(settings.but(**chosen))]
        peaks = [memory(shapes, settings.but(**option)).peak for option in options]
        best = min(range(len(peaks)), key=lambda i: max(peaks[i], gpu_memory_gb), default=None)
        if best is None or peaks[best] > lowest - 1e-6:
            done = f" Even with {_written(chosen)} it takes {lowest:.1f} GB." if chosen else ""
            return f"No setting makes it fit.{done} Use larger or more GPUs, smaller images, or a smaller model."
        lowest, chosen = peaks[best], options[best]
    return f"Set {_written(chosen)}: then it takes {lowest:.1f} GB."


def _changes(settings: PlanSettings) -> list[dict[str, Any]]:
    """Single changes, those that cost least time first."""
    s, c, full = settings, settings.config, settings.lora_r == 0
    batches, batch, accumulation = [], c.per_device_train_batch_size, c.gradient_accumulation_steps
    while batch % 2 == 0:
        batch, accumulation = batch // 2, accumulation * 2
        follows = {} if c.updates_per_iteration else {"gradient_accumulation_steps": accumulation}
        batches.append((True, {"per_device_train_batch_size": batch, **follows}))
    changes: list[tuple[bool, dict[str, Any]]] = [
        (not s.unloads_encoders, {"precompute_prompts": True, "unload_text_encoders": True}),
        (full and s.gpus > 1 and s.zero_stage < 2, {"zero_stage": 2}),
        (full, {"lora_r": 32}),
        *((True, {"rollout_batch_size": 2**power}) for power in reversed(range((s.chunk - 1).bit_length()))),
        (not c.activation_checkpointing, {"activation_checkpointing": True}),
        *batches,
        (s.own_reference and not c.offload_reference, {"offload_reference": True}),
        (s.rewards_gb > 0 and not c.offload_rewards, {"offload_rewards": True}),
        (s.gpus > 1 and s.zero_stage < 3, {"zero_stage": 3}),
        (s.zero_stage == 3 and c.gather_for_rollout, {"gather_for_rollout": False}),
    ]
    return [change for possible, change in changes if possible]


def _written(changes: dict[str, Any]) -> str:
    text = " and ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
    return text.replace("activation_checkpointing", "gradient_checkpointing")


# The plan as text


ENGINES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3 or FSDP2")
"""By stage of ZeRO."""


def plan_text(
    shapes: Shapes,
    settings: PlanSettings,
    gpu_memory_gb: float | None = None,
    prompts: int = 0,
    gpu_tflops: float = 989.0,
    utilization: float = 0.3,
    iteration_seconds: float | None = None,
) -> str:
    """The estimate, each number beside its formula.

    Args:
        gpu_memory_gb: of one GPU, to name the first engine that fits.
        prompts: how many distinct ones, for the size of their embeddings and the length of an epoch.
        gpu_tflops, utilization: peak of one GPU, an H100's by default, and the share of it that a run reaches.
        iteration_seconds: measured, instead of both.
    """
    if min(gpu_tflops, utilization, 1.0 if iteration_seconds is None else iteration_seconds) <= 0:
        raise ValueError(
            "`gpu_tflops`, `utilization` and `iteration_seconds` must be above 0. "
            f"Found {gpu_tflops}, {utilization} and {iteration_seconds}. Leave out what you do not know."
        )
    s, found, embedding = settings, memory(shapes, settings), measure_rows(shapes, settings).embedding
    sizes = {"denoiser": shapes.parameters, "position buffer": shapes.buffer, "VAE": shapes.vae, **shapes.encoders}
    if s.lora_r:
        sizes[f"LoRA adapter r{s.lora_r}"] = shapes.adapter_parameters(s.lora_r, s.lora_targets)
    height, width = s.size(shapes.policy)
    kind = f"LoRA r{s.lora_r}" if s.lora_r else "full fine-tuning"
    zero = f"ZeRO-{s.zero_stage}" if s.zero_stage else "no ZeRO"
    precision = "half precision" if s.half else "float32"
    lines = [f"An estimate by arithmetic, not measured on a GPU: {shapes.name} at {width} x {height} pixels", ""]
    lines += ["Parameters", *(f"  {name:<24}{size / 1e6:>10,.1f} M" for name, size in sizes.items() if size), ""]
    lines += [f"This run: {kind}, {zero}, {precision}, {s.gpus} GPU(s); GB on each"]
    for phase, parts in {"through rollout and update": found.always, **found.phases}.items():
        lines += [f"  {phase}"]
        lines += [f"    {name:<36}{size:8.2f}  {found.formulas[name]}" for name, size in parts.items()]
        if phase in found.phases:
            lines += [f"    = {phase}".ljust(40) + f"{found.total(phase):8.2f}"]
    note = " Networks of rewards that are not named come on top: pass their memory as rewards_gb."
    total = f", {embedding * prompts / 1e9:.1f} GB for {prompts:,}" if prompts else ""
    lines += [f"Peak {found.peak:.1f} GB, during {found.peak_phase}.{'' if s.rewards_gb else note}"]
    if s.gpus > 1:
        peaks = {name: memory(shapes, s.but(zero_stage=stage)).peak for stage, name in enumerate(ENGINES)}
        lines += ["By engine: " + ", ".join(f"{name} {peak:.1f} GB" for name, peak in peaks.items())]
        if fits := [name for name, peak in peaks.items() if peak <= (gpu_memory_gb or 0)]:
            lines[-1] += f". The first that fits {gpu_memory_gb:g} GB: {fits[0]}."
    lines += [""]
    lines += [f"Prompt embeddings (CPU or disk): {embedding / 1e6:.2f} MB a prompt{total}", ""]
    if getattr(s.config, "multi_objective_aggregation", "") == "apex" and s.config.baseline_prompts:
        first = min(s.config.baseline_prompts, prompts or s.config.baseline_prompts)
        lines += [f"Before training, on all GPUs together: one image each of {first} prompts (`baseline_prompts`)"]
    lines += [f"One iteration on each GPU: {s.images} images, {s.updates} optimizer step(s)"]
    passes = count_passes(s, shapes.policy.batched_guidance)
    lines += [f"  {name:<26}{calls:>8,} calls {n:>10,} predictions" for name, (calls, n) in passes.items()]
    seconds = iteration_seconds
    if seconds is None:
        flops = shapes.forward_flops(height, width, s.config.max_sequence_length)
        backward = (1 if s.lora_r else 2) + s.config.activation_checkpointing  # frozen weights need no gradient
        forwards = sum(n * (backward if name == "backwards" else 1) for name, (_, n) in passes.items())
        seconds = forwards * flops / (gpu_tflops * 1e12 * utilization)
        lines += [f"  a backward costs {backward} forward(s): {forwards:,} x {flops / 1e12:.2f} TFLOP"]
        lines += [f"  / ({gpu_tflops:g} TFLOP/s x {utilization:.0%}, assumed) = {seconds:,.0f} s, an estimate"]
        lines += ["  without encoding, the VAE, rewards and what GPUs send each other"]
    epoch = prompts * s.config.num_generations / s.config.generation_batch_size
    steps = s.config.max_steps
    iterations = -(-steps // s.updates) if steps > 0 else round(s.config.num_train_epochs * epoch)
    if not iterations:
        return "\n".join([*lines, "Hours: pass --max_steps, or --num_prompts for the length of an epoch."])
    hours = iterations * seconds / 3600
    return "\n".join([*lines, f"{iterations:,} iterations x {seconds:,.1f} s = {hours:,.2f} hours"])


def count_passes(settings: PlanSettings, batched_guidance: bool) -> dict[str, tuple[int, int]]:
    """Calls of the denoiser in one iteration on one GPU, and its predictions, which `batched_guidance` doubles.

    What shared initial noise spares is not counted.
    """
    s, c, rows = settings, settings.config, settings.trained
    branches = 2 if batched_guidance and c.guidance_scale != 1.0 else 1
    chunks = -(-s.images // s.chunk)
    steps = c.num_inference_steps
    if c.rollout_solver == "heun":  # twice a step, but for the stochastic ones and the last
        steps += steps - 1 - (0 if c.flow_matching else c.rows_per_image)
    passes = {"rollout forwards": (chunks * steps, s.images * steps * branches)}
    before = (rows // s.rows, rows * branches)
    if c.loss_type in ("awm", "fpo") and s.updates > 1:
        passes["old policy forwards"] = before
    if s.anchor_forwards:
        passes["slow copy forwards"] = before
    passes["update forwards"] = update = (rows * c.num_iterations // s.rows, rows * c.num_iterations * branches)
    if c.beta > 0:
        passes["reference forwards (KL)"] = before if s.own_reference else update
    return passes | {"backwards": update}
