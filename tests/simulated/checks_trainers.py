"""Training on the simulated accelerator gives the CPU's numbers."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from trl_apex import APEXConfig, APEXTrainer, DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_apex.tiny.pipeline import build_pipeline

PROMPTS = ['a red circle with " C A T "', 'a blue square with " H U T "', "a green star", "a red square"]
KINDS = {"grpo": (DiffusionGRPOTrainer, DiffusionGRPOConfig), "apex": (APEXTrainer, APEXConfig)}


def redness(completions, images, **kwargs):
    return images[:, 0].mean((1, 2)).tolist()


def contrast(prompts, completions, images, **kwargs):
    return (100 * images.std((1, 2, 3))).tolist()


def tiny_pipeline():
    pipe = build_pipeline(0)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(20)  # a fresh head would predict nothing and hide errors
    return pipe


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    def make(kind="apex", on_cpu=False, peft=True, pipeline=None, reward_funcs=(redness, contrast), **options):
        if on_cpu:
            monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
        trainer_class, config_class = KINDS[kind]
        values = {
            "output_dir": str(tmp_path / f"run-{on_cpu}"),
            "use_cpu": on_cpu,
            "per_device_train_batch_size": 8,
            "generation_batch_size": 8,
            "num_generations": 4,
            "num_inference_steps": 3,
            "guidance_scale": 2.0,
            "max_sequence_length": 12,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "learning_rate": 1e-3,
            "disable_tqdm": True,
            "seed": 3,
        }
        trainer = trainer_class(
            model=pipeline or tiny_pipeline(),
            reward_funcs=list(reward_funcs),
            args=config_class(**{**values, **options}),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS * 2}),
            eval_dataset=Dataset.from_dict({"prompt": PROMPTS[:2]}),
            peft_config=LoraConfig(r=4, lora_alpha=12, init_lora_weights="gaussian") if peft else None,
        )
        assert trainer.accelerator.device.type == ("cpu" if on_cpu else "sim")
        return trainer

    return make


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal_numbers(trainer, other) -> None:
    """Weights and logged numbers, to 7 digits."""
    torch.testing.assert_close(weights(trainer), weights(other), rtol=1e-7, atol=1e-9)
    for ours, theirs in zip(trainer.state.log_history, other.state.log_history, strict=True):
        shared = {key for key in ours if "time" not in key and "runtime" not in key and "per_second" not in key}
        assert {k: ours[k] for k in shared} == pytest.approx({k: theirs[k] for k in shared}, rel=1e-7, nan_ok=True)


@pytest.fixture(autouse=True)
def same_attention():
    """PyTorch picks another kernel on the CPU than on a device in Python; this one both have."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_two_updates_give_the_numbers_of_the_cpu(make_trainer, kind):
    simulated = make_trainer(kind, log_completions=True)
    start = weights(simulated)
    simulated.train()
    assert any(not torch.equal(start[name], value) for name, value in weights(simulated).items())
    on_cpu = make_trainer(kind, on_cpu=True, log_completions=True)
    on_cpu.train()
    assert_equal_numbers(simulated, on_cpu)


def test_a_reward_that_mixes_devices_is_not_scored(make_trainer):
    def mixed(images, **kwargs):
        return (images.mean((1, 2, 3)) * torch.ones(len(images))).tolist()

    trainer = make_trainer(reward_funcs=[redness, mixed], max_steps=1)
    with pytest.raises(RuntimeError, match="reward 'mixed' failed"), pytest.warns(match="cpu and sim:0"):
        trainer.train()


def test_an_update_with_a_tensor_on_the_wrong_device_fails(make_trainer):
    trainer = make_trainer()
    trainer._conditions.negative(2.0)  # encoded on the device
    trainer._conditions._negative = {name: value.cpu() for name, value in trainer._conditions._negative.items()}
    with pytest.raises(RuntimeError, match="cpu and sim:0"):
        trainer.train()
