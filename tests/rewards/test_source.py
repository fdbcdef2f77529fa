"""Likeness to a source image, against cosines worked out one image at a time on a tiny CLIP."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_clip_rewards import prepare
from transformers import CLIPModel

from trl_apex.rewards import SourceReward


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0).integers(0, 256, (4, 20, 28, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in noise]


def embed(folder, image):
    """The embedding of one image without the package's code."""
    clip = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return clip.visual_projection(clip.vision_model(pixel_values=prepare(image)[None]).pooler_output)[0]


def test_cosine_with_the_source(clip_folder, pictures, tmp_path):
    edited, sources = pictures[:2], pictures[2:]
    sources[1].save(tmp_path / "source.png")
    given = {"source_image": [sources[0], str(tmp_path / "source.png")]}
    rewards = SourceReward(str(clip_folder), device="cpu")(prompts=["a", "b"], completions=edited, **given)
    expected = [
        torch.nn.functional.cosine_similarity(embed(clip_folder, a), embed(clip_folder, b), dim=0).item()
        for a, b in zip(edited, sources, strict=True)
    ]
    assert rewards == pytest.approx(expected, abs=1e-5) and abs(rewards[0] - rewards[1]) > 1e-4


def test_no_source_is_no_reward(clip_folder, pictures):
    reward = SourceReward(str(clip_folder), device="cpu")
    assert reward(prompts=["a", "b"], completions=pictures[:2]) == [None, None]
    reward.column = "before"
    rewards = reward(prompts=["a", "b"], completions=pictures[:2], before=[None, pictures[1]])
    assert rewards == [None, pytest.approx(1)]
