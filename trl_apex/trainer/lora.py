"""The adapter on the denoiser: new or gone on from, and its way out to diffusers."""

import copy
import dataclasses
import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from ..policy.adapters import adapter_file, load_adapter
from ..policy.base import DiffusionPolicy

logger = logging.getLogger(__name__)

# Options of LoraConfig that training keeps to and that a saved adapter takes along. Any other must stay at its default.
DELIVERED = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "use_rslora", "use_dora",
}  # fmt: skip
# Options that say where a configuration comes from or how weights start, and so nothing about a saved adapter.
WITHOUT_EFFECT = {
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "task_type",
    "init_lora_weights", "lora_dropout",
}  # fmt: skip
ADAPTER_RATE, FULL_RATE = 3e-4, 1e-5  # default learning rates
MANY_WEIGHTS = 10**9
INITIALISATIONS = (True, False, "gaussian", "orthogonal")
WAYS_OUT = (
    "Leave out `peft_config` to train that adapter on, or merge it into the model first, to train a new one on top: "
    "`pipeline.fuse_lora(); pipeline.unload_lora_weights()`."
)


@dataclasses.dataclass
class Adapter:
    """An adapter that was taken off a denoiser.

    Args:
        config (`peft.LoraConfig`): its configuration.
        weights (`dict[str, Tensor]`): by the names of PEFT, without the adapter's own name.
        scales (`dict[str, float]`): what each layer multiplies its output with.
    """

    config: LoraConfig
    weights: dict[str, Tensor]
    scales: dict[str, float]


def take_adapter(policy: DiffusionPolicy, source: str | Path | None = None) -> Adapter | None:
    """Take the adapter to start from off the pipeline, whichever way it came there; None where there is none.

    Args:
        policy ([`DiffusionPolicy`]): its denoiser may carry an adapter of `pipeline.load_lora_weights` or be a
            `peft.PeftModel`; afterwards it is the bare base.
        source (`str` or `Path`, *optional*): run folder or hub id of an adapter to load first.

    Raises:
        ValueError: for several adapters, and for one that is merged, switched off, scaled or on another part, since
            training it would change the images at once.
    """
    file = None
    if source is not None:
        file = adapter_file(policy, source)
        load_adapter(policy, file.parent)
    for name, component in policy.pipeline.components.items():
        if name != policy.denoiser_name and getattr(component, "peft_config", None):
            raise ValueError(
                f"Only the {policy.denoiser_name} may carry an adapter, since nothing else is trained and saved. Found "
                f"one on `{name}`. Merge it (`pipeline.fuse_lora(); pipeline.unload_lora_weights()`) or unload it."
            )
    denoiser = policy.denoiser
    configs = getattr(denoiser, "peft_config", None)
    if not configs:
        return None
    if len(configs) > 1:
        raise ValueError(
            f"The {policy.denoiser_name} must carry one adapter to train on. Found {len(configs)}: {', '.join(configs)}. "
            "Keep one (`pipeline.delete_adapters(name)`), or merge them: `pipeline.fuse_lora(); "
            "pipeline.unload_lora_weights()`."
        )
    ((name, config),) = configs.items()
    layers = {key: layer for key, layer in denoiser.named_modules() if isinstance(layer, BaseTunerLayer)}
    if any(layer.merged or layer.disable_adapters or name not in layer.active_adapters for layer in layers.values()):
        raise ValueError(
            f"An adapter to train on must be at work as it is. Found '{name}' merged or switched off. Call "
            "`pipeline.unfuse_lora()` or `pipeline.enable_lora()`; or take it away with `pipeline.unload_lora_weights()`."
        )
    if getattr(config, "lora_dropout", 0.0):
        logger.warning("The adapter's `lora_dropout` of %s is set to 0, as training needs it.", config.lora_dropout)
        config = dataclasses.replace(config, lora_dropout=0.0)
    _check_options(config)
    weights = get_peft_model_state_dict(denoiser, adapter_name=name)
    weights = {_plain(key): value.detach().clone() for key, value in weights.items()}
    if file is not None:  # in the file's own precision; a pipeline in bf16 has rounded them
        stored = {key.removeprefix(f"{policy.denoiser_name}."): value for key, value in load_file(file).items()}
        weights |= {key: value for key, value in stored.items() if key in weights}
    scales = {_plain(key): layer.scaling[name] for key, layer in layers.items()}
    if isinstance(denoiser, PeftModel):
        denoiser = denoiser.get_base_model()
        setattr(policy.pipeline, policy.denoiser_name, denoiser)
    denoiser.unload_lora()
    return Adapter(config, weights, scales)


