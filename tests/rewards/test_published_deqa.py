"""The adapter of the published DeQA-Score, on a tiny model that comes with code of its own."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from trl_apex.rewards import PublishedDeQAReward, RewardLoadError

CODE = """
import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TinyConfig(PretrainedConfig):
    model_type = "tiny_deqa"

class TinyDeQA(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.level = torch.nn.Linear(3, 5)
        self.post_init()

    def score(self, images):
        means = np.stack([np.asarray(image).mean((0, 1)) for image in images]) / 255
        levels = self.level(torch.tensor(means, dtype=self.level.weight.dtype)).softmax(-1)
        return levels @ torch.arange(5.0, 0, -1)
"""
CONFIG = """{"architectures": ["TinyDeQA"], "model_type": "tiny_deqa", "auto_map": {
"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyDeQA"}}"""


def test_the_models_own_score_of_each_image(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "modeling_tiny.py").write_text(CODE)
    (tmp_path / "config.json").write_text(CONFIG)
    weight = torch.zeros(5, 3)
    weight[0, 0] = 100.0  # any red is excellent
    save_file({"level.weight": weight, "level.bias": torch.zeros(5)}, tmp_path / "model.safetensors", {"format": "pt"})
    images = [Image.fromarray(np.full((8, 8, 3), colour, np.uint8)) for colour in ((255, 0, 0), (0, 0, 255))]
    with pytest.raises(RewardLoadError, match="trust_remote_code=True"):
        PublishedDeQAReward(str(tmp_path), device="cpu").load()
    reward = PublishedDeQAReward(str(tmp_path), trust_remote_code=True, device="cpu")
    assert reward.__name__ == "deqa"
    assert reward(prompts=["a", "b"], completions=images) == pytest.approx([5, 3])
