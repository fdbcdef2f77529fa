"""How runs end and go on: finished ones, odd ones, the best model, early stopping, checkpoints that hold too little."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import equal_weights, weights_of
from toy_rewards import contrast, redness
from transformers import EarlyStoppingCallback
from trl import GRPOConfig

from trl_apex import APEXConfig, APEXTrainer, DiffusionGRPOConfig
from trl_apex.trainers.manifest import finalize


@pytest.fixture
def build(pipeline, dataset, lora, make_args, tmp_path):
    """A trainer of two updates an iteration that saves and evaluates where it is told."""

    def make(folder="run", callbacks=None, monitors=None, rewards=(redness, contrast), **overrides):
        values = {
            "output_dir": str(tmp_path / folder), "save_strategy": "steps", "save_steps": 2,
            "eval_num_inference_steps": 2, "learning_rate": 1e-2,
        }  # fmt: skip
        return APEXTrainer(
            copy.deepcopy(pipeline), list(rewards), make_args(**{**values, **overrides}), dataset,
            dataset.select(range(3)), peft_config=copy.copy(lora), callbacks=callbacks, monitor_funcs=monitors,
        )  # fmt: skip

    return make


def equal(first, second):
    return equal_weights(weights_of(first), weights_of(second))


def folders(trainer):
    run = trainer.args.output_dir
    return sorted(p.name for p in Path(run).glob("checkpoint-*"))


def evaluated(trainer):
    return [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry]


def steady(prompts, **kwargs):
    return [1.0] * len(prompts)


def test_a_finished_run_returns_at_once_when_it_is_resumed(build):
    run = build(max_steps=4, save_total_limit=1, ema_decay=0.9)
    run.train()
    again = build(max_steps=4, save_total_limit=1, ema_decay=0.9)
    result = again.train(resume_from_checkpoint=True)
    assert result.global_step == again.state.global_step == 4
    assert equal(run, again) and folders(again) == ["checkpoint-4"]
    assert run.evaluate()["eval_reward"] == again.evaluate()["eval_reward"]  # the average came back too
    longer = build(max_steps=6)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 6


TWO_LEVELS = {"timesteps_per_image": 2, "num_iterations": 2}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_iterations": 2}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "awm", "ema_decay": 0.5, **TWO_LEVELS}, marks=pytest.mark.slow),
        {"loss_type": "nft", **TWO_LEVELS},
        pytest.param({"loss_type": "fpo", "target_movement": 1e-3, **TWO_LEVELS}, marks=pytest.mark.slow),
    ],
    ids=["two-passes", "awm", "nft", "fpo"],
)
def test_runs_of_every_loss_end_and_go_on(build, options):
    first = build("resumed", max_steps=1, **options)
    updates = first.updates_per_iteration
    build("resumed", max_steps=updates, save_steps=1, **options).train()
    whole, resumed, again = (build(f, max_steps=2 * updates, **options) for f in ("whole", "resumed", "whole"))
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    again.train(resume_from_checkpoint=True)
    assert equal(whole, resumed) and equal(whole, again) and again.state.global_step == 2 * updates
    assert resumed.aggregator.state_dict() == whole.aggregator.state_dict()
    odd = build("whole", max_steps=2 * updates + 1, save_total_limit=1, **options)
    odd.train(resume_from_checkpoint=True)
    assert odd.state.global_step == 2 * updates + 1 and folders(odd) == [f"checkpoint-{2 * updates + 1}"]


def test_a_run_that_ended_inside_an_iteration_goes_on_with_a_fresh_rollout(build, caplog):
    run = build(max_steps=3)
    run.train()
    assert folders(run) == ["checkpoint-2", "checkpoint-3"]
    longer = build(max_steps=6)
    with caplog.at_level(logging.WARNING, "trl_apex"):
        longer.train(resume_from_checkpoint=True)
    assert "inside an iteration: update 1 of 2" in caplog.text
    assert longer.state.global_step == 6 and folders(longer)[-1] == "checkpoint-6"
    logged = {e["step"]: e for e in longer.state.log_history if "loss" in e}
    assert logged[4]["ratio/max_deviation"] == 0 and logged[5]["ratio/max_deviation"] == 0  # both are first updates


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize("greater", [True, False])
def test_the_best_model_is_returned_and_evaluations_wait_for_the_iterations_end(build, greater, ema):
    trainer = build(
        max_steps=8, save_steps=3, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, save_total_limit=1,
        metric_for_best_model="rewards/redness/mean", greater_is_better=greater, ema_decay=ema,
    )  # fmt: skip
    trainer.train()
    values = {e["step"]: e["eval_rewards/redness/mean"] for e in trainer.state.log_history if "eval_reward" in e}
    assert list(values) == [4, 6, 8]
    best = (max if greater else min)(values, key=values.get)
    assert trainer.state.best_global_step == best and trainer.state.best_metric == values[best]
    assert folders(trainer) == sorted({f"checkpoint-{best}", "checkpoint-8"})
    assert trainer.evaluate()["eval_rewards/redness/mean"] == trainer.state.best_metric


def test_a_best_that_falls_between_two_saves_is_saved(build):
    trainer = build(
        max_steps=8, save_steps=8, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/steady/mean", monitors=[steady],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 2 and folders(trainer) == ["checkpoint-2", "checkpoint-8"]


def test_a_best_checkpoint_resumes_to_the_weights_of_the_undisturbed_run(build, tmp_path):
    options = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 6, "ema_decay": 0.5}
    whole = build("whole", **options)
    assert whole.args.metric_for_best_model == "reward" and whole.args.greater_is_better
    whole.train()
    assert evaluated(whole) == [2, 4, 6] and "checkpoint-2" in folders(whole)
    resumed = build("resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert equal(whole, resumed)
    assert resumed.state.best_metric == whole.state.best_metric
    assert resumed.aggregator.state_dict() == whole.aggregator.state_dict()


def test_early_stopping_stops_at_the_same_step_after_a_resume_and_stays_stopped(build, tmp_path):
    options = {
        "max_steps": 10, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "rewards/steady/mean",
        "load_best_model_at_end": True, "monitors": [steady],
    }  # fmt: skip

    def trainer(folder):
        return build(folder, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)], **options)

    whole = trainer("whole")
    whole.train()
    assert whole.state.global_step == 6 and evaluated(whole) == [2, 4, 6]
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    again = trainer("whole")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6 and again.state.best_global_step == 2 and equal(whole, again)


def test_a_metric_that_no_evaluation_has_is_refused_with_the_list(build):
    with pytest.raises(ValueError, match=r"Found 'ocr'.*reward, reward_std, rewards/redness/mean"):
        build(metric_for_best_model="ocr")
    with pytest.raises(ValueError, match="`eval_strategy`"):
        build(save_strategy="best")
    with pytest.raises(ValueError, match="`save_on_each_node` must stay"):
        build(save_on_each_node=True)


def test_a_schedule_that_waits_for_a_plateau_watches_the_reward(build):
    trainer = build(
        lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 0}, max_steps=6, eval_steps=2,
        eval_strategy="steps", monitors=[steady], metric_for_best_model="rewards/steady/mean", save_strategy="no",
    )  # fmt: skip
    trainer.train()
    assert trainer.lr_scheduler.mode == "max"
    assert trainer.lr_scheduler.get_last_lr()[0] < trainer.args.learning_rate


@pytest.mark.parametrize("option", ["save_only_model", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_the_whole_state_is_refused(build, option, tmp_path):
    run = build(max_steps=2, save_only_model=True)
    run.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    if option != "save_only_model":
        full = build("full", max_steps=2)
        full.train()
        checkpoint = tmp_path / "full" / "checkpoint-2"
        (checkpoint / option).unlink()
        checkpoint.rename(tmp_path / "staged")
        finalize(tmp_path / "staged", checkpoint, engine="ddp", world_size=1)
    for wanted in (True, str(checkpoint)):
        later = build(checkpoint.parent.name, max_steps=4)
        with pytest.raises(ValueError, match="whole state.*load its adapter"):
            later.train(resume_from_checkpoint=wanted)


def test_an_average_without_its_step_is_refused_by_name(build, tmp_path):
    build(max_steps=2, ema_decay=0.9).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    average = load_file(checkpoint / "ema.safetensors")
    del average["optimization_step"]
    save_file(average, checkpoint / "ema.safetensors")
    finalize(checkpoint.rename(tmp_path / "staged"), checkpoint, engine="ddp", world_size=1)
    with pytest.raises(ValueError, match=r"ema\.safetensors must hold.*optimization_step"):
        build(max_steps=4, ema_decay=0.9).train(resume_from_checkpoint=True)


def test_fields_that_a_plain_config_leaves_at_trls_default_are_named_once(caplog):
    with caplog.at_level(logging.WARNING, "trl_apex"):
        config = APEXConfig.from_grpo_config(GRPOConfig(output_dir="run", use_cpu=True, bf16=False, epsilon=0.2))
    (message,) = caplog.messages
    assert "learning_rate 1e-06 -> 3e-4" in message and "epsilon 0.2 -> 0.0001" in message
    assert config.epsilon == 1e-4
    caplog.clear()
    APEXConfig.from_grpo_config(DiffusionGRPOConfig(output_dir="run", use_cpu=True))
    assert not caplog.messages


def test_a_run_goes_on_with_the_optimizer_of_its_checkpoint(build, tmp_path, caplog):
    build(max_steps=2).train()
    with pytest.raises(ValueError, match="with the `optim` that its checkpoint was saved with.*Found 'sgd'"):
        build(max_steps=4, optim="sgd").train(resume_from_checkpoint=True)
    later = build(max_steps=4, learning_rate=5e-3, seed=7)
    with caplog.at_level(logging.WARNING):
        later.train(resume_from_checkpoint=True)
    assert "goes on with the settings of" in caplog.text and "learning_rate 0.01 instead of 0.005" in caplog.text
    assert "had the seed 3. It goes on with 7: other prompts and other noise" in caplog.text
    assert [entry["learning_rate"] for entry in later.state.log_history if "loss" in entry] == [0.01] * 4


def test_the_checkpoint_may_be_named_in_the_configuration(build, tmp_path):
    build(max_steps=2).train()
    for wanted in ("true", str(tmp_path / "run" / "checkpoint-2")):
        later = build(max_steps=4, resume_from_checkpoint=wanted, save_strategy="no")
        later.train()
        assert later.resumed_from == str(tmp_path / "run" / "checkpoint-2") and later.state.global_step == 4
    with pytest.raises(
        ValueError, match=r"Found .*run: manifest.json is missing.*Resume from .*checkpoint-2, the last"
    ):
        build(max_steps=4).train(resume_from_checkpoint=str(tmp_path / "run"))


@pytest.mark.parametrize(
    "file, content",
    [
        ("optimizer.pt", [1]),
        ("optimizer.pt", "hello"),
        ("scheduler.pt", {}),
        ("rng_state.pth", {}),
        ("ema.safetensors", None),
    ],
)
def test_a_state_of_another_form_is_refused_by_the_name_of_its_file(build, tmp_path, file, content):
    build(max_steps=2, ema_decay=0.9).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    if content == "hello":
        (checkpoint / file).write_text(content)
    elif content is None:
        average = load_file(checkpoint / file)
        average[next(name for name in average if "lora" in name)] = torch.zeros(1, 1)
        save_file(average, checkpoint / file)
    else:
        torch.save(content, checkpoint / file)
    finalize(checkpoint.rename(tmp_path / "staged"), checkpoint, engine="ddp", world_size=1)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        build(max_steps=4, ema_decay=0.9).train(resume_from_checkpoint=True)
