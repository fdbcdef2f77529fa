"""What a user passes to a trainer, checked before any compute, and what rewards are called with."""

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EarlyStoppingCallback
from trl import GRPOConfig

from ..diffusion.families import dtype_argument, load_policy
from ..diffusion.families.base import DiffusionPolicy
from ..prompts.datasets import check_dataset, check_sources
from ..rewards.base import KEYWORDS, reward_columns, to_pil, wants_whole_groups
from ..rewards.scoring import numbered_names, reward_name, takes_images
from ..tiny.world import load_tiny_pipeline, weights_path
from .manifest import check_writable

SIDES = ("height", "width")
"""Columns that say how large the image of a prompt is."""


@dataclass
class Sources:
    """The names of a run's model, prompts and rewards, for its `config.json`; None for what has no name."""

    model: str | None = None
    dataset: str | None = None
    eval_dataset: str | None = None
    rewards: list[str | None] = field(default_factory=list)
    monitors: list[str | None] = field(default_factory=list)

    @classmethod
    def of(cls, model: Any, dataset: Any, eval_dataset: Any, rewards: Any, monitors: Any) -> "Sources":
        """The names of what a trainer's constructor was given."""
        name = model if isinstance(model, str) else getattr(model, "name_or_path", None)
        return cls(
            "tiny" if name == str(weights_path("pipeline")) else name,
            dataset if isinstance(dataset, str) else None,
            eval_dataset if isinstance(eval_dataset, str) else None,
            [_importable(func) for func in as_list(rewards)],
            [_importable(func) for func in as_list(monitors)],
        )


def _importable(func: Any) -> str | None:
    """The name from which `load_reward` makes this reward; None for an object, and for a function of a script."""
    if isinstance(func, str):
        return func
    module, name = getattr(func, "__module__", None), getattr(func, "__qualname__", "")
    found = getattr(sys.modules.get(module or ""), name, None)
    return f"{module}:{name}" if found is func and module != "__main__" else None


def load_model(model: Any, args: Any, quantization_config: Any = None) -> DiffusionPolicy:
    """The policy of a pipeline, or of one that is named: a hub id, a folder, or "tiny"."""
    quantization_config = quantization_config or args.quantization_config
    keywords = loading_arguments(model, args)
    if quantization_config is not None:
        # Without a dtype diffusers takes float16 for the rest of a model that bitsandbytes quantizes.
        keywords = (
            dtype_argument(torch.float32) | keywords | {"quantization_config": _of_pipeline(quantization_config)}
        )
    policy = load_policy(load_tiny_pipeline() if model == "tiny" else model, **keywords)
    if quantization_config is not None and not policy.quantized:
        raise ValueError(
            "`quantization_config` quantizes the `transformer` of a model that is loaded by name. Found a "
            f"{type(policy.denoiser).__name__} that is not quantized. Quantize a pipeline when you load it, and leave this out."
        )
    return policy


def _of_pipeline(config: Any) -> Any:
    """The quantization configuration of a pipeline, from one of a model, its dictionary, or one of a pipeline."""
    from diffusers import PipelineQuantizationConfig
    from diffusers.quantizers import DiffusersAutoQuantizer

    if isinstance(config, PipelineQuantizationConfig):
        return config
    try:
        config = DiffusersAutoQuantizer.from_dict(config) if isinstance(config, dict) else config
        return PipelineQuantizationConfig(quant_mapping={"transformer": config})
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"`quantization_config` must be one that diffusers knows. Found {config!r}: {type(error).__name__}: {error}"
        ) from error


def reward_names(reward_funcs: list[Callable], warn: bool = False) -> list[str]:
    """One name per reward function, for logs and priorities; repeated ones are numbered."""
    names = []
    for func in reward_funcs:
        if not callable(func):
            raise ValueError(
                f"`reward_funcs` must be functions or callable objects. Found {func!r} ({type(func).__name__}). Pass e.g. "
                "`OCRReward()`, or a function `f(prompts, completions, **kwargs)` that returns one number per image."
            )
        names.append(reward_name(func))
    return numbered_names(names, warn)


def upgraded(args: Any, config_class: Any) -> Any:
    """The configuration as a `config_class`; a plain `trl.GRPOConfig` is upgraded, anything else refused."""
    if isinstance(args, config_class):
        return args
    if not isinstance(args, GRPOConfig):
        raise ValueError(
            f"`args` must be a {config_class.__name__} or a trl.GRPOConfig. Found {type(args).__name__}. Construct a "
            f"{config_class.__name__}(output_dir=...)."
        )
    return config_class.from_grpo_config(args)


