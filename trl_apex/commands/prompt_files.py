"""Prompts from a file, a folder or the Hub, as a dataset."""

from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")


def load_prompts(
    source: str, split: str, config: str | None = None, column: str = "prompt", limit: int | None = None
) -> Any:
    """Load a dataset of prompts.

    Args:
        source (`str`): a file (.json, .jsonl, .csv, .parquet, or .txt with a prompt a line), a folder, a hub id, or "tiny" for
            the tiny world's prompts.
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
    dataset = _load(source, split, config, limit)
    if column not in dataset.column_names:
        raise ValueError(
            f"The dataset must have the column {column!r}. Found {dataset.column_names} in {source}. "
            "Name the column of the prompts with `prompt_column`."
        )
    if column != "prompt":
        dataset = dataset.rename_column(column, "prompt")
    if not len(dataset):
        raise ValueError(
            f"The dataset must hold at least one prompt. Found none in {source}. Check the file and `split`."
        )
    return dataset.select(range(min(limit, len(dataset)))) if limit else dataset


def _load(source: str, split: str, config: str | None, limit: int | None) -> Any:
    from datasets import Dataset, load_dataset, load_from_disk

    path = Path(source)
    suffix = path.suffix.lower()
    if source == "tiny":
        from ..tiny.prompts import tiny_prompts

        return tiny_prompts(split, limit or 256)
    if path.is_file():
        if suffix == ".txt":
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            return Dataset.from_dict({"prompt": [line for line in lines if line]})
        if suffix not in SUFFIXES:
            raise ValueError(
                f"A file of prompts must end in one of {', '.join(SUFFIXES)}. Found {source}. Convert it."
            )
        readers = {".csv": Dataset.from_csv, ".parquet": Dataset.from_parquet}
        try:
            return readers.get(suffix, Dataset.from_json)(str(path), keep_in_memory=True)
        except Exception as error:  # datasets raises its own classes around those of pandas and arrow
            cause = error.__cause__ or error
            raise ValueError(f"A file of prompts must be well-formed {suffix[1:]}. Found {source}: {cause}") from error
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = load_from_disk(str(path))
            return saved[split] if isinstance(saved, dict) else saved
        return load_dataset(str(path), config, split=split)
    if suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"The file of prompts must exist. Found no {source}. Check the path.")
    return _from_hub(source, config, split)


def _from_hub(source: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(source, config, split=split)
    except (ConnectionError, FileNotFoundError, OSError) as error:
        raise ValueError(
            f"The dataset must be a file, a folder or the id of a hub dataset that can be reached. Found {source!r}: "
            f"{str(error).splitlines()[0]}. Check the spelling and the connection."
        ) from error
