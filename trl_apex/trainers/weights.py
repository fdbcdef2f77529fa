"""The trained weights: the denoiser, the files they are saved in, and copies that follow them."""

import copy
import json
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ..aggregation.options import did_you_mean
from ..diffusion.families.base import DiffusionPolicy
from ..diffusion.losses import Decay
from ..distributed import full_trainable_weights, local_shard, named_trainable, shard_of

logger = logging.getLogger(__name__)

LORA_FILE, EMA_FILE, ANCHOR_FILE = "pytorch_lora_weights.safetensors", "ema.safetensors", "anchor.safetensors"
ADAPTER_RATE, FULL_RATE = 3e-4, 1e-5  # default learning rates
MANY_WEIGHTS = 10**9
RECOMPILE_LIMIT = 32
"""Graphs of one kind of block: with and without gradients, adapter, checkpointing, and the block's own variants."""


# The denoiser


class _Config(FrozenDict):
    """A configuration of diffusers that trackers (TensorBoard, MLflow ...) can read as one of transformers."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self, indent=2, default=str)


def answer_as_transformers(denoiser: Any) -> None:
    """Let Trainer and its callbacks use the names of transformers on a diffusers model, in place."""
    denoiser._internal_dict = _Config(denoiser.config)
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        setattr(denoiser, f"{name}_enable", lambda **kwargs: denoiser.enable_gradient_checkpointing())
        setattr(denoiser, f"{name}_disable", denoiser.disable_gradient_checkpointing)


def frozen_copy(model: nn.Module, share_frozen: bool = False) -> nn.Module:
    """The model as it is now, for the KL divergence to it.

    With `share_frozen` it has the weights that do not train in the same memory; for models that no engine shards.
    """
    frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()] if share_frozen else []
    return copy.deepcopy(model, {id(tensor): tensor for tensor in frozen}).eval().requires_grad_(False)


def choose_attention(denoiser: Any, backend: str) -> None:
    """Let every attention of a denoiser call a kernel, by diffusers' name for it; ValueError where it cannot."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [name.value for name in AttentionBackendName if "sage" not in name.value]  # those only infer
    if backend not in known:
        raise ValueError(
            f"`attention_backend` must be one of {', '.join(known)}. Found {backend!r}. "
            f"{did_you_mean(backend, known)}None leaves the choice to PyTorch."
        )
    if not any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in denoiser.modules()):
        raise ValueError(
            f"`attention_backend` needs a model whose attention diffusers can direct, such as FLUX, Qwen-Image or Z-Image. Found "
            f"{type(denoiser).__name__}, which always calls PyTorch's. Leave it out."
        )
    try:
        denoiser.set_attention_backend(backend)
    except (RuntimeError, ImportError) as error:
        raise ValueError(
            f"`attention_backend` must name a kernel that is installed. Found {backend!r}: {error}"
        ) from error