def check_inputs(
    args: Any, reward_funcs: list, monitor_funcs: list, train_dataset: Any, eval_dataset: Any, callbacks: Any
) -> list[str]:
    """Raise for what a constructor cannot work with; returns the names of all rewards, monitored ones last."""
    if not reward_funcs:
        raise ValueError("`reward_funcs` must hold at least one reward function. Found none. Pass e.g. `OCRReward()`.")
    if callbacks is not None and not isinstance(callbacks, list):
        raise ValueError(f"`callbacks` must be a list. Found {type(callbacks).__name__}. Pass [callback].")
    names = reward_names([*reward_funcs, *monitor_funcs], warn=True)
    _check_best_metric(args, names, eval_dataset, callbacks)
    if args.should_save:
        check_writable(args.output_dir)
    check_dataset(train_dataset, "train_dataset")
    if args.prompt_mix is not None and args.prompt_mix_column not in train_dataset.column_names:
        raise ValueError(
            f"`prompt_mix` needs the column {args.prompt_mix_column!r} with the kind of each prompt. Found "
            f"{train_dataset.column_names}. Add it, or name another one with `prompt_mix_column`."
        )
    check_calls(reward_funcs, names[: len(reward_funcs)], train_dataset)
    _warn_of_hidden_columns(train_dataset, "train_dataset")
    for where, dataset in named_parts(eval_dataset):
        check_dataset(dataset, where)
        check_calls([*reward_funcs, *monitor_funcs], names, dataset)
        _warn_of_hidden_columns(dataset, where)
    return names


def check_images(policy: DiffusionPolicy, where: str, dataset: Any) -> None:
    """Raise where a model that edits images gets a dataset without images; `where` is its name."""
    if policy.edits:
        check_sources(dataset, where)


def named_parts(eval_dataset: Any) -> list[tuple[str, Any]]:
    """The datasets of an evaluation, with names for messages."""
    parts = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    return [(f"eval_dataset{name and '.' + name}", part) for name, part in parts.items() if part is not None]


def check_calls(funcs: list[Callable], names: list[str], dataset: Dataset, keywords: Sequence[str] = KEYWORDS) -> None:
    """Raise where a reward function cannot be called with `keywords` and the columns of `dataset`."""
    passed = dict.fromkeys([*keywords, *reward_columns(dataset.column_names)])
    for func, name in zip(funcs, names, strict=True):
        if isinstance(func, type):
            raise ValueError(
                f"A reward must be a function or an instance. Found the class {func.__name__}. Pass `{func.__name__}(...)`."
            )
        if check := getattr(func, "check_dataset", None):
            check(dataset)
        own = passed | ({"images": None} if takes_images(func) else {})
        own |= {"group_ids": None} if wants_whole_groups(func) else {}
        try:
            inspect.signature(func).bind(**own)
        except (TypeError, ValueError) as error:  # ValueError: a builtin without a signature
            raise ValueError(
                f"The reward `{name}` must take the keywords of a call: {', '.join(own)}. Found: {error}. Name a column of "
                "the dataset like its parameter, and let it take `**kwargs`."
            ) from error


def _warn_of_hidden_columns(dataset: Dataset, where: str) -> None:
    """Warn of the columns that no reward can see; `where` is the name of the dataset."""
    hidden = set(dataset.column_names) - {"prompt", *reward_columns(dataset.column_names)}
    if hidden:
        warnings.warn(
            f"Columns should not be named like what the trainer passes to rewards. Found {', '.join(sorted(hidden))} in "
            f"`{where}`, which no reward will see. Rename them.",
            stacklevel=4,
        )


