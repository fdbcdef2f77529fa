"""Likeness to a source image, against cosines worked out one image at a time on a tiny CLIP, ViT and DINOv2."""

import numpy as np
import pytest
import torch
from PIL import Image
from rewards_tiny_models import BODY
from test_clip_rewards import prepare
from transformers import (
    BitImageProcessorPil,
    CLIPModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from trl_apex.rewards import DINOSourceReward, SourceReward


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


@pytest.fixture(scope="module", params=["dino", "dinov2"])
def dino_folder(request, tmp_path_factory):
    folder, body = tmp_path_factory.mktemp(request.param), BODY | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    dinov2 = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**body, mlp_ratio=2, num_register_tokens=3))
    model = ViTModel(ViTConfig(**body), add_pooling_layer=False) if request.param == "dino" else dinov2
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    BitImageProcessorPil(**size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_center_crop=True).save_pretrained(
        folder
    )
    return folder, model.eval()


@pytest.mark.parametrize("patches", [False, True])
def test_dino_features_of_the_class_token_or_of_the_patches(dino_folder, pictures, patches):
    folder, model = dino_folder
    edited, sources = pictures[:2], pictures[2:]
    reward = DINOSourceReward(str(folder), patches=patches, device="cpu")
    rewards = reward(prompts=["a"] * 3, completions=[*edited, edited[0]], source_image=[*sources, None])
    expected = []
    for pair in zip(edited, sources, strict=True):
        resized = [image.resize((22, 16), Image.Resampling.BICUBIC).crop((3, 0, 19, 16)) for image in pair]
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in resized])
        with torch.no_grad():
            image, source = model(pixel_values=pixels).last_hidden_state.double()
        cosines = (image * source).sum(-1) / image.norm(dim=-1) / source.norm(dim=-1)
        expected.append((cosines[-4:].mean() if patches else cosines[0]).item())
    assert (
        rewards == [*(pytest.approx(value, abs=1e-5) for value in expected), None]
        and abs(rewards[0] - rewards[1]) > 1e-4
    )
