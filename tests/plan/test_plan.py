"""Plans: pinned to published parameter counts, to sums by hand, and to a counted training iteration."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_apex import APEXConfig, DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_apex.cli import main
from trl_apex.plan import PlanSettings, count_passes, estimator, load_shapes, plan_text
from trl_apex.plan.fit import check_fit, remedy
from trl_apex.plan.measure import peak_bytes, saved_bytes
from trl_apex.plan.memory import measure_rows, state_bytes
from trl_apex.plan.settings import settings_from_config

sys.path.insert(0, str(Path(__file__).parents[1] / "policy"))
from families import FAMILIES, build

ALL_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@pytest.fixture(scope="module")
def medium():
    return load_shapes("sd3.5-medium")


@pytest.fixture(scope="module")
def estimate(medium):
    return estimator(medium)[0]


@pytest.fixture(scope="module")
def large():
    return load_shapes("stabilityai/stable-diffusion-3.5-large")


# Parameters


def test_parameters_of_sd35(medium, large):
    assert round(medium.parameters / 1e6) == 2243 and round(medium.buffer / 1e6) == 226
    assert round(large.parameters / 1e6) == 8057 and round(large.buffer / 1e6) == 90
    assert round(medium.adapter_parameters(32, ALL_ATTENTION) / 1e6, 1) == 23.9
    assert round(large.adapter_parameters(32) / 1e6, 1) == 47.2
    # The family's own targets leave the second attention of dual blocks alone, as their names say.
    assert round(medium.adapter_parameters(32) / 1e6, 1) == 18.8
    assert round(medium.vae / 1e6, 1) == 83.8
    assert [round(size / 1e6) for size in medium.encoders.values()] == [124, 695, 4762]


@pytest.mark.parametrize(
    ("name", "denoiser", "encoders"),
    [("flux.1-dev", 11_901.4, [123, 4762]), ("sd1.5", 859.5, [123]), ("sdxl", 2567.5, [123, 695])],
)
def test_parameters_of_other_models(name, denoiser, encoders):
    shapes = load_shapes(name)
    assert round(shapes.parameters / 1e6, 1) == denoiser
    assert [round(size / 1e6) for size in shapes.encoders.values()] == encoders


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_is_read_without_its_weights(name, tmp_path):
    pipeline = build(name)
    pipeline.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    shapes = load_shapes(str(tmp_path))
    denoiser = getattr(pipeline, shapes.policy.denoiser_name)
    assert shapes.parameters == sum(p.numel() for p in denoiser.parameters())
    assert shapes.vae == sum(p.numel() for p in pipeline.vae.parameters())
    for key, size in shapes.encoders.items():
        assert size == sum(p.numel() for p in getattr(pipeline, key).parameters())
    rows = measure_rows(shapes, PlanSettings(16, 16, lora_rank=2, max_sequence_length=12))
    assert rows.saved > rows.saved_checkpointed > 0 and rows.decode > 0 and rows.inference > 0
    adapted = get_peft_model(denoiser, LoraConfig(r=2, target_modules=list(shapes.policy.lora_targets)))
    assert shapes.adapter_parameters(2) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # by diffusers, of huggingface_hub
def test_names_that_lead_nowhere(medium):
    with pytest.raises(ValueError, match="a hub id that can be reached, or one of stabilityai/.*Found 'nobody/model'"):
        load_shapes("nobody/model")
    with pytest.raises(ValueError, match=r"Found none for \['nowhere'\]"):
        medium.adapter_parameters(4, ["attn.to_q", "nowhere"])


# Memory


@pytest.mark.parametrize(
    ("parameters", "expected"), [(2243e6, [35.9, 12.3, 8.4, 4.5]), (8057e6, [128.9, 44.3, 30.2, 16.1])]
)
def test_states_under_zero_with_eight_gpus(parameters, expected):
    found = [sum(state_bytes(int(parameters), 0, True, stage, 8).values()) / 1e9 for stage in range(4)]
    assert found == pytest.approx(expected, abs=0.051)
    adapter = state_bytes(int(23.9e6), int(parameters), True, 0, 8)
    assert adapter["weights"] == 2 * parameters + 4 * 23.9e6 and adapter["master + Adam"] == 8 * 23.9e6


@pytest.mark.parametrize(
    ("name", "pixels", "expected"),
    [
        ("medium", 512, (3.5, 0.11)),
        pytest.param("medium", 1024, (11.8, 0.37), marks=pytest.mark.slow),
        pytest.param("large", 512, (7.3, 0.27), marks=pytest.mark.slow),
        pytest.param("large", 1024, (23.9, 0.88), marks=pytest.mark.slow),
    ],
)
def test_activations_of_an_image(request, name, pixels, expected):
    shapes = request.getfixturevalue(name)
    rows = measure_rows(shapes, PlanSettings(pixels, pixels, lora_rank=0, zero_stage=1))  # bf16 without autocast
    assert round(rows.saved / 1e9, 1) == expected[0] and round(rows.saved_checkpointed / 1e9, 2) == expected[1]


def on_meta(module):
    return module.to("meta")


def test_activations_by_hand():
    model = on_meta(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)))
    data = torch.empty(5, 8, device="meta")
    # The input of each layer: 5 x 8, 5 x 16 (of GELU), 5 x 16 (of the second linear layer).
    assert saved_bytes(model, lambda: model(data)) == 4 * 5 * (8 + 16 + 16)
    # Autocast: a half-precision copy of the input instead of it, and all others in half precision; weights do not count.
    assert saved_bytes(model, lambda: model(data), torch.bfloat16) == 2 * 5 * (8 + 16 + 16)
    model[0].requires_grad_(False)
    assert saved_bytes(model, lambda: model(data)) == 4 * 5 * 16  # the second layer's input alone
    # 5 x 16 before and after GELU at one time, then 5 x 16 and 5 x 4.
    assert peak_bytes(model, lambda: model(data)) == 4 * 5 * (16 + 16)


def test_attention_keeps_no_matrix_of_pairs():
    query = torch.empty(2, 3, 50, 4, device="meta", requires_grad=True)
    other = torch.empty(2, 3, 70, 4, device="meta")
    saved = saved_bytes(nn.Identity(), lambda: F.scaled_dot_product_attention(query, other, other))
    assert saved == 4 * (2 * 3 * 50 * 4 * 2 + 2 * 3 * 70 * 4 + 2 * 3 * 50)


def test_meta_measure_equals_real_tensors():
    """The same hooks on real tensors of a real pipeline count the same bytes."""
    real, shapes = build("sd3.5-medium"), {}
    for device in ("cpu", "meta"):
        model = real.transformer.to(device)
        inputs = {
            "hidden_states": torch.zeros(3, 16, 8, 8, device=device),
            "encoder_hidden_states": torch.zeros(3, 24, 32, device=device),
            "pooled_projections": torch.zeros(3, 32, device=device),
            "timestep": torch.zeros(3, device=device),
        }
        shapes[device] = saved_bytes(model, lambda m=model, i=inputs: m(**i, return_dict=False)[0])
    assert shapes["cpu"] == shapes["meta"] > 0


# Compute


def redness(completions, images, **kwargs):
    return images[:, 0].mean((1, 2)).tolist()


class Counting:
    """Counts the denoiser's forward and backward passes, and those of its first block."""

    def __init__(self, denoiser):
        self.forwards, self.backwards, self.blocks = [], [], []
        denoiser.register_forward_hook(self.seen, with_kwargs=True)
        blocks = getattr(denoiser, "transformer_blocks", None) or denoiser.down_blocks
        blocks[0].register_forward_pre_hook(lambda *_: self.blocks.append(1))  # a recomputation stops half-way

    def seen(self, module, args, kwargs, output):
        rows = len(output[0])
        self.forwards.append((rows, torch.is_grad_enabled()))
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: self.backwards.append(rows))


