"""Training on the simulated accelerator gives the CPU's numbers."""

import pytest
import torch
from datasets import Dataset
from families import build
from peft import LoraConfig
from simulated_device import SimTensor
from tiny_language_models import tiny_causal_lm, tiny_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel

from trl_apex import (
    APEXConfig,
    APEXGRPOConfig,
    APEXGRPOTrainer,
    APEXTrainer,
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
)
from trl_apex.aggregation.options import RULES
from trl_apex.evaluation.run import run_evaluation
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
            "eval_num_inference_steps": 2,
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


def assert_equal_numbers(trainer, other, rel: float = 1e-7) -> None:
    """Weights to 7 digits, and logged numbers."""
    torch.testing.assert_close(weights(trainer), weights(other), rtol=1e-7, atol=5e-8)
    for ours, theirs in zip(trainer.state.log_history, other.state.log_history, strict=True):
        shared = {key for key in ours if "time" not in key and "runtime" not in key and "per_second" not in key}
        assert {k: ours[k] for k in shared} == pytest.approx({k: theirs[k] for k in shared}, rel=rel, nan_ok=True)


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


def assert_trained(trainer, start: dict[str, torch.Tensor]) -> None:
    assert all(p.device == trainer.accelerator.device for p in trainer.model.parameters())
    assert any(not torch.equal(start[name], value) for name, value in weights(trainer).items())


def test_all_weights_with_a_reference_that_waits_on_the_cpu(make_trainer):
    options = {"peft": False, "beta": 0.1, "offload_reference": True, "learning_rate": 1e-4}
    simulated = make_trainer(**options)
    start = weights(simulated)
    simulated.train()
    assert_trained(simulated, start)
    on_cpu = make_trainer(**options, on_cpu=True)
    on_cpu.train()
    assert_equal_numbers(simulated, on_cpu, rel=1e-5)  # some kernels round otherwise


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains(make_trainer, rule):
    trainer = make_trainer(multi_objective_aggregation=rule, max_steps=1, guidance_scale=1.0)
    start = weights(trainer)
    trainer.train()
    assert_trained(trainer, start)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1, "num_iterations": 2},
        {"gradient_probe": True, "probe_every": 1, "aggregation_options": {"conflict_source": "gradient"}},
        {
            "gradient_probe": True,
            "probe_every": 1,
            "aggregation_options": {"conflict_source": "population"},
            "beta": 0.1,
        },
        {"gradient_checkpointing": True, "reward_overlap": False, "rollout_batch_size": 3},
        {"transition": "cps", "sde_window_size": 1, "sde_window_range": (1, 2), "share_initial_noise": True},
    ],
    ids=["kl-of-an-adapter", "probe", "population", "checkpointing", "window"],
)
def test_options_of_training(make_trainer, options):
    trainer = make_trainer(**options)
    start = weights(trainer)
    trainer.train()
    assert_trained(trainer, start)


def test_an_evaluation_before_training_an_average_a_checkpoint_a_resume_and_an_export(make_trainer, tmp_path):
    options = {"ema_decay": 0.5, "save_strategy": "steps", "save_steps": 1, "log_completions": True}
    options["gradient_accumulation_steps"] = 2  # one update an iteration
    trainer = make_trainer(**options, eval_strategy="steps", eval_steps=1)
    first = trainer.evaluate()["eval_reward"]
    trainer.train()
    evaluated = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert len({first, *evaluated}) == 3
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    whole = weights(trainer)

    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run-False" / "checkpoint-1"))
    torch.testing.assert_close(weights(resumed), whole, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["sd3.5-medium", "flux", "sd1.5", "sdxl"])
def test_every_family_trains_and_evaluates(make_trainer, family, monkeypatch):
    if family == "flux":  # diffusers knows by name which devices have no float64
        monkeypatch.setattr(SimTensor, "has_float64", True)
    trainer = make_trainer(
        pipeline=build(family),
        max_steps=1,
        height=16,
        width=16,
        generation_batch_size=4,
        per_device_train_batch_size=4,
    )
    start = weights(trainer)
    trainer.train()
    assert_trained(trainer, start)
    assert trainer.evaluate()["eval_reward"] > 0


def test_an_adapter_is_evaluated_beside_its_base(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    pipeline, prompts = tiny_pipeline(), Dataset.from_dict({"prompt": PROMPTS[:2]})
    sizes = {"num_inference_steps": 2, "max_sequence_length": 12, "report": lambda line: None}
    result = run_evaluation(
        pipeline, str(tmp_path / "adapter"), prompts, [redness, contrast], tmp_path / "evaluation", **sizes
    )
    assert pipeline.transformer.device == trainer.accelerator.device
    assert "redness" in str(result)


def test_a_language_model_trains(tmp_path):
    def share_of_a(completions, **kwargs):
        return [text.split().count("a") / 8 for text in completions]

    def share_of_b(completions, **kwargs):
        return [text.split().count("b") / 80 for text in completions]

    arguments = APEXGRPOConfig(
        output_dir=str(tmp_path), bf16=False, per_device_train_batch_size=8, num_generations=4, max_steps=2,
        max_completion_length=6, learning_rate=3e-3, disable_tqdm=True, report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = APEXGRPOTrainer(
        tiny_causal_lm(),
        [share_of_a, share_of_b],
        arguments,
        Dataset.from_dict({"prompt": ["say c d", "say e f"] * 4}),
        processing_class=tiny_tokenizer(),
    )
    assert trainer.accelerator.device.type == "sim"
    start = weights(trainer)
    trainer.train()
    assert_trained(trainer, start)
