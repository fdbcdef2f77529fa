"""A model without its weights: every part on the meta device, where a tensor is a shape."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..policy.base import DiffusionPolicy
from ..policy.load import FAMILIES
from .configs import CONFIGS, SHORT_NAMES

CLIP_TOKENS = 77


@dataclass(frozen=True)
class Shapes:
    """What a plan needs of a model.

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

    @property
    def blocks(self) -> int:
        """Parts of the denoiser that gradient checkpointing recomputes one at a time."""
        denoiser = self.policy.denoiser
        lists = ("transformer_blocks", "single_transformer_blocks", "down_blocks", "up_blocks")
        return sum(len(getattr(denoiser, name, ())) for name in lists) or 1

    def adapter_parameters(self, rank: int, targets: list[str] | None = None) -> int:
        """Of a LoRA adapter: `rank (inputs + outputs)` for every targeted layer.

        Args:
            rank (`int`): of the adapter.
            targets (`list[str]`, *optional*): endings of module names; the family's own by default.

        Raises:
            ValueError: if a target matches no layer.
        """
        wanted = tuple(targets or self.policy.lora_targets)
        found, total = set(), 0
        for name, size in self._layers.items():
            hit = [target for target in wanted if name == target or name.endswith(f".{target}")]
            found.update(hit)
            total += rank * size if hit else 0
        if found != set(wanted):
            raise ValueError(
                f"Every LoRA target must match a linear layer of {type(self.policy.denoiser).__name__}. Found none for "
                f"{sorted(set(wanted) - found)}. Correct `lora_target_modules`."
            )
        return total

    @cached_property
    def _layers(self) -> dict[str, int]:
        """Inputs and outputs of every layer that an adapter may go on."""
        layers = {}
        for name, module in self.policy.denoiser.named_modules():
            if isinstance(module, nn.Conv2d):
                kernel = module.kernel_size[0] * module.kernel_size[1]
                layers[name] = module.in_channels * kernel + module.out_channels
            elif isinstance(module, nn.Linear):
                layers[name] = module.in_features + module.out_features
        return layers

    def embeddings(self, rows: int, max_sequence_length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Prompt embeddings of `rows` prompts, as shapes."""
        config, pipeline = self.policy.denoiser.config, type(self.policy.pipeline).__name__
        pooled: dict[str, int] = {}
        if pipeline == "StableDiffusion3Pipeline":
            tokens, width = CLIP_TOKENS + max_sequence_length, config.joint_attention_dim
            pooled["pooled_projections"] = config.pooled_projection_dim
        elif pipeline == "FluxPipeline":
            tokens, width = max_sequence_length, config.joint_attention_dim
            pooled["pooled_projections"] = config.pooled_projection_dim
        else:
            tokens, width = CLIP_TOKENS, config.cross_attention_dim
            if pipeline == "StableDiffusionXLPipeline":
                pooled["text_embeds"] = (
                    config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
                )
        shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (rows, tokens, width)}
        shapes |= {name: (rows, size) for name, size in pooled.items()}
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
    name = SHORT_NAMES.get(model.lower(), model) if not Path(model).is_dir() else model
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
    import inspect

    import diffusers

    cls = getattr(diffusers, name)
    given = {}
    for key, parameter in inspect.signature(cls.__init__).parameters.items():
        if key in parts and not key.startswith("text_encoder"):
            given[key] = parts[key]
        elif key != "self" and parameter.default is inspect.Parameter.empty:
            given[key] = None
    if "requires_safety_checker" in inspect.signature(cls.__init__).parameters:
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
        if not (name.startswith("text_encoder") and "tokenizer" not in name) and library != "diffusers":
            continue
        if library == "diffusers" and hasattr(diffusers, class_name):
            cls = getattr(diffusers, class_name)
            config = cls.load_config(model, subfolder=name, revision=revision)
            components[name] = (class_name, dict(config))
        elif library == "transformers" and hasattr(transformers, class_name):
            config_class = getattr(transformers, class_name).config_class
            loaded = config_class.from_pretrained(model, subfolder=name, revision=revision)
            components[name] = (class_name, loaded.to_dict())
    return index["_class_name"], components
