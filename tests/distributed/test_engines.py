"""Every engine trains what DDP trains."""

import numpy as np
import pytest
from compare import assert_same_training, curve, largest_difference, movement
from engines import ENGINES, OTHERS, STAGE, environment
from faults import constant, train_with_a_bad_gradient
from processes import run
from training import red, train

# Two updates an iteration on two noise levels an image; no ratio near the clip, where rounding would decide.
FINAL_LATENTS = {
    "timesteps_per_image": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 4,
    "beta": 0.01,
}
FPO = {"loss_type": "fpo", "fpo_scale": 0.1, "epsilon": 1.0}  # the scale is a factor of the ratio's rounding


@pytest.mark.parametrize(
    "engine", [pytest.param(e, marks=pytest.mark.distributed if e == "zero3_offload" else ()) for e in OTHERS]
)
def test_an_engine_trains_an_adapter_as_ddp_does(engine, ddp, tmp_path):
    runs = run(train, 2, environment(engine), output_dir=str(tmp_path))
    assert [r["world"] for r in runs] == [2, 2]
    assert runs[0]["engine"] == STAGE.get(engine, engine)
    assert curve(runs[0], "ratio/max_deviation")[0] < 1e-6
    assert_same_training(runs[0], ddp[0], tolerance=1e-5)
    assert runs[0]["aggregator"] == runs[1]["aggregator"]
    assert largest_difference(runs[0]["weights"], runs[1]["weights"]) == 0.0


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_a_toy_reward_rises(engine, tmp_path):
    """The trained tiny pipeline learns redder images; three iterations see every prompt once."""
    options = {"rewards": [red], "trained": True, "max_steps": 9, "learning_rate": 4e-3}
    options |= {"generation_batch_size": 16, "per_device_train_batch_size": 8, "num_generations": 8}
    result = run(train, 2, environment(engine), output_dir=str(tmp_path), **options)[0]
    reward = curve(result, "rewards/red/mean")
    assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.02


@pytest.mark.distributed
@pytest.mark.parametrize("engine", OTHERS)
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"beta": 0.01, "num_iterations": 2},
        {"guidance_scale": 3.0, "gradient_accumulation_steps": 1, "max_steps": 3},
        *({"loss_type": loss, "anchor_decay": [0, 0.2, 0.9], **FINAL_LATENTS} for loss in ("awm", "nft")),
        {**FPO, **FINAL_LATENTS},
        {"loss_type": "nft", "target_movement": 1.0, **FINAL_LATENTS},  # out of reach: the rate grows
    ],
    ids=["checkpointing", "kl", "guidance-three-updates", "awm", "nft", "fpo", "step-size"],
)
def test_options_under_engines(engine, options, reference, tmp_path):
    result = run(train, 2, environment(engine), output_dir=str(tmp_path), **options)[0]
    assert result["engine"] == STAGE.get(engine, engine)
    assert_same_training(result, reference(**options)[0], tolerance=2e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
@pytest.mark.parametrize("family", ["flux2-klein", "qwen-image", "z-image"])
def test_families_with_one_language_model(family, engine, reference, tmp_path):
    options = {"family": family, "height": 16, "width": 16, "guidance_scale": 3.0}
    result = run(train, 2, environment(engine), output_dir=str(tmp_path), **options)[0]
    assert_same_training(result, reference(**options)[0], tolerance=2e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", OTHERS)
def test_kl_to_a_frozen_copy_of_all_weights(engine, reference, tmp_path):
    options = {"lora": False, "beta": 10.0, "max_steps": 3, "learning_rate": 1e-3}
    ddp = reference(**options)[0]
    result = run(train, 2, environment(engine), output_dir=str(tmp_path), **options)[0]
    assert_same_training(result, ddp, tolerance=1e-4)
    assert curve(result, "kl")[0] == 0.0 and curve(result, "kl")[2] > 0.0
    np.testing.assert_allclose(curve(result, "kl"), curve(ddp, "kl"), rtol=1e-2, atol=1e-9)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": False},
        {
            "loss_type": "nft",
            "timesteps_per_image": 2,
            "gradient_accumulation_steps": 2,
            "anchor_decay": [0, 0.3, 0.9],
        },
    ],
    ids=["lora", "full", "nft"],
)
@pytest.mark.parametrize("engine", OTHERS)
def test_the_gradient_probe_sees_the_same_conflict(engine, changes, reference, tmp_path):
    options = {"gradient_probe": True, "probe_every": 1, "aggregation_options": {"conflict_source": "gradient"}}
    options |= {"max_steps": 3, "probe_layers": [r"attn\.to_[qk]"], **changes}
    result = run(train, 2, environment(engine), output_dir=str(tmp_path), **options)[0]
    for ddp in (reference(**options)[0], reference(world=1, **options)[0]):
        assert_same_training(result, ddp, tolerance=2e-5)
        np.testing.assert_allclose(curve(result, "gradient_harmony"), curve(ddp, "gradient_harmony"), atol=1e-4)
        measured = [[entry["conflict/red/dark"] for entry in r["logs"][1:]] for r in (result, ddp)]
        np.testing.assert_allclose(*measured, atol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_updates_without_a_signal_leave_the_weights_alone(engine, reference, tmp_path):
    first = reference(max_steps=1, rewards=[constant])[0]
    second = run(train, 2, environment(engine), output_dir=str(tmp_path), max_steps=3, rewards=[constant])[0]
    assert movement(first["weights"], second["weights"]) == 0.0
    assert curve(second, "grad_norm") == [0.0, 0.0, 0.0]
    assert curve(second, "skipped_updates/dead") == [1.0, 1.0, 1.0]


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_updates_that_are_not_finite_are_left_out(engine, tmp_path):
    runs = run(train_with_a_bad_gradient, 2, environment(engine), output_dir=str(tmp_path), bad_rank=1, bad_step=1)
    assert runs[0]["finite"] and runs[0]["skipped"] == [0.0, 1.0, 0.0]
    assert runs[0]["moved"][0] > 0 and runs[0]["moved"][1] == 0 and runs[0]["moved"][2] > 0


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_update_that_overflows_in_half_precision_is_left_out(engine, precision, tmp_path):
    options = {precision: True, "bad_rank": 1, "bad_step": 1, "max_nonfinite_updates": 2 if precision == "bf16" else 1}
    result = run(train_with_a_bad_gradient, 2, environment(engine), output_dir=str(tmp_path), **options)[0]
    bad, none = [0.0, 1.0, 0.0], [None] * 3
    assert result["finite"] and result["moved"][1] == 0
    assert result["skipped"] == (bad if precision == "bf16" else [0.0] * 3)
    assert result["overflowed"] == (none if precision == "bf16" else bad)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_an_evaluation_before_training_makes_the_images_of_one_after(engine, tmp_path):
    options = {"evaluate": True, "evaluate_first": True, "eval_prompts": ["red"], "learning_rate": 0.0, "max_steps": 1}
    result = run(train, 2, environment(engine), output_dir=str(tmp_path), **options)[0]
    assert result["engine"] == STAGE.get(engine, engine)
    before, after = result["evaluation_before"], result["evaluation"]
    assert {k: v for k, v in before.items() if "rewards/" in k} == pytest.approx(
        {k: v for k, v in after.items() if "rewards/" in k}, rel=1e-6
    )