PLAIN = {"num_inference_steps": 4, "guidance_scale": 1.0}
SHARED = {"num_inference_steps": 6, "sde_window_size": 2, "sde_window_range": [3, 5], "share_initial_noise": True}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("sd3", PLAIN),
        ("sd3", {**PLAIN, "guidance_scale": 3.0, "beta": 0.1, "num_iterations": 2}),
        ("sd3", {**SHARED, "rollout_batch_size": 3, "guidance_scale": 2.0}),
        (
            "sd3",
            {**PLAIN, "timestep_batch_size": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        ),
        ("sd3", {**PLAIN, "activation_checkpointing": True}),
        ("flux", {**PLAIN, "guidance_scale": 3.0}),
        ("sd1.5", {**PLAIN, "guidance_scale": 3.0}),
    ],
)
def test_passes_equal_those_of_a_training_iteration(name, overrides, tmp_path):
    values = {
        "output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 8, "num_generations": 4,
        "generation_batch_size": 8, "gradient_accumulation_steps": 1, "height": 16, "width": 16, "save_strategy": "no",
        "max_sequence_length": 12, "disable_tqdm": True, "max_steps": 1, "activation_checkpointing": False,
    }  # fmt: skip
    config = DiffusionGRPOConfig(**{**values, **overrides})
    data = Dataset.from_dict({"prompt": ['a red circle with "CAT"', 'a blue star with "HUT"']})
    trainer = DiffusionGRPOTrainer(build(name), redness, config, data, peft_config=LoraConfig(r=2))
    config.max_steps = trainer.updates_per_iteration
    settings = settings_from_config(config, trainer.policy.default_size(), lora_rank=2)
    expected = count_passes(settings, trainer.policy.batched_guidance)
    counted = Counting(trainer.policy.denoiser)
    trainer.train()
    without, with_gradient = ([rows for rows, grad in counted.forwards if grad is wanted] for wanted in (False, True))
    assert len(with_gradient) == expected.update_calls == len(counted.backwards) == expected.backward_calls
    assert sum(with_gradient) == expected.update_rows == sum(counted.backwards) == expected.backward_rows
    assert len(without) == expected.rollout_calls + expected.reference_calls
    assert sum(without) == expected.rollout_rows + expected.reference_rows
    recomputed = len(counted.blocks) - len(counted.forwards)
    assert recomputed * settings.rows_per_forward == expected.recomputed_rows
    assert trainer.state.global_step == expected.updates
    if settings.share_noise:
        assert expected.rows_saved_by_sharing == 2 * 3 * (8 - 4)  # chunks of 3, 3 and 2 images hold 4 groups' images