def add_adapter(
    denoiser: Any, peft_config: LoraConfig | None, policy: DiffusionPolicy, start: Adapter | None = None
) -> PeftModel:
    """Put an adapter on `denoiser`, a fresh one or the one to start from.

    Args:
        denoiser (`diffusers.ModelMixin`): frozen here; only the adapter trains.
        peft_config (`peft.LoraConfig`, *optional*): without `target_modules`, the model family's attention layers are
            taken. None for the configuration of `start`.
        policy ([`DiffusionPolicy`]): names these layers.
        start ([`Adapter`], *optional*): what [`take_adapter`] found.

    Raises:
        ValueError: if a target matches no module, an option cannot be delivered, or `start` is another adapter than
            `peft_config` describes.
    """
    config: Any = start.config if peft_config is None and start is not None else peft_config
    _check_options(config)
    config = copy.deepcopy(config)  # the user's own is not written into
    if config.task_type is not None:
        logger.warning("`task_type` is for language models; %r is left out.", config.task_type)
    config.task_type, config.inference_mode = None, False
    config.base_model_name_or_path = config.revision = None  # of the model that it was read from
    if config.target_modules is None:
        config.target_modules = list(policy.lora_targets)
    if start is not None:
        config.init_lora_weights = True  # no sampling or decomposition for weights that are replaced at once
    elif not isinstance(config.target_modules, str):
        _check_targets(denoiser, config.target_modules)
    denoiser.requires_grad_(False)
    model = get_peft_model(denoiser, config)
    if start is not None:
        difference = _difference(model, start)
        if difference:
            denoiser.unload_lora()  # a refused pipeline stays as it was
            _fill(get_peft_model(denoiser, start.config), start)
            raise ValueError(difference + (WAYS_OUT if peft_config is not None else "Set it to 1 before training."))
        _fill(model, start)
    return model


def _fill(model: PeftModel, start: Adapter) -> None:
    set_peft_model_state_dict(model, {f"base_model.model.{key}": value for key, value in start.weights.items()})


def warn_of_all_weights(denoiser: nn.Module) -> None:
    """Warn where so many weights are to be trained that `peft_config` was probably forgotten."""
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    if count > MANY_WEIGHTS:
        warnings.warn(
            f"All {count / 1e9:.1f} billion weights of {type(denoiser).__name__} are trained, which takes about "
            f"{16 * count / 1e9:.0f} GB for weights, gradients and AdamW alone. If that is not what you want, pass e.g. "
            "peft_config=LoraConfig(r=32, lora_alpha=64).",
            stacklevel=2,
        )


