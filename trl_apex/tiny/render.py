"""The captioned images of the tiny world: a coloured shape above a three-letter word, 32 pixels wide.

The caption names the colour, the shape and the word. Background, opacity, blur and noise are not in it: these *nuisance
factors* are what rewards for quality and beauty can still improve after pretraining.
"""

import colorsys
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from trl_apex.tiny.prompts import COLOURS, SHAPES, caption

SIZE = 32  # pixels of a side
Colour = tuple[int, int, int]
_SCALE = 4  # drawn this many times larger, then averaged down: smooth edges without an anti-aliasing draw library
_FONT_PIXELS = 15
_INK = (24, 24, 28)
_RGB = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 90, 210),
    "yellow": (245, 205, 30),
    "purple": (140, 60, 180),
    "orange": (245, 130, 30),
}


@dataclass(frozen=True)
class Scene:
    """Everything that decides one image: what the caption names, and nuisance factors."""

    word: str  # three of LETTERS
    colour: str  # of the shape, one of COLOURS
    shape: str  # one of SHAPES
    hue: float = 0.0  # of the background, 0 to 1
    saturation: float = 0.0  # of the background, 0 (white) to 1
    text_opacity: float = 1.0  # 0 for an invisible word
    shape_opacity: float = 1.0
    radius: float = 8.0  # of the shape, in pixels
    shape_offset: tuple[float, float] = (0.0, 0.0)  # in pixels
    text_offset: tuple[float, float] = (0.0, 0.0)
    blur: float = 0.0  # standard deviation of the Gaussian, in pixels
    noise: float = 0.0  # standard deviation, in units of the full range
    noise_seed: int = 0

    @property
    def prompt(self) -> str:
        """The caption of the image."""
        return caption(self.word, self.colour, self.shape)


def sample_scenes(words: Sequence[str], n: int, seed: int) -> list[Scene]:
    """Draw `n` scenes: words, colours and shapes uniformly, a quarter of them blurred, 35 % noisy."""
    rng = np.random.default_rng(seed)
    scenes = []
    for _ in range(n):
        blurred, noisy = rng.random() < 0.25, rng.random() < 0.35
        scenes.append(
            Scene(
                word=words[int(rng.integers(len(words)))],
                colour=COLOURS[rng.integers(len(COLOURS))],
                shape=SHAPES[rng.integers(len(SHAPES))],
                hue=float(rng.random()),
                saturation=float(rng.uniform(0.0, 0.45)),
                text_opacity=float(rng.uniform(0.45, 1.0)),
                shape_opacity=float(rng.uniform(0.45, 1.0)),
                radius=float(rng.uniform(7.0, 8.8)),
                shape_offset=(float(rng.uniform(-2, 2)), float(rng.uniform(-0.5, 0.5))),
                text_offset=(float(rng.uniform(-1.5, 1.5)), float(rng.uniform(-0.5, 0.75))),
                blur=float(rng.uniform(0.4, 1.1)) if blurred else 0.0,
                noise=float(rng.uniform(0.02, 0.12)) if noisy else 0.0,
                noise_seed=int(rng.integers(2**31)),
            )
        )
    return scenes


def quality(scene: Scene) -> float:
    """Technical quality of a scene, from 1 (bad) to 5 (excellent).

    `5 - 2.6 blur - 22 noise - 2 (1 - opacity)`, with `opacity` the mean of the text's and the shape's, clipped to [1, 5].

    Example:
        >>> quality(Scene("CAT", "red", "circle")), quality(Scene("CAT", "red", "circle", blur=1.0, noise=0.1))
        (5.0, 1.0)
    """
    fade = 1.0 - 0.5 * (scene.text_opacity + scene.shape_opacity)
    return float(min(max(5.0 - 2.6 * scene.blur - 22.0 * scene.noise - 2.0 * fade, 1.0), 5.0))


def beauty(scene: Scene) -> float:
    """How pleasing a scene is, from 1 to 10: vivid backgrounds, saturated shapes, dark text, clean surfaces.

    `3 + 6 saturation + 2.6 shape_opacity + 1.6 text_opacity - 1.5 blur - 14 noise`, clipped to [1, 10].
    """
    score = 3.0 + 6.0 * scene.saturation + 2.6 * scene.shape_opacity + 1.6 * scene.text_opacity
    return float(min(max(score - 1.5 * scene.blur - 14.0 * scene.noise, 1.0), 10.0))


def render(scene: Scene) -> Image.Image:
    """Draw one scene as an RGB image of 32 x 32 pixels, the same for the same scene."""
    hsv = (scene.hue, scene.saturation, 1.0 - 0.08 * scene.saturation)
    background = _rgb(255 * part for part in colorsys.hsv_to_rgb(*hsv))
    image = Image.new("RGB", (SIZE * _SCALE, SIZE * _SCALE), background)
    draw = ImageDraw.Draw(image)
    centre = ((SIZE / 2 + scene.shape_offset[0]) * _SCALE, (9.0 + scene.shape_offset[1]) * _SCALE)
    colour = _mix(_RGB[scene.colour], background, scene.shape_opacity)
    _draw_shape(draw, scene.shape, centre, scene.radius * _SCALE, colour)
    anchor = ((SIZE / 2 + scene.text_offset[0]) * _SCALE, (SIZE - 1.5 + scene.text_offset[1]) * _SCALE)
    draw.text(anchor, scene.word, font=_font(), fill=_mix(_INK, background, scene.text_opacity), anchor="ms")
    image = image.reduce(_SCALE)
    if scene.blur:
        image = image.filter(ImageFilter.GaussianBlur(scene.blur))
    if scene.noise:
        noise = np.random.default_rng(scene.noise_seed).normal(0.0, 255 * scene.noise, (SIZE, SIZE, 3))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).round().astype(np.uint8))
    return image


def render_batch(scenes: Sequence[Scene]) -> UInt8[Tensor, "B 3 32 32"]:
    """Draw scenes as one uint8 tensor of shape `[B, 3, 32, 32]`."""
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def as_float(pixels: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Bytes to floats in [0, 1]."""
    return pixels.float() / 255.0


def _rgb(values: Iterable[float]) -> Colour:
    red, green, blue = map(round, values)
    return red, green, blue


def _mix(front: Colour, back: Colour, opacity: float) -> Colour:
    return _rgb(opacity * f + (1 - opacity) * b for f, b in zip(front, back, strict=True))


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, fill: Colour
) -> None:
    (x, y), r = centre, radius
    if shape == "circle":
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    elif shape == "square":
        half = 0.88 * r
        draw.rectangle([x - half, y - half, x + half, y + half], fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)], fill=fill)
    elif shape == "diamond":
        wide = 0.78 * r
        draw.polygon([(x, y - r), (x + wide, y), (x, y + r), (x - wide, y)], fill=fill)
    elif shape == "star":
        reach = [r * 1.08, r * 0.45] * 5
        angles = [math.pi * corner / 5 - math.pi / 2 for corner in range(10)]
        points = [(x + s * math.cos(a), y + 0.5 + s * math.sin(a)) for s, a in zip(reach, angles, strict=True)]
        draw.polygon(points, fill=fill)
    else:
        raise ValueError(f"`shape` must be one of {SHAPES}. Found {shape!r}. Pass one of these.")


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    spec = find_spec("matplotlib")  # found without importing: only the font file that it ships is needed
    path = Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSansMono-Bold.ttf" if spec and spec.origin else None
    if path is None or not path.exists():
        raise ImportError('Drawing the tiny world needs a font that matplotlib ships: pip install "trl_apex[report]"')
    return ImageFont.truetype(str(path), _FONT_PIXELS * _SCALE)
