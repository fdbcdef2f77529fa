"""Warnings for runs that go on and learn nothing."""

import copy
import logging

import pytest
import torch
from toy_rewards import contrast, redness

from trl_apex import APEXTrainer


@pytest.fixture
def build(pipeline, dataset, lora, make_args):
    def make(rewards=(redness, contrast), change=None, cls=APEXTrainer, **overrides):
        pipe = copy.deepcopy(pipeline)
        if change is not None:
            change(pipe)
        args = make_args(**{"warmup_iterations": 0, **overrides})
        return cls(pipe, list(rewards), args, dataset, peft_config=copy.copy(lora))

    return make


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def constant(prompts, **kwargs):
    return [1.0] * len(prompts)


class SamplesWithAnOldCopy(APEXTrainer):
    """A trainer whose updates never reach its rollouts."""

    def _rollout_model(self):
        if not hasattr(self, "_old"):
            self._old = copy.deepcopy(self.model)
        return self._old


def test_a_sound_run_has_numbers_and_no_warning(build, caplog):
    with caplog.at_level(logging.WARNING, "trl_apex"):
        trainer = build(max_steps=6)
        trainer.train()
    assert not caplog.messages
    change = logged(trainer, "velocity_change")
    assert len(change) == 2 and all(0 < value < 0.5 for value in change)
    assert logged(trainer, "ratio/first_update_deviation") == [0.0] * 3
    for name in ("mean_pixel", "latent_rms", "velocity_rms"):
        first, *later = logged(trainer, f"drift/{name}")
        assert first == 0 and all(value != 0 for value in later)
    assert logged(trainer, "dead_step_rate") == [0.0] * 6


def test_an_update_that_does_not_reach_the_rollout_is_named_once_also_after_a_resume(build, caplog):
    saving = {"save_strategy": "steps", "save_steps": 2}
    build(max_steps=2, **saving).train()
    with caplog.at_level(logging.WARNING, "trl_apex"):
        trainer = build(cls=SamplesWithAnOldCopy, max_steps=8, **saving)
        trainer.train(resume_from_checkpoint=True)
    named = [message for message in caplog.messages if "does not see the update" in message]
    assert len(named) == 1 and logged(trainer, "velocity_change")[-1] == 0


def test_numbers_go_on_over_a_resume(build):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = build(max_steps=8, **saving)
    whole.train()
    resumed = build(max_steps=8, **saving)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    for key in (
        "velocity_change",
        "drift/lowest/redness",
        "drift/mean_pixel",
        "drift/latent_rms",
        "drift/velocity_rms",
    ):
        assert logged(resumed, key) == logged(whole, key) != []


def drop(pipe):
    pipe.transformer.transformer_blocks[0].attn.to_out[1].p = 0.3


@pytest.mark.parametrize("disabled", [False, True])
def test_dropout_is_named_unless_it_is_disabled(build, caplog, disabled):
    with caplog.at_level(logging.WARNING, "trl_apex"):
        trainer = build(change=drop, max_steps=2, disable_dropout=disabled)
        trainer.train()
    (deviation,) = logged(trainer, "ratio/first_update_deviation")
    if disabled:
        assert deviation == 0 and not caplog.messages
    else:
        (message,) = caplog.messages
        assert deviation > 1e-3 and "Dropout is active in" in message and "guidance_scale=1" in message
        assert "epsilon=0.0001" in message and "precision 'no'" in message


def test_iterations_without_advantages_are_counted_and_named(build, caplog):
    with caplog.at_level(logging.WARNING, "trl_apex.trainers.detectors"):
        trainer = build([constant], max_steps=10)
        trainer.train()
    (message,) = caplog.messages
    assert "In 4 of the last 4 iterations every advantage was 0" in message
    assert logged(trainer, "dead_step_rate") == [1.0] * 10 and set(logged(trainer, "velocity_change")) == {0.0}


def test_images_that_drift_are_named_once(build, caplog):
    trainer = build(max_steps=6)

    def brighten(images, trainer_state, **kwargs):
        with torch.no_grad():
            trainer.policy.pipeline.vae.decoder.conv_out.bias += 0.2  # a stand-in for a policy that brightens
        return redness(None, images)

    trainer.reward_funcs = [brighten, contrast]
    with caplog.at_level(logging.WARNING, "trl_apex.trainers.detectors"):
        trainer.train()
    (message,) = caplog.messages
    assert "The mean pixel has drifted from" in message
    assert logged(trainer, "drift/mean_pixel")[-1] > 0.15


def test_an_image_that_breaks_is_named_once(build, caplog):
    def breaks(images, trainer_state, **kwargs):
        scores = redness(None, images)
        if trainer_state.global_step >= 8:
            scores[2] -= 9.0
        return scores

    with caplog.at_level(logging.WARNING, "trl_apex"):
        trainer = build([breaks, contrast], max_steps=10)
        trainer.train()
    (message,) = caplog.messages
    assert "The lowest reward of 'breaks' is -" in message and "A few images have broken" in message
    before, after = logged(trainer, "drift/lowest/breaks")  # of the fourth and the fifth iteration
    assert 0 < before < 1 and after > 4 and max(logged(trainer, "drift/lowest/contrast")) < 1
