"""Images before and after, as data inside the page."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .numbers import fixed
from .run import Sample

LARGEST_SIDE = 512


@dataclass(frozen=True)
class Card:
    """One prompt of the gallery.

    Args:
        prompt (`str`): what was asked for.
        base, tuned (`str`): the images as `data:` addresses.
        small (`bool`): whether to enlarge without blur.
        rewards (`list`): name, before, after, difference and "up", "down" or "same".
    """

    prompt: str
    base: str
    tuned: str
    small: bool
    rewards: list[tuple[str, str, str, str, str]]


def cards(samples: list[Sample]) -> list[Card]:
    """Cards for the samples whose images can be read."""
    made = []
    for sample in samples:
        try:
            base, small = image_data(sample.base)
            tuned, _ = image_data(sample.tuned)
        except OSError:
            continue
        made.append(Card(sample.prompt, base, tuned, small, _rewards(sample)))
    return made


def image_data(path: Path) -> tuple[str, bool]:
    """An image as a `data:` address, scaled down to at most 512 pixels a side, and whether it is tiny.

    Raises:
        OSError: if it cannot be read.
    """
    with Image.open(path) as image:
        small = max(image.size) <= 128
        picture = image.convert("RGB")
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    buffer = io.BytesIO()
    kind = "png" if small else "webp"
    picture.save(buffer, kind, **({} if small else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", small


def _rewards(sample: Sample) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for name, before in sample.base_rewards.items():
        after = sample.tuned_rewards.get(name)
        if not isinstance(before, int | float) or not isinstance(after, int | float):
            continue
        difference = after - before
        decimals = 2 if abs(before) < 100 else 0
        shown = fixed(difference, decimals, sign=True)
        way = "same" if shown[0] not in "+\N{MINUS SIGN}" else "up" if difference > 0 else "down"
        rows.append((name, fixed(before, decimals), fixed(after, decimals), shown, way))
    return rows
