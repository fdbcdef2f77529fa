"""The model to train: an adapter (new, on the pipeline, from a folder or the Hub), or all weights of the denoiser."""

import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from ..aggregation.options import did_you_mean
from ..diffusion.families import dtype_argument
from ..diffusion.families.base import DiffusionPolicy
from .weights import (
    EMA_FILE,
    LORA_FILE,
    answer_as_transformers,
    choose_attention,
    compile_blocks,
    difference,
    frozen_copy,
    lora_layers,
    one_kernel,
    plain_name,
    stored_shapes,
    warn_of_all_weights,
)

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
INITIALISATIONS = (True, False, "gaussian", "orthogonal")
MERGE = "`pipeline.fuse_lora(); pipeline.unload_lora_weights()`"
WAYS_OUT = f" Leave out `peft_config` to train that adapter, or merge it first, to train a new one on top: {MERGE}."


# The model to train


def prepare_denoiser(
    policy: DiffusionPolicy, args: Any, peft_config: Any, start: "Adapter | None"
) -> tuple[nn.Module, nn.Module | None]:
    """The model to train (an adapter, or all weights of the denoiser), and the frozen copy that `beta` > 0 needs of the latter.

    The adapter is `start`, which [`take_adapter`] found, or a new one by `peft_config`.
    """
    denoiser = policy.denoiser
    _check_computation(denoiser, adapter=peft_config is not None or start is not None)
    if policy.distilled:
        warnings.warn(
            f"The configuration of this {type(policy.pipeline).__name__} says that the model is distilled (`is_distilled`). "
            "Others report that such models blur under training with rewards. Train the base model instead.",
            stacklevel=2,
        )
    if args.disable_dropout:
        for module in denoiser.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    if policy.quantized and peft_config is None and start is None:
        raise ValueError(
            "A quantized base must stay frozen, with an adapter on it. Found neither `peft_config` nor `adapter`. Pass e.g. "
            "peft_config=LoraConfig(r=32, lora_alpha=64), or load the model without quantization."
        )
    if args.attention_backend is not None:
        choose_attention(denoiser, args.attention_backend)
    if args.compile_denoiser:
        compile_blocks(denoiser)
    answer_as_transformers(denoiser)
    if peft_config is not None or start is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)  # equal on all ranks, also where an engine does not broadcast
            model = _add_adapter(policy, peft_config, start)
        if policy.quantized:  # DDP would send all weights to every rank, and not every quantized tensor can be sent
            frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        return model, None
    reference = frozen_copy(denoiser) if args.beta > 0 else None
    if reference is not None and (args.bf16 or args.fp16):  # autocast would compute in half precision anyway
        for weight in reference.parameters():  # but no engine casts tables of positions
            weight.data = weight.to(torch.bfloat16 if args.bf16 else torch.float16)
    warn_of_all_weights(denoiser)
    denoiser.float()  # trained weights are float32; autocast does the rest
    return denoiser.requires_grad_(True), reference


def _check_computation(denoiser: nn.Module, adapter: bool) -> None:
    """Raise ValueError for a denoiser that does not compute each step from the weights that train."""
    found = {name for m in denoiser.modules() for name in getattr(getattr(m, "_diffusers_hook", None), "hooks", ())}
    if adapter:  # its own weights are not cast
        found -= {"layerwise_casting", "peft_autocast_disable"}
    if any(map(_is_fused, denoiser.modules())):
        found.add("fused projections")
    if found:
        raise ValueError(
            f"The {type(denoiser).__name__} must compute each step from the weights that train. Found "
            f"{', '.join(sorted(found))}. Undo it (`unfuse_qkv_projections()`, `disable_cache()`), or load the pipeline anew."
        )


def _is_fused(module: nn.Module) -> bool:
    """Whether an attention computes query, key and value with one matrix, and not with their own layers."""
    flag = isinstance(module, AttentionModuleMixin) and module.fused_projections
    return flag or "Fused" in type(getattr(module, "processor", None)).__name__


@dataclasses.dataclass
class Adapter:
    """An adapter that was taken off a denoiser."""

    config: LoraConfig
    weights: dict[str, Tensor]  # by PEFT's names, without the adapter's own
    scales: dict[str, float]  # what each layer multiplies its output with


