"""The trainers on a real accelerator, in float32, bfloat16 and float16: `pytest -m gpu`.

They are skipped without CUDA. `TRL_APEX_TEST_DEVICE=cpu` runs them on the CPU, as far as it has these types.
"""

import math
import os

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from peft import LoraConfig
from tiny_runs import contrast, redness, tiny_pipeline, tiny_trainer, weights_of

from trl_apex import APEXTrainer, DiffusionGRPOTrainer
from trl_apex.aggregation import RULES
from trl_apex.tiny.render import as_float, render_batch, sample_scenes
from trl_apex.tiny.world import tiny_rewards

DEVICE = os.environ.get("TRL_APEX_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS = {"grpo": DiffusionGRPOTrainer, "apex": APEXTrainer}
TYPES = {"float32": {"bf16": False}, "bf16": {"bf16": True}, "fp16": {"bf16": False, "fp16": True}}
LARGEST_RATIO = {"float32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}  # |ratio - 1| before the weights have moved
TWO_PASSES = {"num_iterations": 2}


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps the first device and precision of a process."""
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


@pytest.fixture
def make(tmp_path):
    def build(kind="apex", dtype="float32", peft=True, device=DEVICE, rewards=(redness, contrast), **options):
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        settings = {"per_device_train_batch_size": 8, "generation_batch_size": 8, "num_generations": 4, "max_steps": 2}
        settings |= {"num_inference_steps": 3, "guidance_scale": 2.0, "report_to": "none", **TYPES[dtype], **options}
        folder = settings.pop("output_dir", tmp_path / f"run-{device}")
        lora = LoraConfig(r=4, lora_alpha=12, init_lora_weights="gaussian") if peft else None
        settings |= {"use_cpu": device == "cpu", "evaluate": True, "lora": lora}
        trainer = tiny_trainer(folder, rewards, KINDS[kind], pipeline=tiny_pipeline(blocks=4), **settings)
        assert trainer.accelerator.device.type == device
        return trainer

    return build


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in weights_of(trainer).items()}


def trained(trainer) -> list[dict]:
    """Trains; the weights must move and stay finite. The logged lines."""
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_ratio_is_one_and_the_weights_move(make, kind, dtype, peft):
    lines = trained(make(kind, dtype, peft, max_steps=4))  # float16's first updates may overflow and be skipped
    assert lines[0]["ratio/max_deviation"] < LARGEST_RATIO[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_two_updates_in_float32_are_those_of_the_cpu(make, kind):
    on_device, on_cpu = make(kind), make(kind, device="cpu")
    here, there = trained(on_device), trained(on_cpu)
    assert here[0]["reward"] == pytest.approx(there[0]["reward"], rel=1e-3)
    assert here[0]["grad_norm"] == pytest.approx(there[0]["grad_norm"], rel=0.02)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains(make, rule):
    trained(make("apex", "bf16", multi_objective_aggregation=rule, max_steps=1))


@pytest.mark.parametrize(
    ("peft", "options"),
    [
        pytest.param(True, {"beta": 0.04, **TWO_PASSES}, id="KL"),
        pytest.param(False, {"beta": 0.04, "learning_rate": 1e-5, **TWO_PASSES}, id="KL to a copy"),
        pytest.param(False, {"beta": 0.04, "learning_rate": 1e-5, "offload_reference": True}, id="KL, offloaded copy"),
        pytest.param(True, {"ema_decay": 0.9}, id="EMA"),
        pytest.param(True, {"gradient_probe": True, "probe_every": 1}, id="probe"),
        pytest.param(True, {"gradient_checkpointing": True, "timestep_batch_size": 2}, id="checkpointing"),
        pytest.param(True, {"log_completions": True}, id="completions"),
        pytest.param(
            True, {"share_initial_noise": True, "sde_window_size": 1, "sde_window_range": [1, 2]}, id="window"
        ),
    ],
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_option_trains(make, dtype, peft, options):
    for line in trained(make("apex", dtype, peft, **options)):
        assert line.get("kl", 0.0) >= 0


def test_evaluation_before_and_after_training_differ(make):
    trainer = make("apex", "bf16", max_steps=4, learning_rate=1e-2)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_rewards/redness/mean"] != after["eval_rewards/redness/mean"]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(make, tmp_path, dtype):
    whole = make("apex", dtype, max_steps=4, save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "whole"))
    whole.train()
    resumed = make("apex", dtype, max_steps=4, output_dir=str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    # A device adds in any order, and Adam makes a whole step of a gradient that is nearly zero: compared on average.
    after = weights(resumed)
    differences = torch.cat([(after[name] - value).abs().flatten() for name, value in weights(whole).items()])
    assert differences.mean() < 1e-4
    resumed.save_model()
    assert (tmp_path / "resumed" / "pytorch_lora_weights.safetensors").is_file()


def test_the_rewards_score_as_on_the_cpu(make):
    scenes = sample_scenes(["CAT", "HUT"], 6, seed=0)
    images, prompts = as_float(render_batch(scenes)), [scene.prompt for scene in scenes]
    for on_device, on_cpu in list(zip(tiny_rewards(), tiny_rewards(), strict=True))[1:]:  # OCR has no network in torch
        if hasattr(on_cpu, "device"):
            on_cpu.device = torch.device("cpu")
        scores = on_device(prompts=prompts, completions=images)
        assert scores == pytest.approx(on_cpu(prompts=prompts, completions=images), rel=1e-2)


def test_the_tiny_world_trains_on_its_rewards(make):
    trainer = make("apex", "bf16", rewards=tiny_rewards()[1:], max_steps=1)
    (line,) = trained(trainer)
    assert all(math.isfinite(line[f"rewards/{name}/mean"]) for name in ("pickscore", "deqa", "aesthetic"))
