"""The trainer warns when a watched reward falls while the trained one rises."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from toy_rewards import PROMPTS, redness

from trl_apex import APEXTrainer


def paleness(completions, images, **kwargs):
    return (1 - images[:, 0].mean((1, 2))).tolist()


def greenness(completions, images, **kwargs):
    return images[:, 1].mean((1, 2)).tolist()


@pytest.fixture
def build(pipeline, dataset, lora, make_args):
    def make(monitors, **overrides):
        evaluation = Dataset.from_dict({"prompt": PROMPTS * 3})
        args = make_args(**{"eval_num_inference_steps": 2, "warmup_iterations": 0, **overrides})
        fresh = copy.deepcopy(pipeline)
        return APEXTrainer(
            fresh, [redness], args, dataset, evaluation, peft_config=copy.copy(lora), monitor_funcs=monitors
        )

    return make


def brighten(trainer, by):
    """What a policy that hacks redness would do."""
    with torch.no_grad():
        trainer.policy.pipeline.vae.decoder.conv_out.bias[0] += by


def test_one_warning_with_names_and_figures(build, caplog):
    trainer = build([paleness, greenness])
    with caplog.at_level(logging.WARNING, "trl_apex"):
        trainer.evaluate()
        trainer.evaluate()
        assert not caplog.messages
        brighten(trainer, -0.2)
        trainer.evaluate()
        assert not caplog.messages
        brighten(trainer, 0.5)
        trainer.evaluate()
        trainer.evaluate()
    (message,) = caplog.messages
    first, latest = ([entry["eval_rewards/paleness/mean"] for entry in trainer.state.log_history][i] for i in (0, -1))
    assert (
        f"(redness) rose by more than 2 standard errors on average, while paleness fell from {first:.4g} to {latest:.4g}"
        in message
    )
    assert "greenness" not in message


def test_the_first_evaluation_is_kept_over_a_resume(build, caplog):
    run = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = build([paleness], **run)
    trainer.evaluate()
    trainer.train()
    resumed = build([paleness], **{**run, "max_steps": 4})
    resumed.train(resume_from_checkpoint=True)
    brighten(resumed, 0.5)
    with caplog.at_level(logging.WARNING, "trl_apex.trainers.callbacks"):
        resumed.evaluate()
    assert len(caplog.messages) == 1 and "at step 4" in caplog.messages[0]


def test_another_dataset_under_the_same_name_starts_anew(build, caplog):
    trainer = build([paleness])
    trainer.evaluate()
    brighten(trainer, 0.5)
    with caplog.at_level(logging.WARNING, "trl_apex"):
        trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS[:3]}))
    assert not caplog.messages
