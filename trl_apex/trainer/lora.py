"""Adapters on the denoiser, and their way out to diffusers."""

import inspect
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from ..policy.base import DiffusionPolicy


def add_adapter(denoiser: nn.Module, peft_config: LoraConfig, policy: DiffusionPolicy) -> PeftModel:
    """Put a fresh adapter on `denoiser`.

    Args:
        denoiser (`nn.Module`): frozen here; only the adapter trains.
        peft_config (`peft.LoraConfig`): without `target_modules`, the model family's attention layers are taken.
        policy ([`DiffusionPolicy`]): names these layers.

    Raises:
        ValueError: if a target matches no module, or dropout is on (the importance ratio would be random).
    """
    if getattr(peft_config, "lora_dropout", 0.0):
        raise ValueError(
            "`lora_dropout` must be 0: with dropout, rollout and update are different policies and the importance ratio "
            f"is noise. Found {peft_config.lora_dropout}. Set it to 0."
        )
    if peft_config.target_modules is None:
        peft_config.target_modules = list(policy.lora_targets)
    if not isinstance(peft_config.target_modules, str):
        names = [name for name, _ in denoiser.named_modules()]
        missing = [
            t for t in peft_config.target_modules if not any(name == t or name.endswith(f".{t}") for name in names)
        ]
        if missing:
            raise ValueError(
                f"Every LoRA target must match a module of {type(denoiser).__name__}. Found no module for "
                f"{sorted(missing)}. Layers to choose from include {_linear_suffixes(denoiser)}."
            )
    denoiser.requires_grad_(False)
    return get_peft_model(denoiser, peft_config)


def _linear_suffixes(module: nn.Module) -> list[str]:
    names = {".".join(n.split(".")[2:]) for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    return sorted(name for name in names if name)[:12]


def save_diffusers_lora(
    model: PeftModel, policy: DiffusionPolicy, directory: str | Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(directory)` reads.

    Args:
        model (`peft.PeftModel`): the adapted denoiser.
        policy ([`DiffusionPolicy`]): of the pipeline that will load it.
        directory (`str` or `Path`): where to.
        state_dict (`dict`, *optional*): the gathered weights, where an engine has sharded those of `model`.

    Note:
        The adapter's configuration is written into the file's metadata; without it `lora_alpha` would be lost.
    """
    adapter = get_peft_model_state_dict(model, state_dict=state_dict)
    layers = {name.removeprefix("base_model.model."): value.contiguous().cpu() for name, value in adapter.items()}
    save = type(policy.pipeline).save_lora_weights
    prefix = policy.denoiser_name
    kwargs: dict[str, Any] = {f"{prefix}_lora_layers": layers}
    if f"{prefix}_lora_adapter_metadata" in inspect.signature(save).parameters:
        config = model.peft_config[model.active_adapter].to_dict()
        kwargs[f"{prefix}_lora_adapter_metadata"] = config
    save(str(directory), **kwargs)
