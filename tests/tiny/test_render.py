"""Rendered images: the same for the same seed, and true to their scene."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from trl_apex.tiny.prompts import words
from trl_apex.tiny.render import Scene, beauty, quality, render, render_batch, sample_scenes

CLEAN = Scene("CAT", "red", "circle")


def test_rendering_is_deterministic() -> None:
    first = render_batch(sample_scenes(words("train"), 16, seed=3))
    second = render_batch(sample_scenes(words("train"), 16, seed=3))
    other = render_batch(sample_scenes(words("train"), 16, seed=4))
    assert first.dtype == torch.uint8 and first.shape == (16, 3, 32, 32)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_shape_has_its_colour() -> None:
    assert render(CLEAN).getpixel((16, 9)) == (214, 40, 40)
    assert render(CLEAN).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("change", [{"blur": 1.0}, {"noise": 0.1}, {"text_opacity": 0.4}, {"shape_opacity": 0.4}])
def test_a_degraded_scene_looks_different_and_scores_lower(change: dict) -> None:
    degraded = replace(CLEAN, **change)
    assert np.abs(np.asarray(render(degraded), dtype=float) - np.asarray(render(CLEAN), dtype=float)).mean() > 1
    assert quality(degraded) < quality(CLEAN)
    assert beauty(degraded) < beauty(CLEAN)


def test_nuisance_factors_occur_as_often_as_documented() -> None:
    scenes = sample_scenes(words("train"), 2000, seed=0)
    assert abs(sum(scene.blur > 0 for scene in scenes) / 2000 - 0.25) < 0.03
    assert abs(sum(scene.noise > 0 for scene in scenes) / 2000 - 0.35) < 0.03
    assert min(map(quality, scenes)) >= 1.0 and max(map(quality, scenes)) <= 5.0
    assert min(map(beauty, scenes)) >= 1.0 and max(map(beauty, scenes)) <= 10.0


def test_an_unknown_shape_is_named() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        render(replace(CLEAN, shape="hexagon"))