def take_adapter(policy: DiffusionPolicy, source: str | Path | None = None) -> Adapter | None:
    """Take the adapter that training starts from off the pipeline, which then is the bare base; None if there is none.

    It is loaded from `source` (run folder or hub id), came by `pipeline.load_lora_weights`, or is a `peft.PeftModel`. One that
    is merged, switched off, scaled or on another part is refused, since training it would change the images at once.
    """
    file = None if source is None else load_adapter(policy, source)
    for name, component in policy.pipeline.components.items():
        if name != policy.denoiser_name and getattr(component, "peft_config", None):
            raise ValueError(
                f"Only the {policy.denoiser_name} may carry an adapter, since nothing else is trained and saved. Found "
                f"one on `{name}`. Merge it ({MERGE}) or unload it."
            )
    denoiser = policy.denoiser
    configs = getattr(denoiser, "peft_config", None)
    if not configs:
        return None
    if len(configs) > 1:
        raise ValueError(
            f"The {policy.denoiser_name} must carry one adapter to train on. Found {len(configs)}: {', '.join(configs)}. "
            f"Keep one (`pipeline.delete_adapters(name)`), or merge them: {MERGE}."
        )
    ((name, config),) = configs.items()
    layers = lora_layers(denoiser)
    if any(layer.merged or layer.disable_adapters or name not in layer.active_adapters for layer in layers.values()):
        raise ValueError(
            f"An adapter to train on must be at work as it is. Found '{name}' merged or switched off. Call "
            "`pipeline.unfuse_lora()` or `pipeline.enable_lora()`; or take it away with `pipeline.unload_lora_weights()`."
        )
    if getattr(config, "lora_dropout", 0.0):
        logger.warning("The adapter's `lora_dropout` of %s is set to 0, as training needs it.", config.lora_dropout)
        config = dataclasses.replace(config, lora_dropout=0.0)
    _check_options(config)
    state = get_peft_model_state_dict(denoiser, adapter_name=name)
    weights = {plain_name(key): value.detach().clone() for key, value in state.items()}
    if file is not None:  # in the file's own precision; a pipeline in bf16 has rounded them
        stored = {key.removeprefix(f"{policy.denoiser_name}."): value for key, value in load_file(file).items()}
        weights |= {key: value for key, value in stored.items() if key in weights}
    scales = {key: layer.scaling[name] for key, layer in layers.items()}
    if isinstance(denoiser, PeftModel):
        denoiser = denoiser.get_base_model()
        setattr(policy.pipeline, policy.denoiser_name, denoiser)
    denoiser.unload_lora()
    return Adapter(config, weights, scales)


def _add_adapter(policy: DiffusionPolicy, peft_config: Any, start: Adapter | None) -> PeftModel:
    """Freeze the denoiser and put an adapter on it: `start`, or a new one by `peft_config`."""
    denoiser: Any = policy.denoiser
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
    one_kernel(denoiser)
    model = get_peft_model(denoiser, config)
    if start is None:
        return model
    if wrong := _other_adapter(model, start):
        denoiser.unload_lora()  # a refused pipeline stays as it was
        _fill(get_peft_model(denoiser, start.config), start)
        raise ValueError(wrong + (WAYS_OUT if peft_config is not None else " Set it to 1 before training."))
    return _fill(model, start)


def _other_adapter(model: PeftModel, start: Adapter) -> str:
    """How the adapter on `model` differs from `start`, as an error; empty where it does not."""
    shapes = {plain_name(key): list(value.shape) for key, value in get_peft_model_state_dict(model).items()}
    differs = difference({key: list(value.shape) for key, value in start.weights.items()}, shapes)
    if differs:
        return f"`peft_config` must describe the adapter that is on the model already. Found {differs} in the adapter."
    for key, layer in lora_layers(model).items():
        scale = layer.scaling[model.active_adapter]
        if abs(scale - start.scales[key]) > 1e-9 * abs(scale):
            return (
                f"The adapter on the model must have the scale of its configuration, {scale:.4g}. Found "
                f"{start.scales[key]:.4g} in {key}."
            )
    return ""


def _fill(model: PeftModel, start: Adapter) -> PeftModel:
    set_peft_model_state_dict(model, {f"base_model.model.{key}": value for key, value in start.weights.items()})
    return model


def _check_options(config: Any) -> None:
    """Raise ValueError for an adapter that cannot be trained, or that `load_lora_weights` could not read."""
    if not isinstance(config, LoraConfig) or config.peft_type != "LORA":
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
    defaults = LoraConfig()
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), getattr(defaults, field.name)
        if field.name not in DELIVERED | WITHOUT_EFFECT and value != default:
            raise ValueError(
                f"`{field.name}` of LoraConfig must stay at {default!r}: a saved adapter with it cannot be loaded by "
                f"`pipeline.load_lora_weights`. Found {value!r}. Remove it."
            )


