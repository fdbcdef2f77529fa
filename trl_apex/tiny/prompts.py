"""The prompts of the tiny world, and the split of its words into train and test.

Every word is three different letters out of twelve. Test words appear neither in the images that the shipped models were
pretrained on nor in the train prompts, so test prompts ask for words that no model has seen spelled.
"""

from itertools import permutations
from typing import Any

import numpy as np

LETTERS = "ACEHKLNOSTUX"
RGB = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "purple": (1, 0, 1),
    "orange": (1, 0.5, 0),
}
"""The pure colour of each name, for rewards; images have softer ones."""
COLOURS = tuple(RGB)
SHAPES = ("circle", "square", "triangle", "diamond", "star")
_SPLIT_SEED, _TEST_SHARE = 6574, 0.15


def caption(word: str, colour: str, shape: str) -> str:
    """The caption that asks for a coloured shape and a word.

    Example:
        >>> caption("CAT", "red", "circle")
        'a red circle with "CAT"'
    """
    return f'a {colour} {shape} with "{word}"'


def words(split: str) -> list[str]:
    """The words of the split "train" or "test", in a fixed order.

    Example:
        >>> len(words("train")), len(words("test")), set(words("train")) & set(words("test"))
        (1122, 198, set())
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test'. Found {split!r}. Pass one of the two.")
    every = ["".join(letters) for letters in permutations(LETTERS, 3)]
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(every))
    test, train = np.split(order, [int(_TEST_SHARE * len(every))])
    return [every[i] for i in (test if split == "test" else train)]


def tiny_prompts(split: str, n: int, seed: int = 0) -> Any:
    """Draw `n` different prompts of the split "train" or "test" as a `datasets.Dataset`, the same for the same arguments.

    Example:
        >>> tiny_prompts("train", 4).column_names
        ['prompt', 'word', 'colour', 'shape']
    """
    from datasets import Dataset

    pool = words(split)
    total = len(pool) * len(COLOURS) * len(SHAPES)
    if not 1 <= n <= total:
        raise ValueError(
            f"`n` must lie between 1 and {total}, the number of {split} prompts. Found {n}. Ask for fewer."
        )
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])
    rows = []
    for index in rng.choice(total, size=n, replace=False).tolist():
        index, shape = divmod(index, len(SHAPES))
        word, colour = divmod(index, len(COLOURS))
        rows.append((pool[word], COLOURS[colour], SHAPES[shape]))
    columns = zip(*((caption(*row), *row) for row in rows), strict=True)
    return Dataset.from_dict(dict(zip(("prompt", "word", "colour", "shape"), map(list, columns), strict=True)))
