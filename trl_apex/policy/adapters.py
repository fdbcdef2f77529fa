"""Put what a training run saved onto a pipeline, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .base import DiffusionPolicy
from .load import dtype_argument

LORA_FILE, EMA_FILE = "pytorch_lora_weights.safetensors", "ema.safetensors"


def check_adapter(policy: DiffusionPolicy, source: str | Path, ema: bool = False) -> None:
    """Raise where a local `source` cannot be loaded, before anything is computed.

    Raises:
        ValueError: says what the folder lacks.
    """
    if getattr(policy.denoiser, "peft_config", None):
        raise ValueError(
            "The base must come without adapters. Found some on the pipeline. Call `pipeline.unload_lora_weights()`; call "
            "`pipeline.fuse_lora()` before to keep their effect."
        )
    path = Path(source).expanduser()
    if not path.exists():
        if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
            raise ValueError(
                f"An adapter must be a run directory or a hub id. Found no folder {source}. Check the path."
            )
        if ema:
            raise ValueError(
                f"`ema=True` needs a run directory with {EMA_FILE}. Found the hub id {source}. Leave it out: what a run with "
                "`ema_decay` uploads is the average already."
            )
        return
    if _full_weights(policy, path) is None and not (path / LORA_FILE).is_file():
        raise ValueError(
            f"An adapter must hold {LORA_FILE}, or a fully trained model in {policy.denoiser_name}/. Found neither in "
            f"{source}. Pass the `output_dir` of a run that ended with `save_model()`, or one of its checkpoints."
        )
    if ema and not (path / EMA_FILE).is_file():
        raise ValueError(f"`ema=True` needs {EMA_FILE}. Found none in {source}. It is saved by runs with `ema_decay`.")


@contextmanager
def adapted(policy: DiffusionPolicy, source: str | Path, ema: bool = False) -> Iterator[None]:
    """The policy with a saved adapter, or with fully trained weights; afterwards it is the base again.

    Args:
        policy ([`DiffusionPolicy`]): without adapters.
        source (`str` or `Path`): a run directory, or a hub id of an adapter.
        ema (`bool`): take the averaged weights that were saved beside. Only runs of 0.1.0 have others in the adapter itself.

    Raises:
        ValueError: if nothing was loaded.
    """
    path = Path(source).expanduser()
    full = _full_weights(policy, path) if path.exists() else None
    base = policy.denoiser
    device = next(base.parameters()).device
    if full is not None:
        tuned = type(base).from_pretrained(full, **dtype_argument(policy.dtype)).requires_grad_(False).eval()
        base.to("cpu")
        setattr(policy.pipeline, policy.denoiser_name, tuned.to(device))
    else:
        load_adapter(policy, source)
        base.to(device)
    try:
        if ema:
            _load_average(policy.denoiser, path / EMA_FILE)
        yield
    finally:
        if full is not None:
            setattr(policy.pipeline, policy.denoiser_name, base.to(device))
        else:
            policy.pipeline.unload_lora_weights()


def load_adapter(policy: DiffusionPolicy, source: str | Path) -> None:
    """Onto the pipeline, from safetensors only: diffusers would try to unpickle what it cannot read as such.

    Args:
        policy ([`DiffusionPolicy`]): without adapters.
        source (`str` or `Path`): a folder with `pytorch_lora_weights.safetensors`, or a hub id.

    Raises:
        ValueError: if the file is none, belongs to another model, or did not arrive as a whole.
    """
    file = adapter_file(policy, source)
    try:
        with safe_open(file, "pt") as content:
            stored = [name for name in content.keys() if name.startswith(f"{policy.denoiser_name}.")]  # noqa: SIM118
        policy.pipeline.load_lora_weights(str(file.parent), weight_name=LORA_FILE, use_safetensors=True)
    except SafetensorError as error:
        raise ValueError(
            f"An adapter must be a safetensors file. Found {file}, which is none: {error}. Save or download it again."
        ) from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"An adapter must have weights of this {policy.denoiser_name}'s shapes. Found others in {source}: "
            f"{' '.join(str(error).split())[:300]}. It belongs to another model."
        ) from error
    (name,) = getattr(policy.denoiser, "peft_config", None) or [None]
    if name is None:
        raise ValueError(
            f"An adapter must have weights of the {policy.denoiser_name}. Found none in {source}. It may belong to "
            "another model."
        )
    loaded = get_peft_model_state_dict(policy.denoiser, adapter_name=name)
    if any(".lora_A." in key for key in stored) and len(loaded) != len(stored):  # not in another program's format
        policy.pipeline.unload_lora_weights()
        raise ValueError(
            f"An adapter must load as a whole. Found {len(stored)} weights in {file}, of which the "
            f"{policy.denoiser_name} took {len(loaded)}. It may belong to another model."
        )


def adapter_file(policy: DiffusionPolicy, source: str | Path) -> Path:
    """The file of an adapter's weights, downloaded where `source` is a hub id.

    Raises:
        ValueError: if there is none, or the pipeline has adapters already.
    """
    check_adapter(policy, source)
    path = Path(source).expanduser()
    if path.exists():
        if not (path / LORA_FILE).is_file():
            raise ValueError(
                f"An adapter must hold {LORA_FILE}. Found none in {source}, but a fully trained {policy.denoiser_name}. "
                "Load it into the pipeline that you pass as the model."
            )
        return path / LORA_FILE
    try:
        return Path(hf_hub_download(str(source), LORA_FILE))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"An adapter must be a run directory or a hub repository with {LORA_FILE}. Found neither in {source}: "
            f"{str(error).splitlines()[0]} A file of another name: load it with `pipeline.load_lora_weights` and pass the "
            "pipeline as the model."
        ) from error


def _full_weights(policy: DiffusionPolicy, path: Path) -> Path | None:
    folder = path / policy.denoiser_name
    return folder if (folder / "config.json").is_file() else None


@torch.no_grad()
def _load_average(denoiser: Any, file: Path) -> None:
    """Copy averaged weights over those just loaded; the file names them as the trainer's wrapped model did."""
    parameters = dict(denoiser.named_parameters())
    (adapter,) = getattr(denoiser, "peft_config", None) or [""]
    for name, value in load_file(file).items():
        if name == "optimization_step":
            continue
        plain = name.removeprefix("module.").removeprefix("base_model.model.").replace(".default.", f".{adapter}.")
        if plain not in parameters:
            raise ValueError(
                f"{file} must hold averages of the same weights. Found {name}. It may belong to another run."
            )
        parameters[plain].copy_(value)
