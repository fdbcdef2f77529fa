"""Rewards that need no prompt: JPEG sizes as DDPO counts them, and a classifier's probabilities worked out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from rewards_tiny_models import BODY
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from trl_apex.rewards import JPEGCompressibilityReward, JPEGIncompressibilityReward, RewardLoadError, SafetyReward


@pytest.mark.parametrize("quality", [95, 10])
def test_kilobytes_of_pictures_and_tensors(tmp_path, quality):
    tensor = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(tensor[0].mul(255).round().byte().permute(1, 2, 0).numpy())
    image.save(tmp_path / "image.jpg", quality=quality)
    kilobytes = (tmp_path / "image.jpg").stat().st_size / 1000
    larger, smaller = JPEGIncompressibilityReward(quality), JPEGCompressibilityReward(quality)
    assert larger(prompts=["x"], completions=[image]) == larger(prompts=["x"], images=tensor) == [kilobytes]
    assert smaller(prompts=["x"], completions=[image]) == [-kilobytes]


def test_quality_out_of_range():
    with pytest.raises(ValueError, match="between 1 and 95"):
        JPEGCompressibilityReward(quality=100)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    labels = {0: "drawing", 1: "nsfw", 2: "normal"}
    config = ViTConfig(
        **BODY, image_size=16, patch_size=8, id2label=labels, label2id={v: k for k, v in labels.items()}
    )
    model = ViTForImageClassification(config)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder, model.eval()


@pytest.mark.parametrize("safe", [["normal"], ["normal", "drawing"]])
def test_safety_is_the_probability_of_the_safe_labels(classifier, safe):
    folder, model = classifier
    noise = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    expected = []
    for array in noise:
        with torch.no_grad():
            logits = model((torch.from_numpy(array) / 127.5 - 1).permute(2, 0, 1)[None]).logits[0].double()
        odds = dict(zip(("drawing", "nsfw", "normal"), logits.exp().tolist(), strict=True))
        expected.append(sum(odds[label] for label in safe) / sum(odds.values()))
    rewards = SafetyReward(str(folder), safe, device="cpu")(["a", "b"], list(map(Image.fromarray, noise)))
    assert rewards == pytest.approx(expected, abs=1e-5) and abs(rewards[0] - rewards[1]) > 1e-3


def test_a_safe_label_that_the_model_lacks_is_refused(classifier):
    with pytest.raises(RewardLoadError, match=r"labels of .*\['drawing', 'normal', 'nsfw'\]. Found \['sfw'\]"):
        SafetyReward(str(classifier[0]), safe="sfw", device="cpu").load()
