"""Datasets of prompts: from files, from text, from a prompt function; instructions with an image to edit."""

import hashlib
import io
import json
import reprlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")
SOURCE_COLUMN = "source_image"
"""The column with the image that an instruction is about."""


def load_prompts(
    source: Any,
    split: str = "train",
    prompt_column: str = "prompt",
    *,
    config: str | None = None,
    limit: int | None = None,
) -> Any:
    """Load prompts and their other columns, which reach the reward functions by name.

    Args:
        source (`str`, `Path`, `datasets.Dataset` or dict of them): a file (.json with a list of objects, .jsonl, .csv,
            .parquet, or .txt with a prompt a line), a folder, a hub id, data that is loaded already, or `"tiny"` for
            prompts of the tiny world (256, or as many as `limit` says). In a .csv, the prompts and the columns `target`
            and `text` are read as text, whatever they look like.
        split (`str`): which part, if the source has parts. A file is one part.
        prompt_column (`str`): the column that holds the prompts; renamed to `prompt`.
        config (`str`, *optional*): configuration of a hub dataset.

    Returns:
        `datasets.Dataset`: with a string in the column `prompt` of every row.

    Raises:
        FileNotFoundError: if the source looks like a file and there is none.
        ValueError: if it cannot be read, has no such split or column, or holds no prompt.

    Example:
        >>> from datasets import Dataset
        >>> captions = Dataset.from_dict({"caption": ["a cat", "a dog"], "legs": [4, 4]})
        >>> load_prompts(captions, prompt_column="caption").column_names
        ['prompt', 'legs']
    """
    name = str(source) if isinstance(source, str | Path) else f"the {type(source).__name__} that was passed"
    if source == "tiny":
        dataset = import_module("trl_apex.tiny.prompts").tiny_prompts(split, limit or 256)
    else:
        dataset = _load(source, split, config, prompt_column)
    columns = dataset.column_names
    if prompt_column not in columns:
        raise ValueError(
            f"The dataset must have the column {prompt_column!r}. Found {columns} in {name}. "
            "Name the column of the prompts with `prompt_column`."
        )
    if prompt_column != "prompt":
        if "prompt" in columns:
            raise ValueError(
                f"The column {prompt_column!r} is to become `prompt`. Found another column of that name in {name}. "
                'Rename that one in the file, or in Python by `dataset.rename_column("prompt", ...)`.'
            )
        dataset = dataset.rename_column(prompt_column, "prompt")
    if limit is not None:
        if limit < 1:
            raise ValueError(f"`limit` must be at least 1. Found {limit}. Leave it out to keep all rows.")
        dataset = dataset.select(range(min(limit, len(dataset))))
    check_dataset(dataset, name)
    return dataset


