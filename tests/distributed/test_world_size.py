"""The number of processes must not change what is learned."""

import numpy as np
import pytest
from compare import assert_same_training, curve, largest_difference
from engines import environment
from processes import run
from training import PROMPTS, dark, red, red_circles, train

from trl_apex.rewards import RankReward

FINAL_LATENTS = {"timesteps_per_image": 2, "gradient_accumulation_steps": 1}


@pytest.fixture(scope="module")
def single(reference):
    return reference(world=1)[0]


def test_two_processes_learn_what_one_does(single, ddp):
    assert [r["world"] for r in ddp] == [2, 2] and ddp[0]["engine"] == "ddp" and single["world"] == 1
    first, alone = ddp[0]["iterations"][0], single["iterations"][0]
    np.testing.assert_allclose(first["rewards"], alone["rewards"], atol=1e-6)
    np.testing.assert_allclose(first["advantages"], alone["advantages"], atol=1e-4)  # divided by deviations of 0.01
    assert first["priorities"] == pytest.approx(alone["priorities"], abs=1e-6)
    assert_same_training(ddp[0], single, tolerance=1e-5)


def test_all_ranks_hold_the_same_state(ddp):
    assert ddp[0]["aggregator"] == ddp[1]["aggregator"]
    assert largest_difference(ddp[0]["weights"], ddp[1]["weights"]) == 0.0
    assert len({tuple(map(tuple, r["iterations"][0]["rewards"])) for r in ddp}) == 1


def test_the_ratio_is_one_on_the_first_update(ddp):
    assert curve(ddp[0], "ratio/max_deviation")[0] < 1e-6


@pytest.mark.distributed
def test_the_first_rollout_is_the_same_where_the_forwards_have_the_same_size(tmp_path):
    """What differs between numbers of processes is the order of float additions in kernels, nothing else."""
    options = {"max_steps": 1, "rollout_batch_size": 2, "output_dir": str(tmp_path)}
    first, *others = (run(train, world, environment("ddp", world), **options)[0] for world in (1, 2, 4))
    theirs = first["iterations"][0]
    for other in others:
        mine = other["iterations"][0]
        np.testing.assert_allclose(mine["rewards"], theirs["rewards"], rtol=1e-6)
        np.testing.assert_allclose(mine["advantages"], theirs["advantages"], atol=1e-4)
        assert mine["priorities"] == pytest.approx(theirs["priorities"], abs=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "share_initial_noise": True,
            "sde_window_size": 2,
            "num_inference_steps": 5,
            "gradient_accumulation_steps": 2,
        },
        {"num_iterations": 2, "beta": 0.01, "epsilon": 1e-3},  # no ratio near the clip, where rounding would decide
        {"gradient_accumulation_steps": 1, "max_steps": 6},
        {"loss_type": "fpo", "fpo_scale": 0.1, "epsilon": 1.0, **FINAL_LATENTS},
        {"loss_type": "nft", "beta": 0.1, "target_movement": 1.0, "anchor_decay": [0, 0.2, 0.9], **FINAL_LATENTS},
        {"loss_type": "awm", "anchor_decay": [0, 0.2, 0.9], **FINAL_LATENTS},
        {"rewards": (red, RankReward(dark)), "prompt_mix": {"red": 1, "blue": 1}},
        {
            "columns": {"height": [16, 16, 16, 24, 24, 24], "width": [16, 16, 16, 32, 32, 32]},
            "rewards": (red, RankReward(dark)),
        },
        {"rewards": (red_circles,), "dead_prompt_rate": 0.2, "max_steps": 6},
    ],
    ids=[
        "plain",
        "shared-noise-window",
        "two-passes-and-kl",
        "three-updates",
        "fpo",
        "nft",
        "awm",
        "ranks-of-mixed-prompts",
        "several-sizes",
        "dead-prompts",
    ],
)
def test_one_two_and_four_processes_agree(tmp_path, options):
    """Four processes hold two images each, so that every group of four is split over ranks."""
    options = {"max_steps": 4, "learning_rate": 3e-4, **options}
    runs = [
        run(train, world, environment("ddp", world), output_dir=str(tmp_path / str(world)), **options)[0]
        for world in (1, 2, 4)
    ]
    assert [r["world"] for r in runs] == [1, 2, 4]
    for other in runs[1:]:
        assert_same_training(other, runs[0], tolerance=1e-4)
        for mine, theirs in zip(other["iterations"], runs[0]["iterations"], strict=True):
            assert mine["priorities"] == pytest.approx(theirs["priorities"], abs=1e-4)
        # With accumulation it is the mean over micro-batches, which are dealt otherwise.
        if options.get("gradient_accumulation_steps") == 1:
            largest = [curve(each, "ratio/max_deviation") for each in (other, runs[0])]
            np.testing.assert_allclose(*largest, atol=2e-6)
        assert largest_difference(other["weights"], runs[0]["weights"]) < 1e-5


@pytest.mark.distributed
def test_uneven_evaluation_counts_every_prompt_once(tmp_path):
    prompts = PROMPTS[:5]  # two processes: one of them has a prompt less
    options = {"max_steps": 1, "evaluate": True, "eval_prompts": prompts}
    options |= {"per_device_eval_batch_size": 2, "eval_num_inference_steps": 3}
    alone, two = (run(train, w, environment("ddp", w), output_dir=str(tmp_path), **options) for w in (1, 2))
    assert [(row, prompt) for row, prompt, _ in two[0]["evaluated"]] == list(enumerate(prompts))
    assert two[0]["evaluated"] == two[1]["evaluated"]
    for name in ("eval_rewards/red/mean", "eval_rewards/dark/mean"):
        assert two[0]["evaluation"][name] == pytest.approx(alone[0]["evaluation"][name], abs=1e-4)
        assert two[0]["evaluation"][name] == two[1]["evaluation"][name]
