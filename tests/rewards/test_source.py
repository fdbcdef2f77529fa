"""Likeness to a source image, against cosines worked out one image at a time on tiny networks."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_clip_rewards import prepare
from transformers import BitImageProcessorPil, CLIPModel, Dinov2Config, Dinov2Model

from trl_apex.rewards import SourceReward


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0).integers(0, 256, (4, 20, 28, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in noise]


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    body = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    model = Dinov2Model(Dinov2Config(image_size=16, patch_size=8, **body))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # otherwise all images are nearly the same
    model.save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.48145466, 0.4578275, 0.40821073],  # as `prepare`
        image_std=[0.26862954, 0.26130258, 0.27577711],
    ).save_pretrained(folder)
    return folder


@pytest.fixture(params=["dino", "clip"])
def network(request, dino_folder, clip_folder):
    """A folder, and the embedding of one prepared image without the package's code."""
    if request.param == "dino":
        dino = Dinov2Model.from_pretrained(dino_folder).eval()
        return dino_folder, lambda pixels: dino(pixel_values=pixels).pooler_output[0]
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    return clip_folder, lambda pixels: clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)[0]


def test_cosine_with_the_source(network, pictures, tmp_path):
    folder, embed = network
    edited, sources = pictures[:2], pictures[2:]
    sources[1].save(tmp_path / "source.png")
    reward = SourceReward(str(folder), device="cpu")
    given = {"source_image": [sources[0], str(tmp_path / "source.png")]}
    rewards = reward(prompts=["a", "b"], completions=edited, **given)
    with torch.no_grad():
        pairs = [(embed(prepare(a)[None]), embed(prepare(b)[None])) for a, b in zip(edited, sources, strict=True)]
    expected = [torch.nn.functional.cosine_similarity(a, b, dim=0).item() for a, b in pairs]
    assert rewards == pytest.approx(expected, abs=1e-5) and abs(rewards[0] - rewards[1]) > 1e-3


def test_no_source_is_no_reward(dino_folder, pictures):
    reward = SourceReward(str(dino_folder), column="before", device="cpu")
    assert reward(prompts=["a", "b"], completions=pictures[:2]) == [None, None]
    rewards = reward(prompts=["a", "b"], completions=pictures[:2], before=[None, pictures[1]])
    assert rewards == [None, pytest.approx(1)]