# Refusals


def settings(**changes):
    values = {
        "samples": 64, "group": 8, "micro_batch": 8, "accumulation": 9, "rollout_batch": 64, "windows": (range(9),),
        "guidance": 4.5,
    }  # fmt: skip
    return PlanSettings(512, 512, **{**values, **changes})


def test_a_plan_that_cannot_fit_names_what_to_change(estimate):
    with pytest.raises(ValueError, match=r"(?s)must fit into 24 GB a GPU. Found .* GB during .*activations.* Set "):
        check_fit(settings(rollout_batch=4), 24, estimate)
    check_fit(settings(rollout_batch=4, checkpointing=True), 24, estimate)
    assert remedy(settings(rollout_batch=4, micro_batch=4, accumulation=18), 24, estimate).startswith(
        "Set gradient_checkpointing=true: then it takes "
    )
    assert remedy(settings(micro_batch=1, accumulation=72), 24, estimate).startswith("Set rollout_batch_size=32: ")
    both = remedy(settings(), 24, estimate)
    assert "gradient_checkpointing=true" in both and "rollout_batch_size=" in both and " and " in both
    full = settings(
        lora_rank=0, gpus=8, samples=512, checkpointing=True, micro_batch=1, accumulation=72, rollout_batch=8
    )
    assert remedy(full, 24, estimate).startswith("Set zero_stage=1: ")
    assert "lora_r=32" in remedy(settings(lora_rank=0), 24, estimate)
    assert "No setting makes it fit. Even with" in remedy(settings(), 6, estimate)


