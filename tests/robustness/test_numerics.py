"""Extreme sizes, scales and precisions: everything stays finite, and the ratio starts at one."""

import math
import warnings

import pytest
import torch
from tiny_runs import PROMPTS, contrast, history, redness, tiny_pipeline, tiny_trainer, weights_of

from trl_apex import DiffusionGRPOTrainer
from trl_apex.trainers.manifest import last_valid


def assert_sound(trainer, updates: int = 1) -> None:
    """Finite weights and logs, something learnt, and a ratio of one in the first update of each iteration."""
    assert all(bool(p.isfinite().all()) for p in weights_of(trainer).values())
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            assert not isinstance(value, float) or math.isfinite(value), f"{key} is {value} at step {entry['step']}"
    deviations = history(trainer, "ratio/max_deviation")
    assert deviations and max(deviations[::updates]) < 1e-5
    assert max(history(trainer, "grad_norm")) > 0


def run(folder, rewards=(redness, contrast), **overrides):
    trainer = tiny_trainer(folder, rewards, **{"max_steps": 2, **overrides})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    return trainer


def scaled(factor: float, name: str = "huge"):
    def reward(images, **others):
        return [factor * value for value in redness(images)]

    reward.__name__ = name
    return reward


def constant(images, **others):
    return [7.0] * len(images)


def at(phase: str, values: dict[str, object], sample: bool):
    return pytest.param(values, id=phase, marks=() if sample else pytest.mark.slow)


SIXTEEN = [scaled(10.0 ** (k - 8), f"objective_{k}") for k in range(16)]
CASES = [
    at("1e30", {"rewards": (scaled(1e30), contrast)}, True),
    at("1e-30", {"rewards": (scaled(1e-30), contrast)}, False),
    at("opposed_at_1e30", {"rewards": (scaled(1e30), scaled(-1e30, "opposed"), contrast)}, False),
    at("constant", {"rewards": (constant, contrast)}, False),
    at("sixteen_objectives", {"rewards": SIXTEEN}, False),
    at("one_pair", {"generation_batch_size": 2, "per_device_train_batch_size": 2}, False),
    at("no_guidance", {"guidance_scale": 0.0}, False),
    at("guidance_20", {"guidance_scale": 20.0}, False),
    at("one_trained_step", {"num_inference_steps": 2}, False),
    at("bf16", {"bf16": True}, False),
    at("learning_rate_0", {"learning_rate": 0.0}, False),
    at("noise_level_5", {"noise_level": 5.0}, False),
]


@pytest.mark.parametrize("values", CASES)
def test_everything_stays_finite(values, tmp_path):
    assert_sound(run(tmp_path, **values))


@pytest.mark.slow
def test_a_hundred_steps(tmp_path):
    trainer = run(tmp_path, num_inference_steps=100, gradient_accumulation_steps=99, max_steps=1)
    assert trainer.updates_per_iteration == 1
    assert_sound(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["sum_then_normalize", "normalize_then_sum"])
def test_static_rules_learn_from_huge_rewards(rule, tmp_path):
    options = {"cls": DiffusionGRPOTrainer, "multi_objective_aggregation": rule}
    assert_sound(run(tmp_path, (scaled(1e30), contrast), **options))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model(dtype, tmp_path):
    pipeline = tiny_pipeline()
    pipeline.transformer.to(dtype)
    trainer = run(tmp_path, pipeline=pipeline)
    assert {p.dtype for p in weights_of(trainer).values()} == {torch.float32}
    assert_sound(trainer)


@pytest.mark.slow
def test_constant_rewards_alone_leave_the_weights_alone(tmp_path):
    trainer = tiny_trainer(tmp_path, [constant], max_steps=3)
    before = weights_of(trainer)
    trainer.train()
    assert all(torch.equal(before[name], value) for name, value in weights_of(trainer).items())
    assert history(trainer, "skipped_updates/dead") == [1.0] * 3


def test_what_is_not_a_number_stops_the_run_with_the_step_and_the_images(tmp_path, caplog):
    def poison(images, **others):  # as a broken kernel would, from the fourth rollout on
        if trainer.state.global_step >= 3:
            with torch.no_grad():
                next(p for p in trainer.model.parameters() if p.requires_grad).fill_(math.nan)
        return redness(images)

    trainer = tiny_trainer(tmp_path, [poison, contrast], max_steps=8, max_nonfinite_updates=2)
    message = r"2 updates in a row had non-finite gradients, the last of them update 5 \(image \d"
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert "Update 4 has non-finite gradients and is skipped (1 in a row): image " in caplog.text
    assert any(f"({prompt!r})" in caplog.text for prompt in PROMPTS)
    assert "at denoising step 0" in caplog.text and last_valid(tmp_path).name == "checkpoint-5"
