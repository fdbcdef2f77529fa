"""The trained weights: adapters, their files, and the moving average."""

import copy
import dataclasses
import json
import logging
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.training_utils import EMAModel
from huggingface_hub import hf_hub_download, save_torch_state_dict
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ..diffusion.families import dtype_argument
from ..diffusion.families.base import DiffusionPolicy
from ..distributed import full_trainable_weights, local_shard, set_trainable_weights
from .detectors import disable_dropout

logger = logging.getLogger(__name__)

LORA_FILE, EMA_FILE = "pytorch_lora_weights.safetensors", "ema.safetensors"
RECOMPILE_LIMIT = 32
"""Graphs of one kind of block: with and without gradients, adapter, checkpointing, and the block's own variants."""
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


# The denoiser


class _Config(FrozenDict):
    """A configuration of diffusers that trackers (TensorBoard, MLflow ...) can read as one of transformers."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)


def answer_as_transformers(denoiser: Any) -> None:
    """Let Trainer and its callbacks use the names of transformers on a diffusers model, in place."""
    denoiser._internal_dict = _Config(denoiser.config)
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        for end, method in (("enable", _enable_checkpointing), ("disable", _disable_checkpointing)):
            setattr(denoiser, f"{name}_{end}", types.MethodType(method, denoiser))


def _enable_checkpointing(denoiser: Any, **kwargs: Any) -> None:
    denoiser.enable_gradient_checkpointing()


def _disable_checkpointing(denoiser: Any) -> None:
    denoiser.disable_gradient_checkpointing()


def prepare_denoiser(
    policy: DiffusionPolicy, args: Any, peft_config: Any, start: "Adapter | None"
) -> tuple[nn.Module, nn.Module | None]:
    """The model to train, an adapter or all weights of the denoiser, and what it starts from, for `beta` > 0.

    An adapter is `start`, what [`take_adapter`] found, or a new one by `peft_config`. It has no second model: it can be
    switched off, and one that starts elsewhere is copied once it lies on its device.
    """
    denoiser = policy.denoiser
    if args.disable_dropout:
        disable_dropout(denoiser)
    if args.compile_denoiser:
        compile_blocks(denoiser)
    answer_as_transformers(denoiser)
    if peft_config is not None or start is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)  # equal on all ranks, also where an engine does not broadcast
            return add_adapter(denoiser, peft_config, policy, start), None
    reference = frozen_copy(denoiser) if args.beta > 0 else None
    if reference is not None and (args.bf16 or args.fp16):  # autocast would compute in half precision anyway
        reference.to(torch.bfloat16 if args.bf16 else torch.float16)
    warn_of_all_weights(denoiser)
    denoiser.float()  # trained weights are float32; autocast does the rest
    return denoiser.requires_grad_(True), reference


def frozen_copy(model: nn.Module, share_frozen: bool = False) -> nn.Module:
    """The model as it is now, for the KL divergence to it.

    With `share_frozen` it has the weights that do not train in the same memory; for models that no engine shards.
    """
    frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()] if share_frozen else []
    return copy.deepcopy(model, {id(tensor): tensor for tensor in frozen}).eval().requires_grad_(False)


def compile_blocks(denoiser: nn.Module, backend: Any = "inductor") -> int:
    """Compile the repeated blocks of a denoiser in place, for rollout and update alike; returns how many.

    Shapes are dynamic: one graph serves all batch sizes. Past `RECOMPILE_LIMIT` graphs of one block PyTorch raises instead
    of going on without compiling, since rollout and update would then differ.

    Raises:
        ValueError: if the model does not say which of its blocks repeat.
    """
    names = getattr(denoiser, "_repeated_blocks", None) or getattr(denoiser, "_no_split_modules", None) or []
    blocks = [module for module in denoiser.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(
            f"`compile_denoiser` needs a model that names its repeated blocks. Found none in {type(denoiser).__name__}. "
            "Set compile_denoiser=False."
        )
    dynamo = torch._dynamo.config
    dynamo.fail_on_recompile_limit_hit = True
    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILE_LIMIT)
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    return len(blocks)


# The adapter to train


@dataclasses.dataclass
class Adapter:
    """An adapter that was taken off a denoiser."""

    config: LoraConfig
    weights: dict[str, Tensor]  # by PEFT's names, without the adapter's own
    scales: dict[str, float]  # what each layer multiplies its output with


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


def add_adapter(denoiser: Any, peft_config: Any, policy: DiffusionPolicy, start: Adapter | None = None) -> PeftModel:
    """Freeze `denoiser` and put an adapter on it: a fresh one by `peft_config`, or `start`, what [`take_adapter`] found.

    Without `target_modules`, the attention layers that `policy` names are taken.

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


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


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
    """Raise ValueError for what cannot be trained, or not be saved in a form that `load_lora_weights` reads."""
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
        linear = {".".join(n.split(".")[2:]) for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
        raise ValueError(
            f"Every LoRA target must match a module of {type(denoiser).__name__}. Found no module for "
            f"{sorted(missing)}. Layers to choose from include {sorted(linear - {''})[:12]}."
        )


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


# Files that diffusers loads


def save_denoiser(denoiser: Any, directory: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write weights and configuration in diffusers' format, so that `from_pretrained(directory)` reads them.

    The weights are those of `state_dict` where given, gathered or averaged: `save_pretrained` of diffusers takes them from
    the module, which holds a part under ZeRO-3 and FSDP.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    weights = denoiser.state_dict() if state_dict is None else state_dict
    weights = {name.removeprefix("module."): value.detach() for name, value in weights.items()}
    save_torch_state_dict(
        weights,
        directory,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size="10GB",
        metadata={"format": "pt"},
    )
    denoiser.save_config(directory)


def save_diffusers_lora(
    model: PeftModel, policy: DiffusionPolicy, directory: str | Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Write `pytorch_lora_weights.safetensors`, which `pipeline.load_lora_weights(directory)` reads.

    The weights are those of `state_dict` where given, gathered or averaged.

    Raises:
        RuntimeError: if the number of weights is not that of the adapter.
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
    scale = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
    metadata = {name: getattr(config, name) for name in scale}  # without them `lora_alpha` would be lost
    prefix = policy.denoiser_name
    kwargs: dict[str, Any] = {
        f"{prefix}_lora_layers": layers,
        f"{prefix}_lora_adapter_metadata": {**metadata, "target_modules": targets},
    }
    type(policy.pipeline).save_lora_weights(str(directory), **kwargs)


# An adapter or full weights from a folder or the Hub


def check_adapter(policy: DiffusionPolicy, source: str | Path, ema: bool = False) -> None:
    """Raise ValueError where a local `source` cannot be loaded, before anything is computed."""
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
    """Load an adapter onto the pipeline, from safetensors only: diffusers would try to unpickle what is none.

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
    """The file of an adapter's weights, downloaded where `source` is a hub id; ValueError if there is none."""
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


# The moving average


class EMACallback(TrainerCallback):
    """Averages the trainable parameters each `every` optimizer steps; a `decay` of 0.9 keeps nine tenths at each."""

    def __init__(self, trainer, decay: float, every: int):
        self.trainer, self.decay, self.every = trainer, decay, every
        self._ema: EMAModel | None = None

    def _parameters(self) -> list[nn.Parameter]:
        """What this rank holds of the trainable parameters: views, so that an average written there is used."""
        return [nn.Parameter(local_shard(p)) for p in self.trainer.model.parameters() if p.requires_grad]

    def _new(self) -> EMAModel:
        return EMAModel(self._parameters(), decay=self.decay, min_decay=self.decay)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.resumed_from is None:
            self._ema = self._new()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self._ema.step(self._parameters())

    def check(self, checkpoint: str | Path) -> None:
        """Raise ValueError if the average in a checkpoint, where there is one, is not of these weights."""
        file = Path(checkpoint, EMA_FILE)
        if not file.is_file():
            return
        expected = {n.removeprefix("module.") for n, p in self.trainer.model.named_parameters() if p.requires_grad}
        try:
            with safe_open(file, "pt") as content:
                names = sorted((expected | {"optimization_step"}) ^ set(content.keys()))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} must be a safetensors file. Found {error}. Take another checkpoint.") from error
        if names:
            raise ValueError(
                f"{file} must hold the average of each trained weight, and its step. Found {len(names)} names in one of the "
                f"file and the model alone, e.g. {names[0]}. Take another checkpoint."
            )

    def load(self, checkpoint: str | Path) -> None:
        """Take the average that a checkpoint holds, or start one from the weights; every rank must call it."""
        self._ema = self._new()
        file = Path(checkpoint, EMA_FILE)
        if not file.is_file():
            return
        stored = load_file(file)
        self._ema.optimization_step = int(stored.pop("optimization_step"))
        self._ema.store(self._parameters())
        set_trainable_weights(self.trainer.model, stored)
        self._ema.shadow_params = [p.detach().clone() for p in self._parameters()]
        self._ema.restore(self._parameters())

    def save(self, directory: str) -> dict[str, Tensor] | None:
        """Write the whole average; every rank must call it, the main process writes.

        Returns:
            `dict`: the averaged weights by name, complete on the main process; None before training.
        """
        if self._ema is None:
            return None
        with self.averaged():
            tensors = full_trainable_weights(self.trainer.model, main_only=True)
        if self.trainer.args.should_save:
            Path(directory).mkdir(parents=True, exist_ok=True)
            step = torch.tensor(self._ema.optimization_step)
            save_file({**tensors, "optimization_step": step}, Path(directory) / EMA_FILE)
        return tensors

    @contextmanager
    def averaged(self):
        """Put the averaged weights into the model for a while."""
        if self._ema is None:
            yield
            return
        self._ema.store(self._parameters())
        self._ema.copy_to(self._parameters())
        try:
            yield
        finally:
            self._ema.restore(self._parameters())
