"""Reward functions as a command line names them."""

import os
import sys
from collections.abc import Callable, Sequence

from ..rewards.by_name import load_reward


def load_rewards(specs: Sequence[str]) -> list[Callable]:
    """Make the reward functions that `specs` name.

    Args:
        specs (`Sequence[str]`): what [`load_reward`] takes, from modules in the current folder as well, or `"tiny"` for
            the tiny world's four.

    Raises:
        ValueError: for a name that is not known, a module that cannot be imported, or arguments that do not fit.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    functions: list[Callable] = []
    for spec in specs:
        if spec == "tiny":
            from ..tiny.world import tiny_rewards

            functions += tiny_rewards()
        else:
            functions.append(load_reward(spec))
    return functions