def one_kernel(denoiser: nn.Module) -> None:
    """Let layers of 4 bits compute without gradients as they do with them, in place.

    bitsandbytes multiplies by another kernel where no gradient is needed, so rollout and update would be different policies.
    """

    def with_gradients(own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            return own(x)
        with torch.enable_grad():
            return own(x.detach().requires_grad_()).detach()

    for layer in denoiser.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.forward = partial(with_gradients, layer.forward)


def compile_blocks(denoiser: nn.Module, backend: Any = "inductor") -> int:
    """Compile the repeated blocks of a denoiser in place, for rollout and update alike; returns how many.

    Shapes are dynamic: one graph serves all batch sizes. Past `RECOMPILE_LIMIT` graphs of one block PyTorch raises instead
    of going on without compiling, since rollout and update would then differ.
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


# Files that diffusers loads


def save_denoiser(denoiser: Any, directory: str | Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write weights (the model's own, or gathered or averaged ones) and configuration for `from_pretrained(directory)`.

    `save_pretrained` of diffusers takes weights from the module, which holds a part under ZeRO-3 and FSDP.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    weights = denoiser.state_dict() if weights is None else weights
    save_torch_state_dict(
        {name.removeprefix("module."): value.detach() for name, value in weights.items()},
        directory,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size="10GB",
        metadata={"format": "pt"},
    )
    denoiser.save_config(directory)


def save_diffusers_lora(
    model: PeftModel, policy: DiffusionPolicy, directory: str | Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write weights (the model's own, or gathered or averaged ones) for `pipeline.load_lora_weights(directory)`."""
    adapter = get_peft_model_state_dict(model, state_dict=weights)
    layers = {plain_name(name): value.contiguous().cpu() for name, value in adapter.items()}
    config: Any = model.peft_config[model.active_adapter]
    targets = list(lora_layers(model))
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


def stored_shapes(file: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a safetensors file; ValueError if it is none."""
    try:
        with safe_open(file, "pt") as content:
            return {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Weights must be a safetensors file. Found {file}, which is none: {error}. Take another file, or save or "
            "download it again."
        ) from error


def difference(found: dict[str, list[int]], expected: dict[str, list[int]]) -> str:
    """Which shapes differ, in words: how many, and the first; empty where none does.

    Example:
        >>> difference({"up": [4, 2], "down": [2, 4]}, {"up": [4, 3], "down": [2, 4]})
        '1 weights that differ, e.g. up: [4, 2] instead of [4, 3]'
    """
    names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    if not names:
        return ""
    first, wanted = found.get(names[0], "none"), expected.get(names[0], "none")
    return f"{len(names)} weights that differ, e.g. {names[0]}: {first} instead of {wanted}"


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by the names that they have without it."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def plain_name(name: str) -> str:
    """A weight's name without PEFT's prefix."""
    return name.removeprefix("base_model.model.")


# Copies of the trained weights, saved and loaded beside them: the moving average, and the anchor of 'nft' and 'awm'


class WeightCopy:
    """A copy of the trained weights that follows them: `copy <- d copy + (1 - d) weights` every few optimizer steps.

    It is in float32 also where DeepSpeed trains half-precision weights, whose rounding would swallow its small steps.
    `decay` is d by the number of the step, or None for no copy. It is saved in `file`; `offload` keeps it on the CPU.
    """

    def __init__(self, trainer, decay: Decay | None, every: int, file: str = EMA_FILE, offload: bool = False):
        if decay is not None and trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
            raise ValueError(
                "Copies of the weights (`ema_decay`, `anchor_decay`) need FSDP2, which keeps each weight by its name. Found "
                "FSDP1. Set `fsdp_version: 2` in the configuration of accelerate, or `fsdp_config={'version': 2}`."
            )
        self.trainer, self.decay, self.every, self.file, self.offload = trainer, decay, every, file, offload
        self.copy: list[Tensor] | None = None  # of what this rank holds, from the beginning of training

    def start(self) -> None:
        """Make the copy equal to the weights."""
        if self.decay is not None:
            self.copy = [
                weight.to(
                    device="cpu" if self.offload else weight.device,
                    dtype=torch.promote_types(weight.dtype, torch.float32),
                    copy=True,
                )
                for weight in self._weights()
            ]

    def follow(self, step: int) -> None:
        """Move the copy towards the weights, if it is due after this optimizer step."""
        if self.decay is None or self.copy is None or step % self.every:
            return
        decay = self.decay.at(step)
        for own, weight in zip(self.copy, self._weights(), strict=True):
            own.lerp_(weight.to(own), 1 - decay)

    @contextmanager
    def applied(self):
        """The model with the copy's weights; afterwards with its own again.

        They change places with a copy of their own precision, so that memory holds no third one. A copy of another stays as
        it is, and the weights wait beside it.
        """
        if self.copy is None:
            yield
            return
        pairs = zip(self.copy, self._weights(), strict=True)
        places = [own if own.dtype == w.dtype else torch.empty_like(w, device=own.device) for own, w in pairs]
        self._exchange(self.copy, places)
        try:
            yield
        finally:
            self._exchange(places, places)

    def save(self, directory: str) -> dict[str, Tensor] | None:
        """Write the full copy and return it by name; every rank must call it, the main process writes and has it.

        None where there is no copy, or none yet.
        """
        if self.copy is None:
            return None
        tensors = full_trainable_weights(self.trainer.model, main_only=True, shards=self.copy)
        if self.trainer.args.should_save:
            Path(directory).mkdir(parents=True, exist_ok=True)
            updates = torch.tensor(self.trainer.state.global_step // self.every)
            save_file({**tensors, "optimization_step": updates}, Path(directory) / self.file)
        return tensors

    def load(self, checkpoint: str | Path) -> None:
        """Take the copy that a checkpoint holds, or start one from the weights; every rank must call it."""
        self.start()
        file = Path(checkpoint, self.file)
        if self.copy is None:
            return
        if not file.is_file():
            logger.warning("%s holds no %s: the copy starts from the checkpoint's weights.", checkpoint, self.file)
            return
        found = load_file(file)
        for own, (name, parameter) in zip(self.copy, named_trainable(self.trainer.model), strict=True):
            own.copy_(shard_of(found[name].to(own.dtype), parameter))

    def check(self, checkpoint: str | Path) -> None:
        """Raise ValueError if the copy in a checkpoint, where there is one, is not of these weights."""
        file = Path(checkpoint, self.file)
        if self.decay is None or not file.is_file():
            return
        trained = named_trainable(self.trainer.model)
        expected = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in trained} | {"optimization_step": []}
        differs = difference(stored_shapes(file), expected)
        if differs:
            raise ValueError(
                f"{file} must hold a copy of each trained weight, and its step. Found {differs}. Take another checkpoint."
            )

    def _weights(self) -> list[Tensor]:
        """What this rank holds of the trained weights: views, so that what is written there is used."""
        return [local_shard(parameter) for _, parameter in named_trainable(self.trainer.model)]

    def _exchange(self, values: list[Tensor], places: list[Tensor]) -> None:
        """Put values into the model and what it held into places, one tensor at a time."""
        for value, place, weight in zip(values, places, self._weights(), strict=True):
            held = weight.clone()
            weight.copy_(value)
            place.copy_(held)


class CopiesCallback(TrainerCallback):
    """Starts the copies of the trained weights with a run, and lets them follow."""

    def __init__(self, trainer, copies: list[WeightCopy]):
        self.trainer, self.copies = trainer, copies

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.resumed_from is None:
            for each in self.copies:
                each.start()

    def on_step_end(self, args, state, control, **kwargs):
        for each in self.copies:
            each.follow(state.global_step)