def _check_options(config: Any) -> None:
    """Raise for what cannot be trained, or not be saved in a form that `load_lora_weights` of diffusers reads.

    Raises:
        ValueError: names the option.
    """
    if not isinstance(config, LoraConfig) or str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ValueError(
            "`peft_config` must be a `peft.LoraConfig`, the kind of adapter that diffusers' pipelines load. Found "
            f"{type(config).__name__}. Use e.g. LoraConfig(r=32, lora_alpha=64)."
        )
    if config.lora_dropout:
        raise ValueError(
            "`lora_dropout` must be 0: with dropout, rollout and update are different policies and the importance ratio "
            f"is noise. Found {config.lora_dropout}. Set it to 0."
        )
    if config.init_lora_weights not in INITIALISATIONS:
        raise ValueError(
            f"`init_lora_weights` must be one of {', '.join(map(repr, INITIALISATIONS))}: others change the base model, or "
            f"need data, so that the adapter alone would draw other images. Found {config.init_lora_weights!r}."
        )
    for field in dataclasses.fields(config):
        if field.name in DELIVERED | WITHOUT_EFFECT:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(config, field.name)
        if value != default:
            raise ValueError(
                f"`{field.name}` of LoraConfig must stay at {default!r}: a saved adapter with it cannot be loaded by "
                f"`pipeline.load_lora_weights`. Found {value!r}. Remove it."
            )


def _check_targets(denoiser: nn.Module, targets: Any) -> None:
    names = [name for name, _ in denoiser.named_modules()]
    missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
    if missing:
        raise ValueError(
            f"Every LoRA target must match a module of {type(denoiser).__name__}. Found no module for "
            f"{sorted(missing)}. Layers to choose from include {_linear_suffixes(denoiser)}."
        )


def _linear_suffixes(module: nn.Module) -> list[str]:
    names = {".".join(n.split(".")[2:]) for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    return sorted(name for name in names if name)[:12]


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _difference(model: PeftModel, start: Adapter) -> str:
    """How the adapter on `model` differs from `start`, in words; empty where it does not."""
    shapes = {_plain(key): list(value.shape) for key, value in get_peft_model_state_dict(model).items()}
    wanted = {key: list(value.shape) for key, value in start.weights.items()}
    names = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
    if names:
        return (
            f"`peft_config` must describe the adapter that is on the model already. Found {len(names)} weights that "
            f"differ, e.g. {names[0]}: {wanted.get(names[0], 'none')} in the adapter, "
            f"{shapes.get(names[0], 'none')} by the configuration. "
        )
    layers = {_plain(key): layer for key, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for key, layer in layers.items():
        scale = layer.scaling[model.active_adapter]
        if abs(scale - start.scales[key]) > 1e-9 * abs(scale):
            return (
                f"The adapter on the model must have the scale of its configuration, {scale:.4g}. Found "
                f"{start.scales[key]:.4g} in {key}. "
            )
    return ""


def save_diffusers_lora(
    model: PeftModel, policy: DiffusionPolicy, directory: str | Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(directory)` reads.

    Args:
        model (`peft.PeftModel`): the adapted denoiser.
        policy ([`DiffusionPolicy`]): of the pipeline that will load it.
        directory (`str` or `Path`): where to.
        state_dict (`dict`, *optional*): the weights to write, where they are not those of `model`: gathered or averaged.

    Raises:
        RuntimeError: if the number of weights is not that of the adapter.

    Note:
        The options that still matter are written into the file's metadata; without them `lora_alpha` would be lost.
    """
    adapter = get_peft_model_state_dict(model, state_dict=state_dict)
    layers = {_plain(name): value.contiguous().cpu() for name, value in adapter.items()}
    config: Any = model.peft_config[model.active_adapter]
    targets = [_plain(name) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    expected = len(targets) * (3 if config.use_dora else 2)
    if len(layers) != expected or not expected:
        raise RuntimeError(
            f"A saved adapter must hold the weights of all its {len(targets)} layers, {expected} in all. Found {len(layers)}. "
            "Nothing was written; the versions of peft and of the engine do not fit each other."
        )
    save = type(policy.pipeline).save_lora_weights
    prefix = policy.denoiser_name
    kwargs: dict[str, Any] = {f"{prefix}_lora_layers": layers}
    if f"{prefix}_lora_adapter_metadata" in inspect.signature(save).parameters:
        scale = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
        known = {name: getattr(config, name) for name in scale}
        kwargs[f"{prefix}_lora_adapter_metadata"] = {**known, "target_modules": targets}
    save(str(directory), **kwargs)
