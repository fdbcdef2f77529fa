"""Prompts from a function that draws them one at a time, as `DDPOTrainer` took them."""

from collections.abc import Callable
from typing import Any

METADATA_COLUMN = "prompt_metadata"


def dataset_from_prompt_function(prompt_function: Callable[[], tuple[str, Any]], size: int) -> Any:
    """Draw a dataset of prompts from a function that returns `(prompt, metadata)`.

    A dictionary as metadata becomes one column per key, any other becomes the column `prompt_metadata`; both reach the
    reward functions. Prompts that are drawn more than once are kept once for each.

    Args:
        prompt_function (`Callable[[], tuple[str, Any]]`): as in `trl.DDPOTrainer`.
        size (`int`): how many times to call it.

    Returns:
        `datasets.Dataset`: with a `prompt` column.

    Raises:
        ValueError: if `size` is below 1, or the function returns anything else.

    Example:
        >>> animals = iter(["cat", "dog"])
        >>> dataset = dataset_from_prompt_function(lambda: (f"a {next(animals)}", {}), 2)
        >>> dataset["prompt"][:]
        ['a cat', 'a dog']
    """
    from datasets import Dataset

    if size < 1:
        raise ValueError(f"`size` must be at least 1. Found {size}. Pass the number of prompts to draw.")
    rows = []
    for _ in range(size):
        drawn = prompt_function()
        if not isinstance(drawn, tuple) or len(drawn) != 2 or not isinstance(drawn[0], str):
            raise ValueError(
                f"`prompt_function` must return a pair (prompt, metadata). Found {drawn!r}. "
                "Return e.g. `prompt, {}` where there is no metadata."
            )
        prompt, metadata = drawn
        columns = dict(metadata) if isinstance(metadata, dict) else {METADATA_COLUMN: metadata}
        rows.append({"prompt": prompt, **columns})
    return Dataset.from_list(rows)
