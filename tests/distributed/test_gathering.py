"""Rollouts of engines that keep weights in parts: gathered once, or layer by layer."""

import pytest
from compare import assert_same_training, largest_difference
from engines import SHARDED, environment
from processes import run
from safetensors.numpy import load_file
from training import BLOCKS, train

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("engine", SHARDED)
def test_layerwise_rollout_equals_the_gathered_one(engine, ddp, tmp_path):
    result = run(train, 2, environment(engine), output_dir=str(tmp_path), gather_for_rollout=False)[0]
    assert_same_training(result, ddp[0], tolerance=1e-5)


@pytest.mark.parametrize("engine", ("zero3", "fsdp2"))
def test_weights_are_gathered_once_a_rollout_or_in_each_forward(engine, tmp_path):
    """The all-gathers of the second rollout: as many for four steps as for eight, or twice as many for the layers."""
    counted = {}
    for gather in (True, False):
        for steps in (4, 8):
            options = {"gather_for_rollout": gather, "num_inference_steps": steps, "sde_window_size": 3}
            options |= {"sde_window_range": [0, 3], "lora": False, "count_gathers": True}
            result = run(train, 2, environment(engine), output_dir=str(tmp_path), **options)[0]
            counted[gather, steps] = result["gathers"][1]
    assert counted[True, 4] == counted[True, 8]
    layers = counted[False, 8] - counted[False, 4]  # of four more forwards
    assert layers >= 4 * BLOCKS
    assert counted[False, 8] > counted[True, 8]


@pytest.mark.parametrize("engine", ("zero3", "fsdp2"))
def test_copies_of_all_weights_take_their_place_in_layerwise_rollouts(engine, reference, tmp_path):
    """FSDP2 leaves the weights of its root whole after such a rollout."""
    options = {"lora": False, "ema_decay": 0.5, "gather_for_rollout": False, "save_strategy": "steps", "save_steps": 1}
    options |= {"loss_type": "nft", "timesteps_per_image": 3, "anchor_decay": [0, 0.3, 0.9]}
    options |= {"evaluate": True, "eval_prompts": ["red"]}
    result, ddp = run(train, 2, environment(engine), output_dir=str(tmp_path), **options)[0], reference(**options)[0]
    assert_same_training(result, ddp, tolerance=1e-5)
    for name in ("ema", "anchor"):
        ours, theirs = (load_file(f"{r['output_dir']}/checkpoint-2/{name}.safetensors") for r in (result, ddp))
        assert largest_difference(ours, theirs) < 1e-5
    assert result["evaluation"]["eval_reward"] == pytest.approx(ddp["evaluation"]["eval_reward"], abs=1e-5)
