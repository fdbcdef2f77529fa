"""JPEG sizes as DDPO counts them."""

import pytest
import torch
from PIL import Image

from trl_apex.rewards import JPEGCompressibilityReward, JPEGIncompressibilityReward


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
