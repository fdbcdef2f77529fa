"""Prompts that ask for a text in the image, made from templates and words."""

from collections.abc import Sequence
from typing import Any

import numpy as np

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

    A text is one to `max_words` different words, in capitals, lower case or with capital first letters, so that prompts
    range from easy to hard. Give train and test disjoint `words` to see whether spelling was learned or words were.

    Args:
        count (`int`): how many.
        seed (`int`): of the draw; the same arguments give the same prompts.
        words (`Sequence[str]`): to choose from.
        templates (`Sequence[str]`, *optional*): each with `{text}` in double quotes; by default 16 places in 6 styles.
        max_words (`int`): the longest text.

    Returns:
        `datasets.Dataset`: columns `prompt` and `target` (the text to read, for [`OCRReward`]), `words` (how many).

    Raises:
        ValueError: if a template has no `"{text}"`, or there are not so many different prompts.

    Example:
        ```python
        >>> row = text_prompts(3, seed=1)[0]
        >>> f'"{row["target"]}"' in row["prompt"]
        True

        ```
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
    return Dataset.from_dict(
        {
            "prompt": list(rows),
            "target": [text for text, _ in rows.values()],
            "words": [size for _, size in rows.values()],
        }
    )
