"""Prompts as a command line names them."""

from typing import Any

from ..prompts.dataset import load_prompts as load_dataset_of_prompts


def load_prompts(
    source: str, split: str, config: str | None = None, column: str = "prompt", limit: int | None = None
) -> Any:
    """Load a dataset of prompts.

    Args:
        source (`str`): what [`trl_apex.prompts.load_prompts`] takes, or "tiny" for the tiny world's prompts.
        split (`str`): split of a folder or hub dataset; of "tiny", "train" or "test".
        config (`str`, *optional*): configuration of a hub dataset.
        column (`str`): the column with the prompts, renamed to `prompt`.
        limit (`int`, *optional*): keep the first `limit` rows.

    Returns:
        `datasets.Dataset`

    Raises:
        FileNotFoundError: if it looks like a file and there is none.
        ValueError: if the format is unknown, the column is missing or there are no rows.
    """
    if source == "tiny":
        from ..tiny.prompts import tiny_prompts

        return load_dataset_of_prompts(tiny_prompts(split, limit or 256), prompt_column=column)
    return load_dataset_of_prompts(source, split, column, config=config, limit=limit)
