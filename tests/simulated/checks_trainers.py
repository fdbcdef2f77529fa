"""Training on the simulated accelerator gives the CPU's numbers."""

import pytest
import torch
from datasets import Dataset
from families import build, longest, sources
from simulated_device import SimTensor
from tiny_language_models import tiny_causal_lm, tiny_tokenizer
from tiny_runs import PROMPTS, contrast, redness, tiny_pipeline, tiny_trainer, weights_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from trl_apex import APEXGRPOConfig, APEXGRPOTrainer, APEXTrainer, DiffusionGRPOTrainer
from trl_apex.aggregation.options import RULES
from trl_apex.diffusion.families import load_policy
from trl_apex.evaluation.run import run_evaluation


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    def make(cls=APEXTrainer, on_cpu=False, reward_funcs=(redness, contrast), **options):
        if on_cpu:
            monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
        values = {"num_inference_steps": 3, "guidance_scale": 2.0, "max_steps": 2, "use_cpu": on_cpu, **options}
        trainer = tiny_trainer(tmp_path / f"run-{on_cpu}", reward_funcs, cls, evaluate=True, **values)
        assert trainer.accelerator.device.type == ("cpu" if on_cpu else "sim")
        return trainer

    return make


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in weights_of(trainer).items()}


def train(trainer) -> None:
    """All weights stay on the device, and some change."""
    start = weights(trainer)
    trainer.train()
    assert all(p.device == trainer.accelerator.device for p in trainer.model.parameters())
    assert any(not torch.equal(start[name], value) for name, value in weights(trainer).items())


def train_as_on_the_cpu(make_trainer, *arguments, rel: float = 1e-7, **options) -> None:
    """The same weights to 7 digits, and the same logged numbers."""
    trainer = make_trainer(*arguments, **options)
    train(trainer)
    other = make_trainer(*arguments, **options, on_cpu=True)
    train(other)
    torch.testing.assert_close(weights(trainer), weights(other), rtol=1e-7, atol=5e-8)
    for ours, theirs in zip(trainer.state.log_history, other.state.log_history, strict=True):
        shared = {key for key in ours if "time" not in key and "per_second" not in key}
        assert {k: ours[k] for k in shared} == pytest.approx({k: theirs[k] for k in shared}, rel=rel, nan_ok=True)


@pytest.fixture(autouse=True)
def same_attention():
    """PyTorch picks another kernel on the CPU than on a device in Python; this one both have."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.parametrize("cls", [DiffusionGRPOTrainer, APEXTrainer])
def test_two_updates_give_the_numbers_of_the_cpu(make_trainer, cls):
    train_as_on_the_cpu(make_trainer, cls, log_completions=True)


@pytest.mark.parametrize(("cls", "weights"), [(APEXTrainer, "lora"), (DiffusionGRPOTrainer, "full")])
@pytest.mark.parametrize("loss_type", ["awm", "nft", "fpo"])
def test_losses_on_final_latents_give_the_numbers_of_the_cpu(make_trainer, loss_type, cls, weights):
    """Two updates on one rollout, with a penalty."""
    options = {"loss_type": loss_type, "guidance_scale": None, "timesteps_per_image": 1, "num_iterations": 2}
    if weights == "full":
        options |= {"lora": None, "learning_rate": 1e-4, "offload_reference": True}
    train_as_on_the_cpu(make_trainer, cls, beta=0.1, num_inference_steps=2, rel=1e-5, **options)


def test_all_weights_with_a_reference_that_waits_on_the_cpu(make_trainer):
    options = {"lora": None, "beta": 0.1, "offload_reference": True, "learning_rate": 1e-4}
    train_as_on_the_cpu(make_trainer, rel=1e-5, **options)  # some kernels round otherwise


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


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains(make_trainer, rule):
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_steps": 1}
    train(make_trainer(multi_objective_aggregation=rule, **options))


PROBE = {"gradient_probe": True, "probe_every": 1}


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1, "num_iterations": 2},
        {**PROBE, "aggregation_options": {"conflict_source": "gradient"}},
        {**PROBE, "aggregation_options": {"conflict_source": "population"}, "beta": 0.1},
        {**PROBE, "loss_type": "nft", "guidance_scale": None, "timesteps_per_image": 1},
        {"gradient_checkpointing": True, "reward_overlap": False, "rollout_batch_size": 3},
        {"transition": "cps", "sde_window_size": 1, "sde_window_range": (1, 2), "share_initial_noise": True},
    ],
    ids=["kl-of-an-adapter", "probe", "population", "probe-nft", "checkpointing", "window"],
)
def test_options_of_training(make_trainer, options):
    train(make_trainer(**options))


def test_an_evaluation_before_training_an_average_a_checkpoint_a_resume_and_an_export(make_trainer, tmp_path):
    options = {"ema_decay": 0.5, "save_strategy": "steps", "save_steps": 1, "log_completions": True}
    options["num_inference_steps"] = 2  # one update an iteration
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
    torch.testing.assert_close(weights(resumed), whole, rtol=1e-6, atol=1e-7)

    pipeline, prompts = tiny_pipeline(), Dataset.from_dict({"prompt": PROMPTS[:2]})
    sizes = {"num_inference_steps": 2, "max_sequence_length": 12, "report": lambda line: None}
    folders = str(tmp_path / "adapter"), tmp_path / "evaluation"
    result = run_evaluation(pipeline, folders[0], prompts, [redness, contrast], folders[1], **sizes)
    assert pipeline.transformer.device == trainer.accelerator.device
    assert "redness" in str(result)


@pytest.mark.parametrize(
    "family",
    [
        "sd3.5-medium",
        "flux",
        "flux-kontext",
        "flux2-klein",
        "qwen-image",
        "qwen-image-edit",
        "z-image",
        "sd1.5",
        "sdxl",
    ],
)
def test_every_family_trains_and_evaluates(make_trainer, family, monkeypatch):
    if "flux" in family:  # diffusers knows by name which devices have no float64
        monkeypatch.setattr(SimTensor, "has_float64", True)
    columns = {"source_image": sources() * (len(PROMPTS) // 2)} if load_policy(build(family)).edits else None
    options = {"max_steps": 1, "height": 16, "width": 16, "max_sequence_length": longest(family)}
    trainer = make_trainer(pipeline=build(family), columns=columns, **options)
    train(trainer)
    assert trainer.evaluate()["eval_reward"] > 0


def test_a_language_model_trains(tmp_path):
    def share_of_a(completions, **kwargs):
        return [text.split().count("a") / 8 for text in completions]

    def share_of_b(completions, **kwargs):
        return [text.split().count("b") / 80 for text in completions]

    arguments = APEXGRPOConfig(
        output_dir=str(tmp_path), bf16=False, per_device_train_batch_size=8, num_generations=4, max_steps=2,
        max_completion_length=6, learning_rate=3e-3, disable_tqdm=True, report_to="none", save_strategy="no",
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": ["say c d", "say e f"] * 4})
    rewards = [share_of_a, share_of_b]
    trainer = APEXGRPOTrainer(tiny_causal_lm(), rewards, arguments, prompts, processing_class=tiny_tokenizer())
    assert trainer.accelerator.device.type == "sim"
    train(trainer)
