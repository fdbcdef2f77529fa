"""What bf16 must not round: averages of the weights, and the timesteps that the denoiser is told."""

import numpy as np
import pytest
from compare import largest_difference, movement
from diffusers import SD3Transformer2DModel
from engines import STAGE, environment
from precision import distance_to_the_reference, train_and_average
from processes import run
from safetensors.numpy import load_file

BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}


@pytest.mark.distributed
@pytest.mark.parametrize("engine, lora", [("zero2", False), ("zero3", True), ("fsdp2", False)])
def test_the_moving_average_keeps_what_bf16_would_round_away(engine, lora, tmp_path):
    folder, saved = str(tmp_path / "run"), str(tmp_path / "saved")
    options = {"lora": lora, "ema_decay": 0.99, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    env = environment(engine) | BF16
    whole = run(train_and_average, 2, env, output_dir=folder, save=saved, **options)[0]
    assert whole["engine"] == STAGE.get(engine, engine)

    def average():
        return load_file(f"{folder}/checkpoint-4/ema.safetensors")

    first = average()
    del first["optimization_step"]
    assert {weight.dtype for weight in first.values()} == {np.dtype("float32")}
    moved = movement(whole["first"], whole["exact"])
    assert 0 < moved < 0.1 * movement(whole["first"], whole["last"])
    assert movement(first, whole["exact"]) < 0.01 * moved
    if lora:
        published = load_file(f"{saved}/pytorch_lora_weights.safetensors")
        assert sum(w.astype("float64").sum() for w in published.values()) == pytest.approx(
            sum(w.astype("float64").sum() for w in first.values()), rel=1e-12
        )
    else:
        model = SD3Transformer2DModel.from_pretrained(f"{saved}/transformer")
        published = {name: weight.numpy() for name, weight in model.state_dict().items() if name in first}
        assert largest_difference(published, first) == 0.0
    run(train_and_average, 2, env, output_dir=folder, save=saved, resume=f"{folder}/checkpoint-2", **options)
    again = average()
    assert all(np.array_equal(again[name], first[name]) for name in first)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "engine, family",
    [("zero2", "sd3"), *(("fsdp2", f) for f in ("sd3", "flux", "flux2", "qwen-image", "z-image", "sdxl"))],
)
def test_timesteps_are_told_in_float32_and_training_starts_at_its_reference(engine, family, tmp_path):
    size = {"family": family, "height": 16, "width": 16}
    result = run(distance_to_the_reference, 2, environment(engine) | BF16, output_dir=str(tmp_path), **size)[0]
    assert result["engine"] == engine
    assert result["told"] == {"torch.float32"}
    assert result["distance"] < 1e-4 and result["kl"] < 1e-9