def image_size(row: dict, given: tuple[int | None, int | None], default: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a row's image in pixels: as given for all, else as its columns say, else the default."""
    height, width = (value or row.get(side, own) for side, value, own in zip(SIDES, given, default, strict=True))
    return int(height), int(width)


def image_sizes(
    policy: DiffusionPolicy, dataset: Dataset, where: str, given: tuple[int | None, int | None]
) -> list[tuple[int, int]]:
    """[`image_size`] of every row; ValueError where the model cannot draw one. `where` is the name of the dataset."""
    sides = [side for side, value in zip(SIDES, given, strict=True) if value is None and side in dataset.column_names]
    if len(sides) == 1 and given == (None, None):
        raise ValueError(
            f"`height` and `width` must both be columns, or neither. Found `{sides[0]}` alone in `{where}`. Add the other, "
            "rename this one, or set the options `height` and `width`."
        )
    plain, default = dataset.with_format(None), policy.default_size()
    rows = zip(*(plain[side][:] for side in sides), strict=True) if sides else [()] * len(dataset)
    sizes: dict[tuple[int, int], int] = {}
    found = []
    for number, row in enumerate(rows):
        if any(type(pixels) is not int or pixels < 1 for pixels in row):
            raise ValueError(
                f"{' and '.join(f'`{side}`' for side in sides)} must be whole numbers of pixels in every row of `{where}`. "
                f"Found {', '.join(map(repr, row))} in row {number}. Correct or remove that row."
            )
        found.append(image_size(dict(zip(sides, row, strict=True)), given, default))
        sizes.setdefault(found[-1], number)
    for size, number in sizes.items():
        try:
            policy.latent_shape(*size)
        except ValueError as error:
            raise ValueError(f"{error} This is row {number} of `{where}`." if sides else str(error)) from None
    return found


def submit(scorer: Any, rows: list[dict[str, Any]], images: Tensor, completions: list | None = None, **keywords: Any):
    """Have the images of some rows of a dataset scored; returns a future of a `ScoredBatch`."""
    return scorer.submit(
        prompts=[row["prompt"] for row in rows],
        completions=to_pil(images) if completions is None else completions,
        images=images,
        columns={name: [row[name] for row in rows] for name in reward_columns(rows[0])},
        **keywords,
    )


def _check_best_metric(args: Any, names: list[str], eval_dataset: Any, callbacks: Any) -> None:
    """Raise unless evaluation reports the metric that picks the best model: one of `names`, or "reward".

    `args.metric_for_best_model` becomes "reward" where early stopping needs one.
    """
    if args.metric_for_best_model is None and any(isinstance(c, EarlyStoppingCallback) for c in callbacks or []):
        args.metric_for_best_model, args.greater_is_better = "reward", True
    if args.metric_for_best_model is None:
        return
    own = ["reward", "reward_std"] + [f"rewards/{name}/{of}" for name in names for of in ("mean", "se")]
    prefixes = [f"{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else [""]
    known = [prefix + key for prefix in prefixes for key in own]
    if args.metric_for_best_model.removeprefix("eval_") not in known:
        raise ValueError(
            f"`metric_for_best_model` must be a number that evaluation reports. Found {args.metric_for_best_model!r}. Use "
            f"one of {', '.join(known)}."
        )


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse an optimizer that was made of other weights than those that train, such as the base under an adapter."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if optimizer is not None and not any(id(p) in trained for g in optimizer.param_groups for p in g["params"]):
        raise ValueError(
            "`optimizers` must hold an optimizer of the weights that train. Found a "
            f"{type(optimizer).__name__} of others: a new adapter's weights do not exist before the trainer. Use `optim` and "
            "`optim_args` of the configuration."
        )


def check_whole(pipeline: Any) -> None:
    """Refuse a pipeline that DeepSpeed ZeRO-3 has cut in parts while it was loaded."""
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and any(hasattr(p, "ds_id") for p in component.parameters()):
            raise ValueError(
                f"A pipeline must be loaded whole. Found `{name}` partitioned by ZeRO-3, which does that to every "
                "transformers model that is loaded once the training arguments exist. Pass the pipeline's name to the "
                "trainer, or load the pipeline before the arguments, or inside `with trl_apex.distributed.whole_models():`."
            )


def loading_arguments(model: Any, args: Any) -> dict[str, Any]:
    """The keywords of `from_pretrained` for the pipeline: the user's, and half precision where the run is in it."""
    kwargs = dict(args.model_init_kwargs or {})
    if kwargs and not isinstance(model, str):
        raise ValueError(
            "`model_init_kwargs` needs `model` to be a name. Found a loaded pipeline. Pass them when you load it."
        )
    dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
    if dtype is None and isinstance(model, str) and (args.bf16 or args.fp16):
        dtype = torch.bfloat16 if args.bf16 else torch.float16  # frozen weights need no more
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return kwargs if dtype is None else {**kwargs, **dtype_argument(dtype)}


def as_list(funcs: Any) -> list:
    """One function, several, or None, as a list."""
    if funcs is None:
        return []
    return list(funcs) if isinstance(funcs, list | tuple) else [funcs]
