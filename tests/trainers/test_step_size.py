"""`target_movement`: the learning rate follows what an iteration moves the policy."""

import copy

import pytest
import torch
from toy_rewards import contrast, redness

from trl_apex import APEXTrainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]


def build(pipeline, dataset, lora, make_args, **overrides):
    values = {"loss_type": "fpo", "guidance_scale": None, "timesteps_per_image": 2, "timestep_batch_size": 2}
    args = make_args(**values | {"activation_checkpointing": False} | overrides)
    return APEXTrainer(copy.deepcopy(pipeline), [contrast, redness], args, dataset, peft_config=lora)


@pytest.mark.parametrize("loss_type", ["fpo", "grpo"])
@pytest.mark.parametrize("target, direction", [(1e3, 1), (1e-12, -1), (float("inf"), 0)])
def test_the_rate_rises_below_the_target_falls_above_and_stays_without_one(
    pipeline, dataset, lora, make_args, target, direction, loss_type
):
    own = {"timesteps_per_image": None} if loss_type == "grpo" else {}
    trainer = build(
        pipeline, dataset, lora, make_args, loss_type=loss_type, target_movement=target, max_steps=3, **own
    )
    rates = []
    step = trainer._guard.on_pre_optimizer_step
    trainer._guard.on_pre_optimizer_step = lambda *a, **k: (
        rates.append(trainer.optimizer.param_groups[0]["lr"]) or step(*a, **k)
    )
    trainer.train()
    assert logged(trainer, "rate_factor") == pytest.approx([1.5 ** (direction * i) for i in range(3)])
    assert rates == pytest.approx([1e-3 * 1.5 ** (direction * i) for i in range(3)])
    assert all(moved > 0 for moved in logged(trainer, "movement"))


def test_an_iteration_that_overshoots_makes_all_its_updates(pipeline, dataset, lora, make_args):
    found = []
    for target in (1e-12, None):
        trainer = build(pipeline, dataset, lora, make_args, target_movement=target, num_iterations=4, max_steps=4)
        trainer.train()
        found.append((weights(trainer), len(logged(trainer, "movement"))))
    assert [count for _, count in found] == [1, 0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))


def test_a_resumed_run_goes_on_with_its_rate(pipeline, dataset, lora, make_args, tmp_path):
    def trainer(steps, name):
        return build(
            pipeline, dataset, lora, make_args, target_movement=1e3, max_steps=steps, save_strategy="steps", save_steps=2,
            num_iterations=2, output_dir=str(tmp_path / name),
        )  # fmt: skip

    through = trainer(6, "through")
    through.train()
    trainer(4, "parts").train()
    resumed = trainer(6, "parts")
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(through), weights(resumed), strict=True))
    assert logged(resumed, "rate_factor")[-1] == pytest.approx(1.5**2)


def test_schedules_that_adapt_themselves_are_refused(make_args):
    with pytest.raises(ValueError, match="`target_movement` needs.*reduce_lr_on_plateau"):
        make_args(target_movement=0.01, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1)
