"""The held-out classifiers: networks that are never a reward read what an image shows.

An image may please all rewards and show nothing that was asked for. These classifiers are trained apart from every reward and
answer two questions: is the word exact, and are colour and shape both right?
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from trl_apex.rewards.base import to_arrays
from trl_apex.tiny.prompts import COLOURS, LETTERS, SHAPES
from trl_apex.tiny.render import SIZE


class HeldoutClassifier(nn.Module):
    """A small convolutional network with one head for each letter, one for the colour and one for the shape."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 24, 1), (24, 48, 2), (48, 64, 2), (64, 64, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 64), nn.SiLU())
        self.letters = nn.Linear(64, 3 * len(LETTERS))
        self.colour = nn.Linear(64, len(COLOURS))
        self.shape = nn.Linear(64, len(SHAPES))

    def forward(
        self, images: Float[Tensor, "B 3 32 32"]
    ) -> tuple[Float[Tensor, "B 3 L"], Float[Tensor, "B colours"], Float[Tensor, "B shapes"]]:
        """Logits of the three letters, the colour and the shape, of images in [0, 1]."""
        features = self.features(images * 2 - 1)
        return self.letters(features).unflatten(-1, (3, len(LETTERS))), self.colour(features), self.shape(features)


def load_heldout(path: Path) -> HeldoutClassifier:
    """Load the classifiers from a safetensors file, in evaluation mode."""
    model = HeldoutClassifier()
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def classify(model: HeldoutClassifier, images: Float[Tensor, "B 3 32 32"]) -> list[tuple[str, str, str]]:
    """The most likely word, colour and shape of each image."""
    letters, colour, shape = model(images)
    likely = torch.cat([letters.argmax(-1), colour.argmax(-1)[:, None], shape.argmax(-1)[:, None]], 1)
    return [("".join(LETTERS[i] for i in word), COLOURS[c], SHAPES[s]) for *word, c, s in likely.tolist()]


def heldout_metrics(
    images: Sequence[Image.Image] | Float[Tensor, "B 3 H W"], columns: Mapping[str, Sequence[Any]]
) -> dict[str, list[float]]:
    """`exact_word` and `attributes` (colour and shape both right) of each image, 1.0 or 0.0.

    Args:
        images (`Sequence[PIL.Image.Image]` or `torch.Tensor`): PIL images, or floats in [0, 1] of shape `[B, 3, H, W]`.
        columns (`Mapping[str, Sequence]`): the columns `word`, `colour` and `shape`, one value per image.

    Example:
        >>> from trl_apex.tiny.render import Scene, render
        >>> scene = Scene("CAT", "red", "circle")
        >>> heldout_metrics([render(scene)], {"word": ["CAT"], "colour": ["red"], "shape": ["square"]})
        {'exact_word': [1.0], 'attributes': [0.0]}
    """
    arrays = to_arrays(images)
    for name in ("word", "colour", "shape"):
        if name not in columns or len(columns[name]) != len(arrays):
            raise ValueError(
                f"`columns` must hold {len(arrays)} values of {name!r}, one per image. Found {len(columns.get(name, ()))}. "
                "Pass the columns of `tiny_prompts` that belong to the images."
            )
    small = [Image.fromarray(array).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for array in arrays]
    batch = torch.tensor(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2).float() / 255
    wanted = zip(columns["word"], columns["colour"], columns["shape"], strict=True)
    pairs = list(zip(classify(_shipped(), batch), wanted, strict=True))
    return {
        "exact_word": [float(seen[0] == right[0]) for seen, right in pairs],
        "attributes": [float(seen[1:] == right[1:]) for seen, right in pairs],
    }


@lru_cache(maxsize=1)
def _shipped() -> HeldoutClassifier:
    from trl_apex.tiny.world import weights_path

    return load_heldout(weights_path("heldout"))
