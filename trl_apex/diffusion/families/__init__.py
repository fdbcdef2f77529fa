"""From a model id, a folder or a pipeline object to a policy."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from packaging.version import Version

from .base import DiffusionPolicy
from .flux import FluxKontextPolicy, FluxPolicy
from .flux2 import Flux2KleinPolicy, Flux2Policy
from .qwen_image import QwenImageEditPlusPolicy, QwenImagePolicy
from .sd3 import SD3Policy
from .stable_diffusion import StableDiffusionPolicy, StableDiffusionXLPolicy
from .z_image import ZImagePolicy

FAMILIES: dict[str, type[DiffusionPolicy]] = {
    "StableDiffusion3Pipeline": SD3Policy,
    "FluxPipeline": FluxPolicy,
    "FluxKontextPipeline": FluxKontextPolicy,
    "Flux2Pipeline": Flux2Policy,
    "Flux2KleinPipeline": Flux2KleinPolicy,
    "QwenImagePipeline": QwenImagePolicy,
    "QwenImageEditPlusPipeline": QwenImageEditPlusPolicy,
    "ZImagePipeline": ZImagePolicy,
    "StableDiffusionPipeline": StableDiffusionPolicy,
    "StableDiffusionXLPipeline": StableDiffusionXLPolicy,
}


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword of `from_pretrained` for the weights' dtype, which diffusers has renamed."""
    renamed = Version(diffusers.__version__) >= Version("0.42.0.dev0")
    return {"dtype" if renamed else "torch_dtype": dtype}


def load_policy(model: Any, **from_pretrained_kwargs: Any) -> DiffusionPolicy:
    """Wrap a pipeline as a policy; a hub id or a local folder is loaded first, by `DiffusionPipeline.from_pretrained`.

    Raises:
        ValueError: if the pipeline is of no supported family, or lacks a component or a suitable scheduler.
        FileNotFoundError: if `model` looks like a folder and there is none.
    """
    if isinstance(model, str | Path):
        path, model = Path(model), str(model)
        is_path = model.startswith((".", "/", "~")) or model.count("/") != 1 or path.parent.is_dir()
        if is_path and not path.is_dir():
            raise FileNotFoundError(f"The folder of a model must exist. Found no {model}. Pass a path, or a hub id.")
        model = diffusers.DiffusionPipeline.from_pretrained(model, **from_pretrained_kwargs)
    family = next((FAMILIES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in FAMILIES), None)
    if family is None:
        raise ValueError(
            f"`model` must be a supported text-to-image pipeline: {', '.join(FAMILIES)}. Found {type(model).__name__}. "
            "Pass a hub id, a folder in diffusers' format or a pipeline object of one of these classes."
        )
    policy = family(model)
    policy.check()
    return policy
