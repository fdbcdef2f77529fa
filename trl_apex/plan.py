"""What a training run takes of each GPU, by arithmetic from parameter counts and shapes.

Everything here is an estimate and none of it was measured on a GPU. A model is built on the meta device, by diffusers' own
classes and without weights, to count its parameters; activations are tensors per token and layer times a constant.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .diffusion.families import FAMILIES, base
from .diffusion.families.base import DiffusionPolicy

CONTEXT = 1e9
"""Bytes for the CUDA context and its libraries."""
FRAGMENTATION = 0.15
"""Share added to what comes and goes in a phase."""
BUCKET = 500_000_000
"""Elements of each of DeepSpeed's two buckets under ZeRO-1 and 2, its default."""
CLIP_TOKENS = 77
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
DECODING = 3
"""Tensors of full resolution and `block_out_channels[1]` channels at the peak of the VAE."""
REWARD_NETWORKS = {
    "pickscore": ("CLIP-H", 986e6 * 4), "hpsv2": ("CLIP-H of HPSv2", 986e6 * 4), "clip_score": ("CLIP-L", 428e6 * 4),
    "aesthetic": ("CLIP-L", 428e6 * 4), "image_reward": ("BLIP-L", 478e6 * 4), "deqa": ("a VLM of 8.2 B", 8.2e9 * 2),
}  # fmt: skip
"""Rewards by name, their network (one copy where two share it) and its bytes."""

# Architectures as published in the `config.json` files of each model's components on the Hugging Face Hub; only what decides
# shapes.
CLIP_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "max_position_embeddings": 77,
}  # fmt: skip
CLIP_G = {
    "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280, "max_position_embeddings": 77,
}  # fmt: skip
T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
}  # fmt: skip
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
    "sample_size": 512, "scaling_factor": 0.18215,
}  # fmt: skip
VAE_16 = {
    **VAE, "latent_channels": 16, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609,
    "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip
SD35_MEDIUM = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}  # fmt: skip
SD35_LARGE = {
    **SD35_MEDIUM, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
    "pos_embed_max_size": 192, "dual_attention_layers": [],
}  # fmt: skip
FLUX_DEV = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
UNET_15 = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2, "attention_head_dim": 8, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
UNET_XL = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2, "attention_head_dim": [5, 10, 20], "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
FLOW = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
DDIM = (
    "DDIMScheduler",
    {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1,
    },
)  # fmt: skip

