"""Scenes that a caption fits less well, or that look worse: the losing half of a preference pair."""

from dataclasses import replace

import numpy as np

from trl_apex.tiny.prompts import COLOURS, LETTERS, SHAPES
from trl_apex.tiny.render import Scene


def worse_scene(scene: Scene, rng: np.random.Generator) -> Scene:
    """Changes one thing that the caption names (two times in three) or degrades the picture (one in three).

    Args:
        scene (`Scene`): The scene that people would pick.
        rng (`numpy.random.Generator`): Advanced by the draw.

    Returns:
        `Scene`: The scene that they would not pick for the caption of `scene`.

    Example:
        >>> scene = Scene("CAT", "red", "circle")
        >>> worse_scene(scene, np.random.default_rng(0)) == scene
        False
    """
    kind = rng.choice(
        ["letters", "colour", "shape", "blur", "noise", "fade"], p=[0.42, 0.125, 0.125, 0.11, 0.11, 0.11]
    )
    if kind == "letters":
        return replace(scene, word=_misspelled(scene.word, rng))
    if kind == "colour":
        return replace(scene, colour=str(rng.choice([c for c in COLOURS if c != scene.colour])))
    if kind == "shape":
        return replace(scene, shape=str(rng.choice([s for s in SHAPES if s != scene.shape])))
    if kind == "blur":
        return replace(scene, blur=scene.blur + float(rng.uniform(0.4, 1.1)))
    if kind == "noise":
        return replace(scene, noise=scene.noise + float(rng.uniform(0.04, 0.12)))
    faded = float(rng.uniform(0.35, 0.75))
    return replace(scene, text_opacity=faded * scene.text_opacity, shape_opacity=faded * scene.shape_opacity)


def _misspelled(word: str, rng: np.random.Generator) -> str:
    letters = list(word)
    for place in rng.choice(3, size=rng.integers(1, 4), replace=False):
        letters[place] = str(rng.choice([letter for letter in LETTERS if letter != word[place]]))
    return "".join(letters)
