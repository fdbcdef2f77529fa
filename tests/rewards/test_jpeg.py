"""JPEG sizes as DDPO counts them."""

import io

import pytest
import torch
from PIL import Image

from trl_apex.rewards import JPEGCompressibilityReward, JPEGIncompressibilityReward


def test_kilobytes(tmp_path):
    image = Image.effect_noise((64, 48), 80).convert("RGB")
    image.save(tmp_path / "image.jpg", quality=95)
    kilobytes = (tmp_path / "image.jpg").stat().st_size / 1000
    assert JPEGIncompressibilityReward()(prompts=["x"], completions=[image]) == [pytest.approx(kilobytes)]
    assert JPEGCompressibilityReward()(prompts=["x"], completions=[image]) == [pytest.approx(-kilobytes)]


def test_quality_and_tensors():
    tensor = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fine, coarse = (JPEGIncompressibilityReward(quality=q)(prompts=["x"] * 2, images=tensor) for q in (95, 10))
    assert all(a > b for a, b in zip(fine, coarse, strict=True))
    pixels = tensor[0].mul(255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format="JPEG", quality=95)
    assert fine[0] == len(buffer.getvalue()) / 1000


def test_quality_out_of_range():
    with pytest.raises(ValueError, match="between 1 and 95"):
        JPEGCompressibilityReward(quality=100)
