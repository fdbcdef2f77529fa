"""Plans: pinned to published parameter counts, to sums by hand, and to a counted training iteration."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_apex import APEXConfig, DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_apex.cli import main
from trl_apex.plan import (
    ENCODING,
    PlanSettings,
    check_fit,
    count_passes,
    load_shapes,
    measure_rows,
    memory,
    plan_text,
    remedy,
    reward_gb,
    state_bytes,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "diffusion"))
from families import FAMILIES, build

ALL_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@pytest.fixture(scope="module")
def medium():
    return load_shapes("sd3.5-medium")


@pytest.fixture(scope="module")
def estimate(medium):
    return partial(memory, medium)


@pytest.fixture(scope="module")
def large():
    return load_shapes("stabilityai/stable-diffusion-3.5-large")


def settings(lora_r=32, gpus=1, zero_stage=0, rewards_gb=0.0, **changes):
    """A run of 64 images a GPU at 512 pixels in half precision: 9 trained steps, one update."""
    values = {
        "output_dir": "unused", "use_cpu": True, "bf16": True, "height": 512, "width": 512, "num_generations": 8,
        "generation_batch_size": 64 * gpus, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 72,
        "num_inference_steps": 10, "rollout_batch_size": 8, "guidance_scale": 4.5,
    }  # fmt: skip
    config = DiffusionGRPOConfig(**values | changes)  # the CPU here, its bf16 as on a GPU
    return PlanSettings(config, lora_r, gpus=gpus, zero_stage=zero_stage, rewards_gb=rewards_gb)


# Parameters


@pytest.mark.parametrize(
    ("name", "denoiser", "encoders"),
    [
        ("sd3.5-medium", 2243.2, [124, 695, 4762]), ("sd3.5-large", 8056.6, [124, 695, 4762]),
        ("flux.1-dev", 11_901.4, [123, 4762]), ("flux.1-kontext-dev", 11_901.4, [123, 4762]), ("qwen-image", 20_430.4, [8292]),
        ("qwen-image-edit", 20_430.4, [8292]),
        ("flux.2-dev", 32_223.3, [24_011]), ("flux.2-klein-4b", 3875.5, [4022]), ("flux.2-klein-9b", 9078.6, [8191]),
        ("z-image", 6154.9, [4022]),
        ("sd1.5", 859.5, [123]), ("sdxl", 2567.5, [123, 695]),
    ],
)  # fmt: skip
def test_parameters_of_published_models(name, denoiser, encoders):
    shapes = load_shapes(name)
    assert round(shapes.parameters / 1e6, 1) == denoiser
    assert [round(size / 1e6) for size in shapes.encoders.values()] == encoders


def test_parameters_of_an_adapter(medium, large):
    assert round(medium.adapter_parameters(32, ALL_ATTENTION) / 1e6, 1) == 23.9
    assert round(large.adapter_parameters(32) / 1e6, 1) == 47.2
    # The family's own targets leave the second attention of dual blocks alone, as their names say.
    assert round(medium.adapter_parameters(32) / 1e6, 1) == 18.8
    sizes = medium.vae, medium.buffer, large.buffer
    assert [round(size / 1e6, 1) for size in sizes] == [83.8, 226.5, 89.7], "the VAE, and tables of positions"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_is_read_without_its_weights(name, tmp_path):
    pipeline = build(name)
    if name == "qwen-image-edit":
        pipeline.register_modules(processor=None)  # saved with torchvision only
    pipeline.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    shapes = load_shapes(str(tmp_path))
    denoiser = getattr(pipeline, shapes.policy.denoiser_name)
    assert shapes.parameters == sum(p.numel() for p in denoiser.parameters())
    assert shapes.vae == sum(p.numel() for p in pipeline.vae.parameters())
    for key, size in shapes.encoders.items():
        assert size == sum(p.numel() for p in getattr(pipeline, key).parameters())
    rows = measure_rows(shapes, settings(lora_r=2, height=16, width=16, max_sequence_length=12))
    assert rows.saved > rows.saved_checkpointed > 0 and rows.decode > 0 and rows.inference > 0
    adapted = get_peft_model(denoiser, LoraConfig(r=2, target_modules=list(shapes.policy.lora_targets)))
    assert shapes.adapter_parameters(2) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")  # by diffusers, of huggingface_hub
def test_names_that_lead_nowhere(medium):
    with pytest.raises(ValueError, match="a hub id that can be reached, or one of stabilityai/.*Found 'nobody/model'"):
        load_shapes("nobody/model")
    with pytest.raises(ValueError, match=r"Found none for \['nowhere'\]"):
        medium.adapter_parameters(4, ["attn.to_q", "nowhere"])
    with pytest.raises(ValueError, match=r"no folder of this name. Did you mean 'sd3.5-medium'\?"):
        load_shapes("sd35-medium")


# Memory


@pytest.mark.parametrize(
    ("parameters", "expected"), [(2243e6, [35.9, 12.3, 8.4, 4.5]), (8057e6, [128.9, 44.3, 30.2, 16.1])]
)
def test_states_under_zero_with_eight_gpus(parameters, expected):
    found = [sum(state_bytes(int(parameters), 0, True, stage, 8).values()) / 1e9 for stage in range(4)]
    assert found == pytest.approx(expected, abs=0.051)
    adapter = state_bytes(int(23.9e6), int(parameters), True, 0, 8)
    assert adapter["weights"] == 2 * parameters + 4 * 23.9e6 and adapter["master + Adam"] == 8 * 23.9e6


def test_activations_of_an_image_by_hand(medium, large):
    """Tensors a block x [tokens, width] x 2 bytes: 32 x 32 patches and 77 + 256 text tokens at 512 pixels, 64 x 64 at 1024."""
    small, big = (1024 + 333) * 1536 * 2, (4096 + 333) * 2432 * 2
    lora = measure_rows(medium, settings())
    assert lora.saved == 24 * 22 * small + 13 * 9 * 1024 * 1536 * 2 == pytest.approx(2.57e9, rel=0.01)
    assert lora.saved_checkpointed == 24 * small == pytest.approx(0.100e9, rel=0.01)
    assert lora.decode == 3 * 256 * 512 * 512 * 2 == pytest.approx(0.403e9, rel=0.01)
    assert lora.embedding == (333 * 4096 + 2048) * 2
    full = measure_rows(large, settings(lora_r=0, zero_stage=2, height=1024, width=1024))
    assert full.saved == 38 * 29 * big == pytest.approx(23.7e9, rel=0.01)
    plain = measure_rows(large, settings(lora_r=0, bf16=False, height=1024, width=1024))
    assert plain.saved == 2 * full.saved


def test_other_families_are_of_the_size_of_their_layers():
    flux = measure_rows(load_shapes("flux.1-dev"), settings())
    assert flux.saved_checkpointed == (19 + 38) * (1024 + 256) * 3072 * 2
    assert measure_rows(load_shapes("qwen-image"), settings()).saved == 60 * 22 * (1024 + 256) * 3072 * 2
    kontext = measure_rows(load_shapes("flux.1-kontext-dev"), settings())
    assert kontext.saved_checkpointed == (19 + 38) * (2 * 1024 + 256) * 3072 * 2, "the source is as large as the image"
    assert kontext.embedding == flux.embedding + 16 * 64 * 64 * 2
    klein = measure_rows(load_shapes("flux.2-klein-4b"), settings())
    assert klein.saved == (5 * 27 + 20 * 20) * (1024 + 256) * 3072 * 2 and klein.embedding == 256 * 3 * 2560 * 2
    assert measure_rows(load_shapes("z-image"), settings()).saved == (30 + 2) * 27 * (1024 + 256) * 3840 * 2
    xl = load_shapes("sdxl")
    small, large = measure_rows(xl, settings()), measure_rows(xl, settings(height=1024, width=1024))
    assert large.saved == 4 * small.saved and 1.5e9 < small.saved < 2.5e9
    assert small.saved > small.saved_checkpointed > 0


def test_a_default_run_of_sd35_medium_with_lora_fits_24_gb(medium, tmp_path):
    config = APEXConfig(output_dir=str(tmp_path), use_cpu=True, bf16=True)  # the CPU here, its bf16 as on a GPU
    rewards = ["ocr", "pickscore", "aesthetic", "clip_score"]
    assert reward_gb(rewards) == pytest.approx((986 + 428) * 4e-3)
    run = PlanSettings(config, rewards_gb=reward_gb(rewards))
    assert (run.size(medium.policy), run.chunk, config.activation_checkpointing) == ((512, 512), 8, True)
    found = memory(medium, run)
    weights = (
        2.2432 * 2 + 0.2265 * 2 + 0.0188 * 16 + 0.0838 * 2 + 5.656 + 1
    )  # base, table, adapter, VAE, rewards, context
    rows = 8 * 2  # per_device_train_batch_size and both branches of guidance
    update = rows * (2.57 / 24 + 0.100 + 0.0027) * 1.15
    assert found.total("update") == pytest.approx(weights + update, rel=0.03)
    assert found.total(ENCODING) == pytest.approx(11.16 + 0.17 + 1, abs=0.02)
    assert found.peak < 24
    check_fit(medium, run, 24)
    with pytest.raises(ValueError, match="gradient_checkpointing=true"):
        check_fit(medium, run.but(activation_checkpointing=False), 24)


# Compute


def redness(completions, images, **kwargs):
    return images[:, 0].mean((1, 2)).tolist()


class Counting:
    """Counts forward and backward passes of some models, by their rows."""

    def __init__(self, models):
        self.forwards, self.backwards = [], []
        for model in models:
            model.register_forward_hook(self.seen, with_kwargs=True)

    def seen(self, module, args, kwargs, output):
        rows = len(output[0])
        self.forwards.append((rows, torch.is_grad_enabled()))
        if output[0].requires_grad:
            output[0].register_hook(lambda gradient: self.backwards.append(rows))


PLAIN = {"num_inference_steps": 4, "guidance_scale": 1.0}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("sd3", {**PLAIN, "guidance_scale": 3.0, "beta": 0.1, "num_iterations": 2}),
        (
            "sd3",
            {**PLAIN, "sde_window_size": 2, "rollout_batch_size": 3, "guidance_scale": 2.0, "rollout_solver": "heun"},
        ),
        ("sd3", {**PLAIN, "beta": 0.1, "rollout_batch_size": 3, "num_iterations": 2, "lora": 0}),
        (
            "sd3",
            {**PLAIN, "timestep_batch_size": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        ),
        ("sd3", {**PLAIN, "loss_type": "nft", "updates_per_iteration": 2, "beta": 0.1, "lora": 0}),
        ("sd3", {**PLAIN, "loss_type": "awm", "timesteps_per_image": 2, "num_iterations": 2}),
        ("flux", {**PLAIN, "loss_type": "fpo", "num_iterations": 2, "beta": 0.1}),
        ("flux", {**PLAIN, "guidance_scale": 3.0}),
        ("sd1.5", {**PLAIN, "guidance_scale": 3.0}),
    ],
)
def test_passes_equal_those_of_a_training_iteration(name, overrides, tmp_path):
    values = {
        "output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 8, "num_generations": 4,
        "generation_batch_size": 8, "gradient_accumulation_steps": 1, "height": 16, "width": 16, "save_strategy": "no",
        "max_sequence_length": 12, "disable_tqdm": True, "max_steps": 1, "learning_rate": 1e-4,
    }  # fmt: skip
    rank = overrides.get("lora", 2)
    config = DiffusionGRPOConfig(**values | {key: value for key, value in overrides.items() if key != "lora"})
    data = Dataset.from_dict({"prompt": ['a red circle with "CAT"', 'a blue star with "HUT"']})
    peft_config = LoraConfig(r=rank) if rank else None
    trainer = DiffusionGRPOTrainer(build(name), redness, config, data, peft_config=peft_config)
    trainer.args.max_steps = trainer.updates_per_iteration
    expected = count_passes(PlanSettings(config, rank), trainer.policy.batched_guidance)
    counted = Counting([trainer.policy.denoiser, *([trainer._reference] if trainer._reference is not None else [])])
    trainer.train()
    without, with_gradient = ([rows for rows, grad in counted.forwards if grad is wanted] for wanted in (False, True))
    without = [rows for rows in without if rows > 1]  # the detectors look at one image beside
    assert (len(with_gradient), sum(with_gradient)) == expected["update forwards"]
    assert (len(counted.backwards), sum(counted.backwards)) == expected["backwards"]
    names = ("rollout forwards", "old policy forwards", "slow copy forwards", "reference forwards (KL)")
    apart = [expected.get(name, (0, 0)) for name in names]
    assert (len(without), sum(without)) == tuple(map(sum, zip(*apart, strict=True)))
    assert trainer.state.global_step * config.gradient_accumulation_steps == expected["backwards"][0]


def test_hours_by_arithmetic_or_from_a_measured_iteration(medium):
    run = settings(guidance_scale=1.0, max_steps=1000)  # 64 images x 10 steps; 9 of them trained, with checkpointing
    printed = plan_text(medium, run, gpu_tflops=312, utilization=0.5)
    seconds = 64 * (10 + 9 + 9 * 2) * 2.4426e12 / 156e12
    assert f"2,368 x 2.44 TFLOP\n  / (312 TFLOP/s x 50%, assumed) = {seconds:.0f} s, an estimate" in printed
    assert printed.endswith(f"1,000 iterations x {seconds:.1f} s = {seconds / 3.6:.2f} hours")
    full = plan_text(medium, run.but(lora_r=0, activation_checkpointing=False))
    assert "a backward costs 2 forward(s)" in full
    assert plan_text(medium, run, iteration_seconds=72).endswith("1,000 iterations x 72.0 s = 20.00 hours")
    assert plan_text(medium, run.but(max_steps=-1)).endswith("--num_prompts for the length of an epoch.")
    with pytest.raises(ValueError, match="must be above 0. Found 989.0, 0 and None"):
        plan_text(medium, run, utilization=0)


@pytest.mark.parametrize("name", ["qwen-image", "z-image", "sdxl", "flux.2-klein-4b", "flux.1-dev"])
def test_every_family_has_hours(name):
    shapes = load_shapes(name)
    assert 0.5e12 < shapes.forward_flops(512, 512, 128) < 2.5 * shapes.parameters * (1024 + 128)


def test_each_engine_has_its_peak_and_the_first_that_fits_is_named(medium):
    run = settings(lora_r=0, gpus=8, max_steps=4)
    peaks = [memory(medium, run.but(zero_stage=stage)).peak for stage in range(4)]
    (line,) = [line for line in plan_text(medium, run, gpu_memory_gb=40).splitlines() if "By engine" in line]
    assert [float(size) for size in re.findall(r"([\d.]+) GB[,.]", line)][:4] == [round(peak, 1) for peak in peaks]
    assert line.endswith("The first that fits 40 GB: ZeRO-1.") and peaks[0] > 40 > peaks[1]


# Refusals


FULL_RUN = {"lora_r": 0, "gradient_checkpointing": False}


@pytest.mark.parametrize(
    ("changes", "gpu_memory_gb", "change"),
    [
        ({"gradient_checkpointing": False}, 24, "Set gradient_checkpointing=true: then it "),
        (
            {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 9},
            24,
            "Set per_device_train_batch_size=",
        ),
        ({"lora_r": 0, "gpus": 8}, 40, "Set zero_stage=2: "),  # before an adapter or slower passes
        (FULL_RUN | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 576}, 40, "Set lora_r=32: "),
        (FULL_RUN, 24, r"(?=.*lora_r=32)(?=.*gradient_checkpointing=true)Set .* and "),
        ({"gradient_checkpointing": False}, 6, "No setting makes it fit. Even with"),
    ],
)
def test_a_plan_that_cannot_fit_names_what_to_change(medium, changes, gpu_memory_gb, change):
    text = remedy(medium, settings(**changes), gpu_memory_gb)
    assert re.match(change, text), text
    with pytest.raises(ValueError, match=r"must fit into \d+ GB a GPU. Found an estimate of .* during ") as caught:
        check_fit(medium, settings(**changes), gpu_memory_gb)
    assert str(caught.value).endswith(text)


def test_parts_of_a_plan(estimate):
    base = settings(lora_r=0, gpus=8, zero_stage=2)
    plain, kl = estimate(base), estimate(base.but(beta=0.1))
    assert kl.always["reference"] == pytest.approx(2.2432 * 2, abs=0.01)  # in half precision
    assert "reference" not in estimate(base.but(beta=0.1, offload_reference=True)).always
    offloaded = estimate(base.but(rewards_gb=5, offload_rewards=True))
    assert offloaded.phases["rollout"]["reward networks"] == 5 and "reward networks" not in offloaded.always
    assert estimate(base.but(lora_r=0, zero_stage=0, beta=0.1)).always["reference"] == kl.always["reference"]
    gathered = estimate(base.but(zero_stage=3)).phases["rollout"]["gathered weights"]
    assert gathered == pytest.approx(2.2432 * 2 * 7 / 8, abs=0.01)
    assert plain.always["DeepSpeed buckets"] == pytest.approx(2 * 0.5 * 2)
    assert estimate(base.but(ema_decay=0.9)).always["moving average"] == pytest.approx(2.2432 * 4, abs=0.01)
    nft = settings(lora_r=0, gpus=8, zero_stage=2, loss_type="nft", guidance_scale=1.0, timesteps_per_image=9)
    assert estimate(nft).always["slow copy (anchor)"] == pytest.approx(2.2432 * 4, abs=0.01)
    for without in (nft.but(offload_reference=True), nft.but(anchor_decay=[0, 0, 0]), base):
        assert "slow copy (anchor)" not in estimate(without).always
    kept = estimate(base.but(unload_text_encoders=False)).always["text encoders"]
    assert kept == pytest.approx(2 * (4.7623 + 0.6947 + 0.1237), abs=0.01)
    assert plain.phases[ENCODING]["text encoders"] == kept
    assert all(size > 0 for parts in plain.phases.values() for size in parts.values())
    double = estimate(base.but(generation_batch_size=1024, per_device_train_batch_size=16)).phases["update"]
    name = "activations (checkpointed)"
    assert double[name] == pytest.approx(2 * plain.phases["update"][name])
    assert estimate(base.but(rewards_gb=3)).total("update") == pytest.approx(plain.total("update") + 3)
    wide = base.but(rollout_batch_size=64)
    assert estimate(wide).phases["rollout"]["denoising"] == pytest.approx(8 * plain.phases["rollout"]["denoising"])
    assert "decoding, beyond denoising" not in estimate(wide).phases["rollout"]  # four images at a time, however many


@pytest.mark.parametrize(
    "config, stored",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.5625),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, 1.0),
    ],
)
def test_a_quantized_base_takes_its_bytes_and_lies_beside_the_encoders(estimate, config, stored):
    plain, small = estimate(settings()), estimate(settings(quantization_config=config))
    saved = plain.always["denoiser weights"] - small.always["denoiser weights"]
    assert saved == pytest.approx(2.2432 * (2 - stored), abs=0.01)
    beside = small.phases[ENCODING]["denoiser weights"]
    assert beside == pytest.approx(2.2432 * stored, abs=0.01) and "denoiser weights" not in plain.phases[ENCODING]


def test_the_inputs_that_the_gradient_probe_keeps_have_a_line(estimate):
    def kept(probe, **changes):
        run = settings(**changes)
        run.config.gradient_probe = probe  # a field of APEXConfig
        return estimate(run).phases["update"].get("gradient probe's inputs", 0.0)

    one = (1024 + 333) * 1536 * 4 * 4 / 1e9  # tokens, width, float32, inputs of q k v and output
    assert kept(True) == pytest.approx(8 * 2 * one)  # checkpointing: one block at a time
    assert kept(True, gradient_checkpointing=False) == pytest.approx(24 * 8 * 2 * one)
    assert kept(False) == kept(True, lora_r=0) == kept(True, zero_stage=2) == 0


def test_settings_that_cannot_run():
    with pytest.raises(ValueError, match="must be a multiple of their number. Found 64 and 6. Use e.g. 66"):
        settings(gpus=6, generation_batch_size=64)
    with pytest.raises(ValueError, match="split into whole updates"):
        settings(gradient_accumulation_steps=7)
    shared = settings(gpus=8, gradient_accumulation_steps=1, updates_per_iteration=2)
    assert shared.updates == 2, "whatever the number of GPUs"
    with pytest.raises(ValueError, match="must be 0, 1, 2 or 3"):
        settings(zero_stage=4)


def test_the_command(tmp_path, capsys):
    build("flux").save_pretrained(tmp_path / "pipeline")
    run = [
        "plan", "--model", str(tmp_path / "pipeline"), "--output_dir", str(tmp_path / "run"), "--height", "16", "--width",
        "16", "--num_generations", "4", "--generation_batch_size", "16", "--per_device_train_batch_size", "2",
        "--gradient_accumulation_steps", "2", "--num_inference_steps", "5", "--lora_r", "4", "--gpus", "4", "--zero_stage", "2",
        "--num_prompts", "1000",
    ]  # fmt: skip
    assert main([*run, "--gpu_memory_gb", "24"]) == 0
    printed = capsys.readouterr().out
    assert ". The first that fits 24 GB: DDP." in printed
    assert re.search(r"\n750 iterations x 0.0 s = 0.0\d hours", printed), "3 epochs of 1,000 prompts, 4 an iteration"
    assert "An estimate by arithmetic" in printed
    for part in ("Peak", "rollout forwards", "M trained x 2 bytes", "for 1,000", "LoRA adapter r4"):
        assert part in printed
    assert "This run: LoRA r4, ZeRO-2, half precision, 4 GPU(s)" in printed
    assert "Before training, on all GPUs together: one image each of 128 prompts" in printed
    assert "One iteration on each GPU: 4 images, 4 optimizer step(s)" in printed
    assert main([*run, "--gpu_memory_gb", "0.5"]) == 2
    assert "must fit into 0.5 GB a GPU" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("bf16: false\nguidance_scale: 1.0\n")
    assert main([*run, "--config", str(tmp_path / "run.yaml")]) == 0
    assert "LoRA r4, ZeRO-2, float32, 4 GPU(s)" in capsys.readouterr().out
