"""Reward functions as a command line or a server's caller names them."""

import ast
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

# Name on the command line -> class in `trl_apex.rewards`.
REWARDS = {
    "aesthetic": "AestheticReward",
    "clip_score": "CLIPScoreReward",
    "deqa": "DeQAReward",
    "hpsv2": "HPSv2Reward",
    "image_reward": "ImageReward",
    "jpeg_compressibility": "JPEGCompressibilityReward",
    "jpeg_incompressibility": "JPEGIncompressibilityReward",
    "ocr": "OCRReward",
    "pickscore": "PickScoreReward",
    "remote": "RemoteReward",
    "vlm_judge": "VLMJudgeReward",
}


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split a reward into its name and its arguments, which must be plain values.

    Example:
        >>> parse_spec('deqa(model="org/name", batch_size=4)')
        ('deqa', {'model': 'org/name', 'batch_size': 4})
        >>> parse_spec("my_rewards:Brightness")
        ('my_rewards:Brightness', {})
    """
    name, bracket, rest = spec.strip().partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("only keyword arguments are allowed")
        return name, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            "A reward with arguments must read name(key=value, ...) with plain values. "
            f"Found {spec!r}: {error}. Example: 'deqa(model=\"path\")'."
        ) from error


def load_reward(spec: str) -> Callable:
    """Make the reward function that `spec` names.

    Args:
        spec (`str`): a name (`"ocr"`), a name with arguments (`'deqa(model="path")'`), or `"module:attribute"` for a
            function, instance or class of your own, with arguments as well.

    Raises:
        ValueError: for a name that is not known, a module that cannot be imported, or arguments that do not fit.

    Example:
        >>> load_reward("jpeg_compressibility(quality=50)").quality
        50
        >>> load_reward("trl_apex.rewards.jpeg:JPEGIncompressibilityReward").__name__
        'jpeg_incompressibility'
    """
    name, arguments = parse_spec(spec)
    module_name, colon, attribute = name.partition(":")
    if not colon:
        if name not in REWARDS:
            raise ValueError(
                f'A reward must be one of {", ".join(sorted(REWARDS))}, or "module:attribute". Found {name!r}. '
                "A file my_rewards.py in this folder is named my_rewards:function."
            )
        module_name, attribute = "trl_apex.rewards", REWARDS[name]
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f'A reward given as "module:attribute" must be importable. Found {spec!r}: {error}. '
            "Check the spelling, and run the command in the folder of the module."
        ) from error
    if isinstance(found, type):
        try:
            return found(**arguments)
        except TypeError as error:
            raise ValueError(f"The arguments of the reward {name!r} must fit. Found {arguments}: {error}.") from error
    if not callable(found):
        raise ValueError(f"A reward must be callable. Found {spec!r}, a {type(found).__name__}. Name a function.")
    if arguments:
        return functools.update_wrapper(functools.partial(found, **arguments), found)
    return found


def load_rewards(specs: Sequence[str]) -> list[Callable]:
    """Make the reward functions that `specs` name.

    Args:
        specs (`Sequence[str]`): each as in [`load_reward`], or `"tiny"` for the tiny world's four.

    Raises:
        ValueError: as in [`load_reward`].

    Example:
        >>> [reward.__name__ for reward in load_rewards(["jpeg_compressibility", "jpeg_incompressibility"])]
        ['jpeg_compressibility', 'jpeg_incompressibility']
    """
    functions: list[Callable] = []
    for spec in specs:
        if spec == "tiny":
            functions += importlib.import_module("trl_apex.tiny.world").tiny_rewards()
        else:
            functions.append(load_reward(spec))
    return functions