def _check_targets(denoiser: nn.Module, targets: Any) -> None:
    """Raise ValueError for targets that no module has; PEFT would pass over them if one other target fits."""
    names = [f".{name}" for name, _ in denoiser.named_modules()]
    missing = [target for target in targets if not any(name.endswith(f".{target}") for name in names)]
    if missing:
        linear = {".".join(n.split(".")[2:]) for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
        raise ValueError(
            f"Every LoRA target must match a module of {type(denoiser).__name__}. Found no module for "
            f"{sorted(missing)}. Layers to choose from include {sorted(linear - {''})[:12]}."
        )


# An adapter or full weights from a folder or the Hub


def check_place(source: str | Path) -> None:
    """Raise ValueError for an adapter that reads like a folder and is none: a typo need not wait for the Hub."""
    path = Path(source).expanduser()
    is_path = str(source).count("/") != 1 or str(source).startswith((".", "/", "~")) or path.parent.is_dir()
    if is_path and not path.exists():
        near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise ValueError(
            f"An adapter must be a run directory or a hub id. Found no folder {source}. {near}Check the path."
        )


def check_adapter(policy: DiffusionPolicy, source: str | Path, ema: bool = False) -> None:
    """Raise ValueError where a local `source` cannot be loaded, before anything is computed."""
    if getattr(policy.denoiser, "peft_config", None):
        raise ValueError(
            f"The base must come without adapters. Found some on the pipeline. Merge them ({MERGE}), or unload them."
        )
    path = Path(source).expanduser()
    check_place(source)
    if path.exists() and _full_weights(policy, path) is None and not (path / LORA_FILE).is_file():
        raise ValueError(
            f"An adapter must hold {LORA_FILE}, or a fully trained model in {policy.denoiser_name}/. Found neither in "
            f"{source}. Pass the `output_dir` of a run that ended with `save_model()`, or one of its checkpoints."
        )
    if ema and not (path / EMA_FILE).is_file():
        raise ValueError(
            f"`ema=True` needs {EMA_FILE} in a run directory. Found none in {source}. Runs with `ema_decay` save it; what "
            "they upload is the average already."
        )


@contextmanager
def adapted(policy: DiffusionPolicy, source: str | Path, ema: bool = False) -> Iterator[None]:
    """The policy with the adapter, or all weights, of a run directory or hub id; afterwards the base again.

    `ema` takes the average that was saved beside them. Only runs of 0.1.0 need it: later adapters hold the average.
    """
    path = Path(source).expanduser()
    full = _full_weights(policy, path)
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


def load_adapter(policy: DiffusionPolicy, source: str | Path) -> Path:
    """Load an adapter onto the pipeline and return its file; ValueError if it is of another model or did not load completely.

    From safetensors only: diffusers would try to unpickle what is none.
    """
    file, part = _adapter_file(policy, source), policy.denoiser_name
    stored = [name for name in stored_shapes(file) if name.startswith(f"{part}.")]
    try:
        policy.pipeline.load_lora_weights(str(file.parent), weight_name=LORA_FILE, use_safetensors=True)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(
            f"An adapter must have weights of this {part}'s shapes. Found others in {source}: "
            f"{' '.join(str(error).split())[:300]}. It belongs to another model."
        ) from error
    names = list(getattr(policy.denoiser, "peft_config", None) or [])
    loaded = get_peft_model_state_dict(policy.denoiser, adapter_name=names[0]) if names else {}
    ours = any(".lora_A." in key for key in stored)  # else in another program's format, which diffusers converts
    if not loaded or (ours and len(loaded) != len(stored)):
        policy.pipeline.unload_lora_weights()
        raise ValueError(
            f"An adapter must load completely. Found {len(stored)} weights in {file}, of which the "
            f"{part} took {len(loaded)}. It may belong to another model."
        )
    return file


def _adapter_file(policy: DiffusionPolicy, source: str | Path) -> Path:
    """The file of an adapter's weights, downloaded where `source` is a hub id; ValueError if there is none."""
    check_adapter(policy, source)
    path = Path(source).expanduser()
    if (path / LORA_FILE).is_file():
        return path / LORA_FILE
    if path.exists():
        raise ValueError(
            f"An adapter must hold {LORA_FILE}. Found none in {source}, but a fully trained {policy.denoiser_name}. "
            "Load it into the pipeline that you pass as the model."
        )
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
        plain = plain_name(name.removeprefix("module.")).replace(".default.", f".{adapter}.")
        if plain not in parameters:
            raise ValueError(
                f"{file} must hold averages of the same weights. Found {name}. It may belong to another run."
            )
        parameters[plain].copy_(value)