SD3_TEXT: dict[str, tuple[str, dict[str, Any]]] = {
    "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
    "text_encoder_3": ("T5EncoderModel", T5_XXL),
}
# Pipeline class, and component name -> (class, configuration).
CONFIGS: dict[str, tuple[str, dict[str, tuple[str, dict[str, Any]]]]] = {
    "stabilityai/stable-diffusion-3.5-medium": (
        "StableDiffusion3Pipeline",
        {
            "transformer": ("SD3Transformer2DModel", SD35_MEDIUM),
            "vae": ("AutoencoderKL", VAE_16),
            "scheduler": FLOW,
            **SD3_TEXT,
        },
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        "StableDiffusion3Pipeline",
        {
            "transformer": ("SD3Transformer2DModel", SD35_LARGE),
            "vae": ("AutoencoderKL", VAE_16),
            "scheduler": FLOW,
            **SD3_TEXT,
        },
    ),
    "black-forest-labs/FLUX.1-dev": (
        "FluxPipeline",
        {
            "transformer": ("FluxTransformer2DModel", FLUX_DEV),
            "vae": ("AutoencoderKL", {**VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("T5EncoderModel", T5_XXL),
        },
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "StableDiffusionPipeline",
        {
            "unet": ("UNet2DConditionModel", UNET_15),
            "vae": ("AutoencoderKL", VAE),
            "scheduler": DDIM,
            "text_encoder": ("CLIPTextModel", CLIP_L),
        },
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "StableDiffusionXLPipeline",
        {
            "unet": ("UNet2DConditionModel", UNET_XL),
            "vae": ("AutoencoderKL", {**VAE, "sample_size": 1024, "scaling_factor": 0.13025}),
            "scheduler": DDIM,
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        },
    ),
}
SHORT_NAMES = {
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
    "sd1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


# Models


@dataclass(frozen=True)
class Shapes:
    """A model without its weights.

    Args:
        name (`str`): hub id or folder.
        policy ([`DiffusionPolicy`]): over a pipeline whose denoiser and VAE are on the meta device, without encoders.
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

    @cached_property
    def blocks(self) -> int:
        """Parts of the denoiser that gradient checkpointing recomputes one at a time."""
        names = ("transformer_blocks", "single_transformer_blocks", "down_blocks", "up_blocks")
        return sum(len(getattr(self.policy.denoiser, name, ())) for name in names) or 1

    def adapter_parameters(self, rank: int, targets: list[str] | tuple[str, ...] | None = None) -> int:
        """Of a LoRA adapter: `rank (inputs + outputs)` for every targeted layer.

        Args:
            rank (`int`): of the adapter.
            targets (`list[str]`, *optional*): endings of module names; the family's own by default.

        Raises:
            ValueError: if a target matches no layer.
        """
        wanted = tuple(targets or self.policy.lora_targets)
        found, total = set(), 0
        for name, module in self.policy.denoiser.named_modules():
            hit = {target for target in wanted if name == target or name.endswith(f".{target}")}
            if hit and isinstance(module, nn.Conv2d):
                total += rank * (
                    module.in_channels * module.kernel_size[0] * module.kernel_size[1] + module.out_channels
                )
            elif hit and isinstance(module, nn.Linear):
                total += rank * (module.in_features + module.out_features)
            else:
                continue
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
        tokens = {"StableDiffusion3Pipeline": CLIP_TOKENS + max_sequence_length, "FluxPipeline": max_sequence_length}
        width = getattr(config, "joint_attention_dim", None) or config.cross_attention_dim
        shapes: dict[str, tuple[int, ...]] = {
            "encoder_hidden_states": (rows, tokens.get(pipeline, CLIP_TOKENS), width)
        }
        if pipeline in tokens:
            shapes["pooled_projections"] = (rows, config.pooled_projection_dim)
        elif pipeline == "StableDiffusionXLPipeline":
            size = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            shapes["text_embeds"] = (rows, size)
        return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}


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
    name = model if Path(model).is_dir() else SHORT_NAMES.get(model.lower(), model)
    if name in CONFIGS and not Path(model).is_dir():
        pipeline_name, components = CONFIGS[name]
    else:
        pipeline_name, components = _read_components(name, revision)
    if pipeline_name not in FAMILIES:
        raise ValueError(
            f"`model` must be of a supported family: {', '.join(FAMILIES)}. Found {pipeline_name}. Use another model."
        )
    family = FAMILIES[pipeline_name]
    parts = {key: _build(*value) for key, value in components.items() if "tokenizer" not in key}
    encoders = {key: count(parts[key]) for key in family.encoder_names if parts.get(key) is not None}
    return Shapes(name, family(_pipeline(pipeline_name, parts)), encoders)


def _build(class_name: str, config: dict[str, Any]) -> Any:
    import diffusers
    import transformers

    if hasattr(diffusers, class_name):
        with torch.device("cpu" if class_name.endswith("Scheduler") else "meta"):
            return getattr(diffusers, class_name).from_config(config)
    cls = getattr(transformers, class_name)
    with torch.device("meta"):
        return cls(cls.config_class(**{key: value for key, value in config.items() if not key.startswith("_")}))


def _pipeline(name: str, parts: dict[str, Any]) -> Any:
    import diffusers

    cls = getattr(diffusers, name)
    parameters = inspect.signature(cls.__init__).parameters
    given: dict[str, Any] = {
        key: None for key, p in parameters.items() if key != "self" and p.default is inspect.Parameter.empty
    }
    given |= {key: parts[key] for key in parameters if key in parts and not key.startswith("text_encoder")}
    if "requires_safety_checker" in parameters:
        given["requires_safety_checker"] = False
    return cls(**given)


def _read_components(model: str, revision: str | None) -> tuple[str, dict[str, tuple[str, dict[str, Any]]]]:
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
        if name.startswith("_") or not isinstance(value, list) or value[1] is None:
            continue
        library, class_name = value
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
    """What of a configuration decides memory; names as in [`DiffusionGRPOConfig`] where they say nothing else.

    Args:
        height, width (`int`): pixels.
        lora_rank (`int`), lora_targets (`tuple[str, ...]`, *optional*): rank 0 for full fine-tuning; the family's own targets.
        half (`bool`): bf16 or fp16; False for float32 throughout.
        zero_stage (`int`), gpus (`int`): of DeepSpeed, 0 for none; processes.
        samples (`int`), group (`int`): `generation_batch_size` over all processes, and `num_generations`.
        micro_batch (`int`), steps_per_row (`int`): `per_device_train_batch_size` and `timestep_batch_size`.
        accumulation (`int`), passes (`int`): `gradient_accumulation_steps` and `num_iterations`.
        rollout_batch (`int`), steps (`int`), window (`int`): images sampled at a time, denoising steps, trained steps.
        guidance (`float`), kl (`bool`): 1 for none; `beta` > 0.
        offload_reference, checkpointing, ema, gather (`bool`): as in the configuration.
        unload_encoders (`bool`): text encoders are gone once prompts are encoded.
        max_sequence_length (`int`), prompts (`int`): text tokens; distinct prompts, for the size of their embeddings.
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
    rollout_batch: int = 8
    steps: int = 10
    window: int = 9
    guidance: float = 1.0
    kl: bool = False
    offload_reference: bool = False
    checkpointing: bool = True
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
        rows, update = self.samples_here * self.window, self.rows_per_forward * self.accumulation
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


def settings_from_config(config: Any, size: tuple[int, int], *, gpus: int = 1, **others: Any) -> PlanSettings:
    """The settings behind a [`DiffusionGRPOConfig`].

    Args:
        config ([`DiffusionGRPOConfig`]): `generation_batch_size` counts the images of all GPUs.
        size (`tuple[int, int]`): height and width where the configuration says nothing.
        gpus (`int`), others: `lora_rank`, `lora_targets`, `zero_stage`, `prompts` and `rewards_gb` of [`PlanSettings`].
    """
    here = max(config.generation_batch_size // gpus, 1)
    return PlanSettings(
        height=config.height or size[0], width=config.width or size[1], half=bool(config.bf16 or config.fp16), gpus=gpus,
        samples=config.generation_batch_size, group=config.num_generations, micro_batch=config.per_device_train_batch_size,
        steps_per_row=config.timestep_batch_size, accumulation=config.gradient_accumulation_steps,
        passes=config.num_iterations, rollout_batch=min(config.rollout_batch_size or here, here),
        steps=config.num_inference_steps, window=config.rows_per_image, guidance=config.guidance_scale, kl=config.beta > 0,
        offload_reference=config.offload_reference, checkpointing=bool(config.activation_checkpointing),
        ema=config.ema_decay is not None, gather=config.gather_for_rollout,
        unload_encoders=config.unload_text_encoders is not False and config.precompute_prompts,
        max_sequence_length=config.max_sequence_length, **others,
    )  # fmt: skip


# Memory


@dataclass(frozen=True)
class PerRow:
    """Bytes of one image: kept for its backward pass without and with gradient checkpointing, by the largest recomputed block,
    at the peak of a forward pass without gradients, of its decoding, and of its prompt's embeddings."""

    saved: float
    saved_checkpointed: float
    block: float
    inference: float
    decode: float
    embedding: float


def measure_rows(shapes: Shapes, settings: PlanSettings) -> PerRow:
    """The bytes of one image: `tensors x tokens x width x bytes`, block by block."""
    width = 2 if settings.half else 4
    autocast = settings.half and settings.zero_stage == 0
    kind = "LoRA" if settings.lora_rank else "autocast" if autocast else "half"
    hidden, kept, live = zip(*_blocks(shapes, settings, kind), strict=True)
    vae, pixels = shapes.policy.pipeline.vae.config, settings.height * settings.width
    channels = vae.block_out_channels[min(1, len(vae.block_out_channels) - 1)]
    embeddings = shapes.embeddings(1, settings.max_sequence_length, torch.bfloat16 if settings.half else torch.float32)
    return PerRow(
        saved=width * sum(kept),
        saved_checkpointed=width * sum(hidden),
        block=width * max(kept),
        inference=width * max(live),
        decode=width * DECODING * channels * pixels,
        embedding=sum(value.numel() * value.element_size() for value in embeddings.values()),
    )


def _blocks(shapes: Shapes, settings: PlanSettings, kind: str) -> list[tuple[int, int, int]]:
    """Of every block, elements of one hidden state `[tokens, width]`, kept for the backward pass, and live without one."""
    policy, denoiser = shapes.policy, shapes.policy.denoiser
    config = denoiser.config
    _, height, width = policy.latent_shape(settings.height, settings.width)
    if hasattr(denoiser, "transformer_blocks"):
        patch = policy.size_multiple() // policy.vae_scale_factor
        image = height * width // patch**2
        text = shapes.embeddings(1, settings.max_sequence_length, torch.float32)["encoder_hidden_states"].shape[1]
        size = config.num_attention_heads * config.attention_head_dim
        one, dual = (image + text) * size, image * size
        has_dual = set(getattr(config, "dual_attention_layers", ()))
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


ENCODING = "encoding prompts"


@dataclass(frozen=True)
class Memory:
    """Gigabytes (1e9 bytes) on one GPU.

    Args:
        always (`dict[str, float]`): what stays for the whole run.
        phases (`dict[str, dict[str, float]]`): what rollout and update take beside it, and all that encoding prompts takes.
        formulas (`dict[str, str]`): how each part came about.
    """

    always: dict[str, float]
    phases: dict[str, dict[str, float]]
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
    """What one GPU holds, from shapes alone."""
    s, rows, lora = settings, measure_rows(shapes, settings), settings.lora_rank > 0
    trained = shapes.adapter_parameters(s.lora_rank, s.lora_targets) if lora else shapes.parameters
    frozen = shapes.parameters if lora else 0
    zero, shards = s.zero_stage, (s.gpus if s.zero_stage == 3 else 1)
    width, trained_width = (2 if s.half else 4), (2 if s.half and s.zero_stage else 4)
    branches = 2 if shapes.policy.batched_guidance and s.guidance != 1.0 else 1
    rows_now, chunk, here = s.rows_per_forward * branches, min(s.rollout_batch, s.samples_here), s.samples_here
    latent = torch.Size(shapes.policy.latent_shape(s.height, s.width)).numel() * 4
    pixels = s.height * s.width
    decoded = min(chunk, max(1, base.DECODE_PIXELS // pixels))
    formulas: dict[str, str] = {}

    def part(name: str, size: float, formula: str) -> dict[str, float]:
        formulas[name] = formula
        return {name: size / 1e9} if size else {}

    million = f"{trained / 1e6:,.1f} M trained"
    share = f" / {s.gpus} GPUs" if zero and s.gpus > 1 else ""
    state = state_bytes(trained, frozen, s.half, zero, s.gpus)
    weights = f"{million} x {trained_width} bytes" + (f" + {frozen / 1e6:,.1f} M frozen x {width}" if lora else "")
    always = part("denoiser weights", state["weights"], weights + (share if zero == 3 else ""))
    always |= part(
        "denoiser gradients", state["gradients"], f"{million} x {trained_width}" + (share if zero >= 2 else "")
    )
    moments = 12 if trained_width == 2 else 8
    always |= part("denoiser master + Adam", state["master + Adam"], f"{million} x {moments}" + share)
    buffer = width if lora or zero else 4
    always |= part("denoiser buffers", shapes.buffer * buffer, f"{shapes.buffer / 1e6:,.1f} M positions x {buffer}")
    if s.half and not lora and zero == 0:
        always |= part("half-precision copies (autocast)", trained * 2, f"{million} x 2")
    if s.gpus > 1 and zero == 0:
        always |= part("gradient buckets (data parallel)", state["gradients"], f"{million} x 4")
    if zero in (1, 2) and s.gpus > 1:
        size = 2 * min(BUCKET, trained) * trained_width
        always |= part("DeepSpeed buckets", size, f"2 x min({BUCKET / 1e6:.0f} M, trained) x {trained_width}")
    if s.ema:
        always |= part("moving average", trained * trained_width / shards, f"{million} x {trained_width}")
    reference = shapes.parameters * width / shards
    if s.kl and not lora and not s.offload_reference:
        always |= part("reference", reference, f"{shapes.parameters / 1e6:,.1f} M x {width}")
    always |= part("VAE", shapes.vae * width, f"{shapes.vae / 1e6:,.1f} M x {width}")
    encoders = sum(shapes.encoders.values()) * width
    texts = f"({' + '.join(f'{size / 1e6:,.0f}' for size in shapes.encoders.values())}) M x {width}"
    if not s.unload_encoders:
        always |= part("text encoders", encoders, texts)
    kept = latent * (s.window + 1 + (s.window if s.kl and not lora else 0)) + 12 * pixels
    always |= part("trajectories and images", here * kept, f"{here} images x {kept / 1e6:.1f} MB")
    always |= part("reward networks", s.rewards_gb * 1e9, "by the rewards' names, or as given")
    always |= part("CUDA context", CONTEXT, "an allowance")

    denoising = chunk * branches * rows.inference
    rollout = part(
        "noise and embeddings", chunk * (latent * (s.window + 3) + rows.embedding * branches), f"{chunk} images"
    )
    rollout |= part("denoising", denoising, f"{chunk * branches} predictions x {rows.inference / 1e9:.3f} GB")
    decoding = max(decoded * rows.decode - denoising, 0)
    rollout |= part(
        "decoding, beyond denoising", decoding, f"{decoded} images x {rows.decode / 1e9:.2f} GB - denoising"
    )
    if zero == 3 and s.gather and s.gpus > 1:
        whole = (trained + frozen) * width
        rollout |= part("gathered weights", whole - whole / s.gpus, f"{(trained + frozen) / 1e6:,.1f} M x {width}")
    if s.kl and not lora and s.offload_reference:
        rollout |= part("reference, once an iteration", reference, f"{shapes.parameters / 1e6:,.1f} M x {width}")
    update = part("embeddings", rows_now * rows.embedding, f"{rows_now} rows x {rows.embedding / 1e6:.1f} MB")
    if s.checkpointing:
        update |= part(
            "activations (checkpointed)",
            rows_now * rows.saved_checkpointed,
            f"{rows_now} rows x {rows.saved_checkpointed / 1e9:.2f} GB",
        )
        update |= part("one live block", rows_now * rows.block, f"{rows_now} rows x {rows.block / 1e9:.2f} GB")
    else:
        update |= part("activations", rows_now * rows.saved, f"{rows_now} rows x {rows.saved / 1e9:.2f} GB")
    for phase, parts in (("rollout", rollout), ("update", update)):
        parts |= part(
            f"fragmentation of the {phase}", FRAGMENTATION * sum(parts.values()) * 1e9, f"{FRAGMENTATION:.0%} of these"
        )
    encoding = part("text encoders", encoders, texts)
    encoding |= {name: always[name] for name in ("VAE", "CUDA context")}
    return Memory(always, {ENCODING: encoding, "rollout": rollout, "update": update}, formulas)


# Whether it fits


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
    parts = {**(found.always if phase != ENCODING else {}), **found.phases[phase]}
    largest = ", ".join(f"{name} {size:.1f}" for name, size in sorted(parts.items(), key=lambda p: -p[1])[:3])
    raise ValueError(
        f"The plan must fit into {gpu_memory_gb:g} GB a GPU. Found an estimate of {found.peak:.1f} GB during {phase} "
        f"({largest}). " + remedy(settings, gpu_memory_gb, estimate)
    )


def remedy(settings: PlanSettings, gpu_memory_gb: float, estimate: Callable[[PlanSettings], Memory]) -> str:
    """A sentence with the changes that make the plan fit: the first single one that is enough, else as many as it takes."""
    for text, changed in _changes(settings):
        if (peak := estimate(changed).peak) <= gpu_memory_gb:
            return f"Set {text}: then it takes {peak:.1f} GB."
    texts: list[str] = []
    current, lowest = settings, estimate(settings).peak
    while lowest > gpu_memory_gb:
        options = [(estimate(changed).peak, text, changed) for text, changed in _changes(current)]
        if not options or min(options, key=lambda o: o[0])[0] >= lowest - 1e-6:
            done = f" Even with {' and '.join(texts)} it takes {lowest:.1f} GB." if texts else ""
            return f"No setting makes it fit.{done} Use larger or more GPUs, smaller images, or a smaller model."
        lowest, text, current = min(options, key=lambda option: option[0])
        texts = [t for t in texts if t.split("=")[0] != text.split("=")[0]] + [text]
    return f"Set {' and '.join(texts)}: then it takes {lowest:.1f} GB."


def _changes(settings: PlanSettings) -> Iterator[tuple[str, PlanSettings]]:
    """Single changes, those that cost least time first."""
    if not settings.unload_encoders:
        yield "unload_text_encoders=true", settings.but(unload_encoders=True)
    if settings.gpus > 1 and settings.zero_stage < 2 and settings.lora_rank == 0:
        yield "zero_stage=2", settings.but(zero_stage=2)
    if settings.lora_rank == 0:
        yield "lora_r=32", settings.but(lora_rank=32)
    if settings.rollout_batch > 1:
        for batch in (2**i for i in reversed(range((settings.rollout_batch - 1).bit_length()))):
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
    if settings.gpus > 1 and settings.zero_stage < 3:
        yield "zero_stage=3", settings.but(zero_stage=3)
    if settings.zero_stage == 3 and settings.gather:
        yield "gather_for_rollout=false", settings.but(gather=False)


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
        model (`str`): hub id, short name ("sd3.5-medium") or folder in diffusers' format.
        config ([`DiffusionGRPOConfig`]): of the run; `generation_batch_size` counts the images of all GPUs.
        revision (`str`, *optional*): of a hub id.
        lora_rank (`int`): of the adapter; 0 for full fine-tuning.
        lora_targets (`list[str]`, *optional*): its layers; the family's own by default.
        gpus (`int`): processes.
        zero_stage (`int`): of DeepSpeed; 0 for none.
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
    s = settings_from_config(
        config, shapes.policy.default_size(), lora_rank=lora_rank, gpus=gpus, zero_stage=zero_stage, prompts=prompts,
        lora_targets=tuple(lora_targets) if lora_targets else None,
        rewards_gb=reward_gb(rewards) if rewards_gb is None else rewards_gb,
    )  # fmt: skip
    if gpu_memory_gb is not None:
        check_fit(s, gpu_memory_gb, partial(memory, shapes))
    found, rows = memory(shapes, s), measure_rows(shapes, s)
    sizes = {"denoiser": shapes.parameters, "position buffer": shapes.buffer, "VAE": shapes.vae, **shapes.encoders}
    if s.lora_rank:
        sizes[f"LoRA adapter r{s.lora_rank}"] = shapes.adapter_parameters(s.lora_rank, s.lora_targets)
    kind = f"LoRA r{s.lora_rank}" if s.lora_rank else "full fine-tuning"
    zero = f"ZeRO-{s.zero_stage}" if s.zero_stage else "no ZeRO"
    lines = [f"An estimate by arithmetic, not measured on a GPU: {shapes.name} at {s.width} x {s.height} pixels", ""]
    lines += ["Parameters", *(f"  {name:<24}{size / 1e6:>10,.1f} M" for name, size in sizes.items() if size), ""]
    precision = "half precision" if s.half else "float32"
    lines += [f"This run: {kind}, {zero}, {precision}, {s.gpus} GPU(s); GB on each", "  through rollout and update"]
    lines += [_line(name, size, found) for name, size in found.always.items()]
    for phase, parts in found.phases.items():
        lines += [f"  {phase}", *(_line(name, size, found) for name, size in parts.items())]
        lines.append(f"    = {phase}".ljust(40) + f"{found.total(phase):8.2f}")
    note = (
        "" if s.rewards_gb else " Networks of rewards that are not named come on top: pass their memory as rewards_gb."
    )
    lines += [f"Peak {found.peak:.1f} GB, during {found.peak_phase}.{note}", ""]
    total = f", {rows.embedding * s.prompts / 1e9:.1f} GB for {s.prompts:,}" if s.prompts else ""
    lines += [f"Prompt embeddings (CPU or disk): {rows.embedding / 1e6:.2f} MB a prompt{total}", ""]
    passes = count_passes(s, shapes.policy.batched_guidance)
    lines.append(f"One iteration on each GPU: {s.samples_here} images, {passes.updates} optimizer step(s)")
    lines += [
        f"  {name:<26}{calls:>8,} calls {rows:>10,} predictions" for name, (calls, rows) in passes.table().items()
    ]
    return "\n".join(lines)


def _line(name: str, size: float, found: Memory) -> str:
    return f"    {name:<36}{size:8.2f}  {found.formulas[name]}"


@dataclass(frozen=True)
class Compute:
    """Calls of the denoiser in one iteration on one GPU, and predictions: a second branch of guidance doubles them."""

    rollout_calls: int
    rollout_rows: int
    update_calls: int
    update_rows: int
    reference_calls: int
    reference_rows: int
    updates: int

    def table(self) -> dict[str, tuple[int, int]]:
        rows = {
            "rollout forwards": (self.rollout_calls, self.rollout_rows),
            "update forwards": (self.update_calls, self.update_rows),
            "reference forwards (KL)": (self.reference_calls, self.reference_rows),
            "backwards": (self.update_calls, self.update_rows),
        }
        return {name: row for name, row in rows.items() if row[0]}


def count_passes(settings: PlanSettings, batched_guidance: bool) -> Compute:
    """Count what one iteration of [`DiffusionGRPOTrainer`] calls, without what shared initial noise spares.

    Args:
        settings ([`PlanSettings`]): the run.
        batched_guidance (`bool`): whether guidance takes a second branch in this family.

    Example:
        ```python
        >>> passes = count_passes(PlanSettings(512, 512, samples=8, steps=10, window=3, micro_batch=4), True)
        >>> passes.rollout_calls, passes.rollout_rows, passes.update_calls, passes.update_rows, passes.updates
        (10, 80, 6, 24, 6)

        ```
    """
    s, here = settings, settings.samples_here
    branches = 2 if batched_guidance and s.guidance != 1.0 else 1
    chunks = -(-here // s.rollout_batch)
    rows = here * s.window * s.passes
    calls = rows // s.rows_per_forward
    reference_calls, reference_rows = (calls, rows) if s.lora_rank else (chunks * s.window, here * s.window)
    if not s.kl:
        reference_calls = reference_rows = 0
    return Compute(
        chunks * s.steps, here * s.steps * branches, calls, rows * branches, reference_calls, reference_rows * branches,
        calls // s.accumulation,
    )  # fmt: skip