def test_parts_of_a_plan(estimate):
    base = settings(lora_rank=0, gpus=8, samples=512, zero_stage=2)
    plain, kl = estimate(base), estimate(base.but(kl=True))
    assert kl.always["reference"] == pytest.approx(4.5, abs=0.05)
    assert kl.peak == pytest.approx(plain.peak + 4.5, abs=0.05)
    assert "reference" not in estimate(base.but(kl=True, offload_reference=True)).always
    assert estimate(base.but(zero_stage=3)).phases["rollout"]["gathered weights"] == pytest.approx(
        4.5 * 7 / 8, abs=0.05
    )
    assert estimate(base.but(ema=True)).always["moving average"] == pytest.approx(4.5, abs=0.05)
    kept = estimate(base.but(unload_encoders=False)).always["text encoders"]
    assert kept == pytest.approx(9.5 + 1.4 + 0.25, abs=0.05)
    assert plain.phases["encoding prompts"]["text encoders"] == kept
    twice = estimate(base.but(micro_batch=16, accumulation=18)).phases["update"]["activations"]
    assert twice == pytest.approx(2 * plain.phases["update"]["activations"])
    assert estimate(base.but(rewards_gb=3)).total("update") == pytest.approx(plain.total("update") + 3)


def test_settings_that_cannot_run():
    with pytest.raises(ValueError, match="must be a multiple of their number. Found 64 and 6. Use e.g. 66"):
        settings(gpus=6)
    with pytest.raises(ValueError, match="split into whole updates"):
        settings(accumulation=7)
    with pytest.raises(ValueError, match="must be 0, 1, 2 or 3"):
        settings(zero_stage=4)


def test_the_text_of_a_plan(tmp_path):
    pipeline = build("sd3.5-medium")
    pipeline.save_pretrained(tmp_path / "pipeline")
    config = APEXConfig(
        output_dir=str(tmp_path), use_cpu=True, num_generations=8, generation_batch_size=64, num_inference_steps=10,
        sde_window_size=2, per_device_train_batch_size=8, gradient_accumulation_steps=8, height=16, width=16,
        max_sequence_length=12,
    )  # fmt: skip
    text = plan_text(str(tmp_path / "pipeline"), config, lora_rank=4, prompts=1000, gpu_memory_gb=2)
    for part in (
        "position buffer",
        "LoRA, ZeRO-3",
        "full, no ZeRO",
        "Peak",
        "rollout forwards",
        "2 optimizer step(s)",
    ):
        assert part in text
    with pytest.raises(ValueError, match="must fit into 0.5 GB"):
        plan_text(str(tmp_path / "pipeline"), config, lora_rank=4, gpu_memory_gb=0.5)


def test_the_command(tmp_path, capsys):
    build("flux").save_pretrained(tmp_path / "pipeline")
    run = [
        "plan", "--model", str(tmp_path / "pipeline"), "--output_dir", str(tmp_path / "run"), "--height", "16", "--width",
        "16", "--num_generations", "4", "--generation_batch_size", "16", "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "2", "--num_inference_steps", "5", "--lora_r", "4", "--gpus", "4", "--zero_stage", "2",
    ]  # fmt: skip
    assert main([*run, "--gpu_memory_gb", "24"]) == 0
    printed = capsys.readouterr().out
    assert "This run: LoRA r4, ZeRO-2, half precision, 4 GPU(s)" in printed
    assert "One iteration on each GPU: 4 images, 4 optimizer step(s)" in printed
    assert main([*run, "--gpu_memory_gb", "0.5"]) == 2
    assert "must fit into 0.5 GB a GPU" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("bf16: false\nguidance_scale: 1.0\n")
    assert main([*run, "--config", str(tmp_path / "run.yaml")]) == 0
    assert "LoRA r4, ZeRO-2, float32, 4 GPU(s)" in capsys.readouterr().out
