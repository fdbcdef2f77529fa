"""A denoiser of diffusers, on its way into a trainer of transformers and, fully fine-tuned, out again."""

import copy
import json
import types
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
RECOMPILE_LIMIT = 32
"""Graphs of one kind of block: with and without gradients, adapter, checkpointing, and the block's own variants."""


def save_denoiser(
    denoiser: Any,
    directory: str | Path,
    state_dict: dict[str, Tensor] | None = None,
    max_shard_size: int | str = "10GB",
) -> None:
    """Write weights and configuration in diffusers' format, so that `from_pretrained(directory)` reads them.

    Args:
        denoiser (`diffusers.ModelMixin`): gives the configuration, and the weights unless `state_dict` does.
        directory (`str` or `Path`): where to; made if needed.
        state_dict (`dict`, *optional*): the gathered weights, where an engine has sharded those of `denoiser`.
        max_shard_size (`int` or `str`): larger models are split into several files.

    Note:
        `save_pretrained` of diffusers reads the weights from the module itself, which under ZeRO-3 and FSDP holds a part.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = denoiser.state_dict() if state_dict is None else state_dict
    weights = {name.removeprefix("module."): value.detach().contiguous().cpu() for name, value in weights.items()}
    split = split_torch_state_dict_into_shards(weights, filename_pattern=WEIGHTS, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=1))
    denoiser.save_config(directory)


class _Config(FrozenDict):
    """A configuration of diffusers that trackers (TensorBoard, MLflow ...) can read as one of transformers."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, default=str)


def answer_as_transformers(denoiser: Any) -> None:
    """Let Trainer and its callbacks use the names they know; diffusers has its own.

    Args:
        denoiser (`diffusers.ModelMixin`): changed in place.
    """
    denoiser._internal_dict = _Config(denoiser.config)
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        enable = types.MethodType(lambda self, **kwargs: self.enable_gradient_checkpointing(), denoiser)
        setattr(denoiser, f"{name}_enable", enable)
        setattr(
            denoiser, f"{name}_disable", types.MethodType(lambda self: self.disable_gradient_checkpointing(), denoiser)
        )


def frozen_copy(model: nn.Module, share_frozen: bool = False) -> nn.Module:
    """The model as it is now, for the KL divergence to it.

    Args:
        model (`nn.Module`): the model before training.
        share_frozen (`bool`): use the same memory for the weights that do not train; for models that no engine shards.
    """
    frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()] if share_frozen else []
    return copy.deepcopy(model, {id(tensor): tensor for tensor in frozen}).eval().requires_grad_(False)


def compile_blocks(denoiser: nn.Module, backend: Any = "inductor") -> int:
    """Compile the repeated blocks of a denoiser in place, so that rollout and update run the same compiled code.

    Shapes are dynamic: one graph serves all batch sizes. Past `RECOMPILE_LIMIT` graphs of one block PyTorch raises instead
    of going on without compiling, since rollout and update would then differ.

    Args:
        denoiser (`nn.Module`): a diffusers model.
        backend (`str` or `Callable`): of `torch.compile`.

    Returns:
        `int`: how many blocks.

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
