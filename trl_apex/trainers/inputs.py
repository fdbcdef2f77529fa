"""Checks of what a user passes to a trainer, before any compute."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback

from ..diffusion.families import dtype_argument
from ..rewards.scoring import numbered_names, reward_name, warn_of_numbers


def reward_names(reward_funcs: list[Callable], warn: bool = False) -> list[str]:
    """One name per reward function, for logs and priorities; repeated ones are numbered.

    Raises:
        ValueError: if something is not callable.

    Example:
        ```python
        >>> def brightness(completions, **kwargs): ...
        >>> reward_names([brightness])
        ['brightness']

        ```
    """
    names = []
    for func in reward_funcs:
        if not callable(func):
            raise ValueError(
                f"`reward_funcs` must be functions or callable objects. Found {func!r} ({type(func).__name__}). Pass e.g. "
                "`OCRReward()`, or a function `f(prompts, completions, **kwargs)` that returns one number per image."
            )
        names.append(reward_name(func))
    numbered = numbered_names(names)
    if warn:
        warn_of_numbers(names, numbered)
    return numbered


def check_weights(weights: list[float] | None, names: list[str]) -> list[float]:
    """The user's weights, or ones.

    Raises:
        ValueError: for a wrong number of weights, negative ones, or none that is positive.
    """
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(
            f"`reward_weights` must hold one weight per reward function, in order: {len(names)} for {names}. "
            f"Found {len(weights)}: {weights}."
        )
    if any(not weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise ValueError(
            f"`reward_weights` must not be negative, and one must be positive. Found {weights}. To penalize something, "
            "return its negative from the reward function; to only watch it, use weight 0."
        )
    return [float(weight) for weight in weights]


def check_best_metric(args: Any, names: list[str], eval_dataset: Any, callbacks: Any = None) -> None:
    """Raise unless evaluation reports the metric that picks the best model.

    Args:
        args ([`DiffusionGRPOConfig`]): its `metric_for_best_model` becomes "reward" where early stopping needs one.
        names (`list[str]`): of all rewards, monitored ones included.
        eval_dataset: a dataset, a dict of them, or None.
        callbacks (`list`, *optional*): the user's.

    Raises:
        ValueError: lists the keys.
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


def check_whole(pipeline: Any) -> None:
    """Refuse a pipeline that DeepSpeed ZeRO-3 has cut in parts while it was loaded.

    Raises:
        ValueError: names the part.
    """
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and any(hasattr(p, "ds_id") for p in component.parameters()):
            raise ValueError(
                f"A pipeline must be loaded whole. Found `{name}` partitioned by ZeRO-3, which does that to every "
                "transformers model that is loaded once the training arguments exist. Pass the pipeline's name to the "
                "trainer, or load the pipeline before the arguments, or inside `with trl_apex.distributed.whole_models():`."
            )


def loading_arguments(model: Any, args: Any) -> dict[str, Any]:
    """The keywords of `from_pretrained` for the pipeline: the user's, and half precision where the run is in it.

    Args:
        model (`str` or `diffusers.DiffusionPipeline`): what the trainer was given.
        args ([`DiffusionGRPOConfig`]): its configuration.

    Raises:
        ValueError: if there are keywords for a pipeline that is loaded already.
    """
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
