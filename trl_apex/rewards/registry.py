"""Rewards by name, as Python, YAML, the command line and the reward server spell them."""

import ast
import difflib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

# The name of each built-in reward -> its module and class.
REWARDS = {
    "aesthetic": "trl_apex.rewards.clip:AestheticReward",
    "clip_score": "trl_apex.rewards.clip:CLIPScoreReward",
    "deqa": "trl_apex.rewards.deqa:DeQAReward",
    "dino_source": "trl_apex.rewards.vision:DINOSourceReward",
    "geneval": "trl_apex.rewards.geneval:GenEvalReward",
    "hpsv2": "trl_apex.rewards.clip:HPSv2Reward",
    "hpsv3": "trl_apex.rewards.image_reward:HPSv3Reward",
    "image_reward": "trl_apex.rewards.image_reward:ImageReward",
    "jpeg_compressibility": "trl_apex.rewards.vision:JPEGCompressibilityReward",
    "jpeg_incompressibility": "trl_apex.rewards.vision:JPEGIncompressibilityReward",
    "ocr": "trl_apex.rewards.ocr:OCRReward",
    "pairwise": "trl_apex.rewards.groups:PairwiseReward",
    "published_deqa": "trl_apex.rewards.deqa:PublishedDeQAReward",
    "pickscore": "trl_apex.rewards.clip:PickScoreReward",
    "rank": "trl_apex.rewards.groups:RankReward",
    "remote": "trl_apex.serving.client:RemoteReward",
    "safety": "trl_apex.rewards.vision:SafetyReward",
    "source": "trl_apex.rewards.clip:SourceReward",
    "unified_reward": "trl_apex.rewards.vlm_judge:UnifiedReward",
    "vlm_judge": "trl_apex.rewards.vlm_judge:VLMJudgeReward",
    "vlm_yes": "trl_apex.rewards.deqa:VLMYesReward",
}


def load_rewards(rewards: Iterable[Any]) -> list[Any]:
    """Make the reward functions that strings name, as in [`load_reward`] or `"tiny"` for four; functions pass unchanged."""
    functions: list[Any] = []
    for reward in rewards:
        if not isinstance(reward, str):
            functions.append(reward)
        elif reward == "tiny":
            functions += importlib.import_module("trl_apex.tiny.world").tiny_rewards()
        else:
            functions.append(load_reward(reward))
    return functions


def load_reward(spec: str) -> Callable:
    """Make the reward function that `spec` names.

    Args:
        spec (`str`): A name (`"ocr"`), a name with arguments (`'deqa(model="path")'`), or `"module:attribute"` for a
            function, instance or class of your own, in the current folder as well, with arguments or without.

    Example:
        >>> load_reward("jpeg_compressibility(quality=50)").quality
        50
    """
    name, arguments = parse_spec(spec)
    module, colon, attribute = REWARDS.get(name, name).partition(":")
    if not colon:
        close = difflib.get_close_matches(name.lower(), [*REWARDS, "tiny"], n=1)
        raise ValueError(
            f'A reward must be one of {", ".join(REWARDS)}, or "module:attribute". Found {name!r}. '
            + (f"Did you mean {close[0]!r}? " if close else "")
            + "A file my_rewards.py in this folder is named my_rewards:function."
        )
    if name not in REWARDS and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
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
    return functools.update_wrapper(functools.partial(found, **arguments), found) if arguments else found


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split a reward into its name and its arguments, which must be plain values.

    Example:
        >>> parse_spec('deqa(model="org/name", batch_size=4)')
        ('deqa', {'model': 'org/name', 'batch_size': 4})
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
