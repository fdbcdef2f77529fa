import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from toy_rewards import PROMPTS

from trl_apex import APEXConfig
from trl_apex.tiny.pipeline import build_pipeline


@pytest.fixture(autouse=True)
def no_precision_of_an_earlier_run(monkeypatch):
    """transformers 4 leaves it in the environment, where the next run finds it."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture
def pipeline():
    pipe = build_pipeline(0)
    # A fresh adaLN-zero-like head would predict nothing and hide errors.
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(20)
    pipe.vae.register_to_config(shift_factor=0.1)
    return pipe


@pytest.fixture
def dataset():
    return Dataset.from_dict({"prompt": PROMPTS * 2, "level": list(range(8))})


@pytest.fixture
def lora():
    return LoraConfig(r=4, lora_alpha=12, init_lora_weights="gaussian")


@pytest.fixture
def make_args(tmp_path):
    def make(cls=APEXConfig, **overrides):
        values = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "per_device_train_batch_size": 8,
            "generation_batch_size": 8,
            "num_generations": 4,
            "num_inference_steps": 3,
            "guidance_scale": 1.0,
            "max_sequence_length": 12,
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "disable_tqdm": True,
            "seed": 3,
        }
        if issubclass(cls, APEXConfig):
            values["baseline_prompts"] = 0  # see test_start.py
        return cls(**{**values, **overrides})

    return make