def check_dataset(dataset: Any, name: str) -> None:
    """Raise a ValueError unless `dataset`, called `name`, is a `datasets.Dataset` with a text as `prompt` in every row."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"`{name}` must be a `datasets.Dataset` with a `prompt` column. Found {type(dataset).__name__}. Use e.g. "
            '`Dataset.from_dict({"prompt": [...]})` or `datasets.load_dataset(..., split="train")`.'
        )
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"`{name}` must have a `prompt` column. Found columns {dataset.column_names}. Rename the one that holds the "
            'text: `dataset.rename_column("caption", "prompt")`.'
        )
    if len(dataset) == 0:
        raise ValueError(
            f"`{name}` must hold at least one prompt. Found an empty dataset. Check the file, the split and filters."
        )
    for row, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str):
            raise ValueError(
                f"`prompt` must be a string in every row of `{name}`. Found {type(prompt).__name__} in row {row}. "
                "Text-to-image models take plain text, not conversations. Correct or remove that row."
            )


class Edit(str):
    """An instruction with its image, as a string that differs for every pair, so that it can stand where a prompt stands.

    Args:
        load (`Callable[[], PIL.Image.Image]`): gives the image, at the size that the model sees, each time it is needed.
        negative (`str`, *optional*): instruction of the unconditional branch, where guidance has one.

    Example:
        >>> edit = Edit("make it red", lambda: Image.new("RGB", (8, 8)))
        >>> edit.prompt, edit == Edit("make it red", lambda: Image.new("RGB", (8, 8), "white"))
        ('make it red', False)
    """

    prompt: str
    size: tuple[int, int]
    negative: str | None
    _load: Callable[[], Image.Image]

    def __new__(cls, prompt: str, load: Callable[[], Image.Image], negative: str | None = None) -> "Edit":
        image = load()
        digest = hashlib.sha256(f"{image.mode} {image.size} {negative}".encode() + image.tobytes()).hexdigest()
        edit = super().__new__(cls, f"{prompt} [{digest[:32]}]")
        edit.prompt, edit.size, edit.negative, edit._load = prompt, image.size, negative, load
        return edit

    @property
    def image(self) -> Image.Image:
        return self._load()


def prompts_of(rows: Any, _: Any = None) -> list[str]:
    """The prompts of a dataset or of a list of rows; they do not depend on sizes."""
    return list(rows["prompt"]) if hasattr(rows, "column_names") else [row["prompt"] for row in rows]


def edits_of(rows: Any, sizes: list[tuple[int, int]], negative: str | None = None) -> list[Edit]:
    """An [`Edit`] for each row of a dataset or a list, its `source_image` resized to its size, height and width."""
    from diffusers.utils import load_image

    def load(row: int) -> Image.Image:
        value = rows[row][SOURCE_COLUMN]
        image = load_image(value if isinstance(value, Image.Image) else Image.open(value))  # in RGB
        return image.resize(sizes[row][::-1], Image.Resampling.LANCZOS)  # as in diffusers

    return [Edit(prompt, partial(load, row), negative) for row, prompt in enumerate(prompts_of(rows))]


def undecoded(dataset: Any) -> Any:
    """The dataset with its images as `{"bytes": ..., "path": ...}`, for [`decoded`]; one with a format stays as it is."""
    from datasets import Image as ImageFeature

    for name, kind in dataset.features.items() if dataset.format["type"] is None else ():
        if isinstance(kind, ImageFeature):
            dataset = dataset.cast_column(name, ImageFeature(mode=kind.mode, decode=False))
    return dataset


def decoded(row: dict[str, Any], features: dict[str, Any]) -> dict[str, Any]:
    """A row of [`undecoded`] with its images, by the features of the dataset."""
    from datasets import Image as ImageFeature

    images = [name for name in row if isinstance(features.get(name), ImageFeature) and isinstance(row[name], dict)]
    return row | {name: features[name].decode_example(row[name]) for name in images}


def check_sources(dataset: Any, name: str) -> None:
    """Raise a ValueError unless each row of `dataset` has an image in `source_image`; files are opened, not read."""
    if SOURCE_COLUMN not in dataset.column_names:
        raise ValueError(
            f"A model that edits images needs the column `{SOURCE_COLUMN}` in `{name}`: PIL images, or paths of files. Found "
            f"columns {dataset.column_names}. Add it, or rename the one that holds the images."
        )
    for row, value in enumerate(undecoded(dataset.with_format(None))[SOURCE_COLUMN]):
        file = (
            value if not isinstance(value, dict) else io.BytesIO(value["bytes"]) if value["bytes"] else value["path"]
        )
        try:
            Image.open(file).close()
        except (OSError, AttributeError) as error:  # of what is no path at all
            raise ValueError(
                f"`{SOURCE_COLUMN}` must be an image, or the path of one, in every row of `{name}`. Found "
                f"{reprlib.repr(value)} in row {row}: {error}. Correct or remove that row."
            ) from error


def _load(source: Any, split: str, config: str | None, prompt_column: str) -> Any:
    from datasets import Dataset

    if isinstance(source, Dataset):
        return source
    if isinstance(source, dict):  # a DatasetDict is one
        return _part(source, split, "the datasets that were passed")
    if not isinstance(source, str | Path):
        raise ValueError(
            f"Prompts must be a `datasets.Dataset`, a file, a folder or a hub id. Found {type(source).__name__}. "
            'Make a dataset of it: `Dataset.from_dict({"prompt": [...]})`.'
        )
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path, prompt_column)
    if path.is_dir():
        return _read_folder(path, split)
    name = str(source)
    if path.suffix.lower() in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"The file of prompts must exist. Found no {name}. Check the path.")
    return _read_hub(name, config, split)


def _part(parts: dict, split: str, name: str) -> Any:
    if split not in parts:
        raise ValueError(f"`split` must be one of {sorted(parts)} in {name}. Found {split!r}. Pass one of these.")
    return parts[split]


def _read_file(path: Path, prompt_column: str) -> Any:
    import pandas
    from datasets import Dataset

    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"A file of prompts must end in one of {', '.join(SUFFIXES)}. Found {path}. Convert it.")
    try:
        if suffix == ".txt":
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]  # \r\n and \r too
            return Dataset.from_dict({"prompt": [line for line in lines if line]})
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        if suffix == ".csv":
            read = partial(pandas.read_csv, path, skipinitialspace=True)  # "prompt, target"
            frame, texts = read(), read(dtype=str, keep_default_na=False)
            for name, text in texts.items():
                codes = frame[name].dtype.kind == "i" and (frame[name].astype(str) != text.str.strip()).any()  # 007
                if codes or name in (prompt_column, "target", "text"):  # 2024 and NA are texts there
                    frame[name] = text
            return Dataset.from_pandas(frame, preserve_index=False)
        if suffix == ".parquet":
            return Dataset.from_parquet(str(path), keep_in_memory=True)
        dataset = Dataset.from_json(str(path), keep_in_memory=True)
        dates = [name for name, kind in dataset.features.items() if "timestamp" in str(kind)]
        if dates:  # made of texts such as "2024-05-01", which stay texts
            rows = _json_rows(path.read_text(encoding="utf-8-sig"))
            for name in dates:
                texts = [row.get(name) for row in rows]
                dataset = dataset.rename_column(name, "_").add_column(name, texts).remove_columns("_")
        return dataset
    except Exception as error:  # datasets raises its own classes around those of pandas and arrow
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"A file of prompts must be well-formed {suffix[1:]}, in UTF-8. Found {path}: {cause}. Correct the file."
        ) from error


def _json_rows(text: str) -> list[dict[str, Any]]:
    """The objects of a list, or of lines."""
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return rows if isinstance(rows, list) else [rows]


def _read_folder(path: Path, split: str) -> Any:
    from datasets import load_dataset, load_from_disk

    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        return _part(saved, split, str(path)) if isinstance(saved, dict) else saved
    try:
        return load_dataset(str(path), split=split)
    except Exception as error:
        raise ValueError(
            f"A folder of prompts must hold files that `datasets.load_dataset` reads, with the split {split!r}. "
            f"Found {path}: {' '.join(str(error).split())}. Pass one file instead, or check `split`."
        ) from error


def _read_hub(name: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split)
    except Exception as error:
        raise ValueError(
            "Prompts must be a file, a folder or the id of a hub dataset that can be reached and has the split "
            f"{split!r}. Found {name!r}: {(str(error) or type(error).__name__).splitlines()[0]}. "
            "Check the spelling, `split` and `config`, and the connection."
        ) from error


PLACES = (
    'a wooden shop sign that says "{text}" above a narrow street',
    'a neon sign with the words "{text}" on a brick wall at night',
    'a birthday cake with "{text}" written in icing',
    'a road sign that reads "{text}" beside an empty highway',
    'a chalkboard in a cafe with "{text}" in white chalk',
    'a paperback book titled "{text}" on a park bench',
    'a cotton shirt printed with "{text}", hanging on a line',
    'a train station board that shows "{text}"',
    'graffiti spelling "{text}" under a concrete bridge',
    'a ceramic mug with the inscription "{text}" on a desk',
    'a banner with "{text}" over the finish line of a race',
    'a handwritten note saying "{text}" on a refrigerator',
    'a vintage travel poster with the headline "{text}"',
    'a brass plate engraved with "{text}" on an old door',
    'the word "{text}" drawn in wet sand by the sea',
    'a laptop screen that displays "{text}" in large letters',
)
STYLES = (
    "",
    ", photograph in soft daylight",
    ", oil painting",
    ", watercolour",
    ", flat vector illustration",
    ", low light, shallow depth of field",
)
_WORDS = (
    "open harbor coffee market garden winter summer river silver golden window bridge lantern forest mountain "
    "thunder velvet candle orange planet rocket museum library kitchen theater station velocity horizon compass "
    "anchor feather marble copper island meadow orchard puzzle quartz ribbon saddle timber umbrella violet whistle "
    "yellow zebra bakery castle dragon engine festival guitar hammer jacket ladder magnet needle oyster pepper "
    "rabbit shadow tunnel village wonder autumn basket circus dolphin eclipse falcon glacier hollow ivory jungle"
)
WORDS = tuple(_WORDS.split())


def text_prompts(
    count: int,
    seed: int = 0,
    words: Sequence[str] = WORDS,
    templates: Sequence[str] | None = None,
    max_words: int = 3,
) -> Any:
    """Draw different prompts that ask for a text, for an OCR reward.

    A text is one to `max_words` different words, in capitals, lower case or with capital first letters, from easy to hard.
    Disjoint `words` for train and test show whether the model learned spelling or words.

    Args:
        count (`int`): prompts.
        templates (`Sequence[str]`, *optional*): each with `{text}` in double quotes; by default 16 places in 6 styles.

    Returns:
        `datasets.Dataset`: columns `prompt` and `target` (the text to read, for [`OCRReward`]), `words` (how many).

    Example:
        >>> row = text_prompts(3, seed=1)[0]
        >>> f'"{row["target"]}"' in row["prompt"]
        True
    """
    from datasets import Dataset

    if templates is None:
        templates = [place + style for place in PLACES for style in STYLES]
    words = list(dict.fromkeys(words))
    for template in templates:
        if template.count('"{text}"') != 1:
            raise ValueError(
                f'A template must hold "{{text}}", in double quotes, once. Found {template!r}. '
                "Write e.g. 'a sign that says \"{text}\"'."
            )
    if not 1 <= max_words <= len(words):
        raise ValueError(f"`max_words` must lie between 1 and {len(words)} words. Found {max_words}. Lower it.")
    if any('"' in word or not word.strip() for word in words):
        raise ValueError("Words must not be empty or hold double quotes. Found one that does. Remove it.")
    generator = np.random.default_rng(seed)
    rows: dict[str, tuple[str, int]] = {}
    attempts = 0
    while len(rows) < count:
        attempts += 1
        if attempts > 100 * count + 1000:
            raise ValueError(
                f"`count` must not exceed the number of different prompts. Found {len(rows)} of {count} after "
                f"{attempts - 1} draws. Add words or templates, or ask for fewer."
            )
        size = int(generator.integers(1, max_words + 1))
        chosen = [words[i] for i in generator.choice(len(words), size, replace=False)]
        case = (str.upper, str.lower, str.title)[int(generator.integers(3))]
        text = case(" ".join(chosen))
        prompt = templates[int(generator.integers(len(templates)))].replace("{text}", text)
        rows.setdefault(prompt, (text, size))
    return Dataset.from_list([{"prompt": key, "target": text, "words": size} for key, (text, size) in rows.items()])


METADATA_COLUMN = "prompt_metadata"


def dataset_from_prompt_function(prompt_function: Callable[[], tuple[str, Any]], size: int) -> Any:
    """Draw a dataset of `size` prompts from a function of `trl.DDPOTrainer`, which returns `(prompt, metadata)`.

    A dictionary as metadata becomes one column per key, anything else the column `prompt_metadata`; the reward functions
    get them. Every draw is a row, also of a prompt that was drawn before.

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
