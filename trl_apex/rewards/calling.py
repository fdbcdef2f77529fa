"""What a reward function takes, and what it may return."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

LARGEST = torch.finfo(torch.float32).max  # rewards travel as float32


def reward_name(func: Callable) -> str:
    """The objective name of a reward function: its `__name__`, else its class's name.

    Example:

    ```python
    >>> from trl_apex.rewards.calling import reward_name
    >>> reward_name(max)
    'max'

    ```
    """
    return getattr(func, "__name__", None) or type(func).__name__


def is_async(func: Callable) -> bool:
    """Whether a call returns a coroutine.

    Example:

    ```python
    >>> from trl_apex.rewards.calling import is_async
    >>> async def slow(**kwargs): ...
    >>> is_async(slow), is_async(max)
    (True, False)

    ```
    """
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


def takes_images(func: Callable) -> bool:
    """Whether a function takes the keyword `images`, by name or among `**kwargs`.

    Example:

    ```python
    >>> from trl_apex.rewards.calling import takes_images
    >>> takes_images(lambda completions, **kwargs: []), takes_images(lambda prompts, completions: [])
    (True, False)

    ```
    """
    try:
        parameters = inspect.signature(func).parameters
    except (TypeError, ValueError):
        return False
    return "images" in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def as_numbers(returned: Any, name: str, size: int) -> tuple[list[float], list[str | None]]:
    """What a reward function returned as floats, NaN for missing, with the cause of each failure.

    Args:
        returned: A list, array or tensor of `size` numbers or None.
        name (`str`): Name of the objective.
        size (`int`): Samples in the batch.

    Returns:
        `tuple[list[float], list[str | None]]`: The numbers, and a cause or None per sample.

    Raises:
        ValueError: If there is not one number or None per sample.

    Example:

    ```python
    >>> from trl_apex.rewards.calling import as_numbers
    >>> as_numbers([1, None], "ocr", 2)
    ([1.0, nan], [None, None])

    ```
    """
    try:
        values = returned.tolist() if hasattr(returned, "tolist") else returned
    except (RuntimeError, TypeError) as error:  # a tensor whose numbers cannot be had
        raise ValueError(
            f"The reward `{name}` must return numbers or None. Found a {type(returned).__name__} that cannot be read: "
            f"{describe(error)}. Return a list of floats."
        ) from error
    if not isinstance(values, (list, tuple)) or len(values) != size:
        found = f"{len(values)}" if isinstance(values, (list, tuple)) else f"a {type(returned).__name__}"
        raise ValueError(
            f"The reward `{name}` must return one number or None per sample, {size} here. Found {found}. "
            "Return a list as long as `prompts`."
        )
    causes: list[str | None] = list(getattr(returned, "errors", None) or [None] * size)
    numbers: list[float] = []
    for i, value in enumerate(values):
        if value is None:
            number = math.nan
        elif isinstance(value, (str, bytes)):
            number = _refuse(value, name)
        else:
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            except (TypeError, ValueError, RuntimeError):
                number = _refuse(value, name)
        if abs(number) > LARGEST:
            number, causes[i] = math.nan, causes[i] or f"the reward is {number:g}"
        numbers.append(number)
    return numbers, causes


def describe(error: BaseException) -> str:
    """An error in one line.

    Example:

    ```python
    >>> from trl_apex.rewards.calling import describe
    >>> describe(KeyError("target"))
    "KeyError: 'target'"

    ```
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _refuse(value: Any, name: str) -> float:
    raise ValueError(
        f"The reward `{name}` must return numbers or None. Found {value!r} of type {type(value).__name__}. "
        "Convert it, or return None for a sample without a reward."
    )
