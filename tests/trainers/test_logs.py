"""What the logged numbers say where something is missing, skipped or failed."""

import asyncio
import json
import logging
import math
from pathlib import Path

import pandas
import pytest
import torch
from datasets import Dataset
from toy_rewards import PROMPTS, contrast, redness
from transformers import TrainerCallback

from trl_apex import APEXConfig, APEXTrainer, DiffusionGRPOConfig, DiffusionGRPOTrainer


def line(trainer, step=-1):
    """A log line of training: the last, unless another is asked for."""
    return [entry for entry in trainer.state.log_history if "loss" in entry][step]


def by_level(prompts, level, **kwargs):
    """None for half of the images of each prompt, 11, 13 ... for the others."""
    return [None if i % 2 else 11.0 + 2 * (i // 2 % 4) for i in range(len(prompts))]


def nothing(prompts, **kwargs):
    return [None] * len(prompts)


def constant(prompts, **kwargs):
    return [1.0] * len(prompts)


def test_a_missing_reward_does_not_count_as_zero(pipeline, dataset, lora, make_args):
    args = make_args(DiffusionGRPOConfig, max_steps=1, gradient_accumulation_steps=2)
    trainer = DiffusionGRPOTrainer(pipeline, [by_level], args, dataset, peft_config=lora)
    trainer.train()
    logged, scores = line(trainer), torch.tensor([11.0, 13.0, 15.0, 17.0])
    assert logged["reward"] == logged["rewards/by_level/mean"] == 14.0
    assert logged["reward_std"] == pytest.approx(scores.std().item())
    assert logged["reward_std_in_group"] == pytest.approx(2**0.5)  # 11 and 13, 15 and 17
    assert logged["frac_reward_zero_std"] == 0.0


def test_what_a_reward_logs_cannot_stop_the_run(pipeline, dataset, lora, make_args, tmp_path, caplog):
    def chatty(prompts, log_metric, log_extra, **kwargs):
        log_metric("a_tensor", torch.tensor(2.0))
        log_metric("half_missing", None if "first" in seen else 4.0)
        log_metric("missing", math.nan)
        log_extra("short", ["a"])
        log_extra("mixed", [lambda: 1, "a", None, 2] * (len(prompts) // 4))
        with pytest.raises(ValueError, match="takes one number. Found str"):
            log_metric("text", "high")
        with pytest.raises(ValueError, match="takes a list, one value per image. Found str"):
            log_extra("text", "high")
        seen.add("first")
        return [float(i) for i in range(len(prompts))]

    seen: set[str] = set()
    args = make_args(DiffusionGRPOConfig, max_steps=1, log_completions=True, num_completions_to_print=0)
    trainer = DiffusionGRPOTrainer(pipeline, [chatty], args, dataset, peft_config=lora)
    trainer.train()
    assert line(trainer)["a_tensor"] == 2.0 and line(trainer)["half_missing"] == 4.0
    assert "missing" not in line(trainer) and "reward_failures/chatty" in line(trainer)
    assert line(trainer)["reward_failures/chatty"] == 0
    assert "`log_extra` logged 1 values of 'short'" in caplog.text
    (table,) = (Path(args.output_dir) / "completions").glob("*.parquet")
    rows = pandas.read_parquet(table)
    assert list(rows["short"].isna()) == [True] * len(rows) and list(rows["mixed"])[1] == "a"


def test_what_a_reward_logs_stands_beside_its_own_images_and_iteration(pipeline, dataset, lora, make_args):
    later = asyncio.Event()

    async def echo(prompts, images, log_metric, log_extra, **kwargs):
        first = not later.is_set()
        later.set()
        await asyncio.sleep(0.3 if first else 0)  # the first chunk of an iteration is scored last
        log_metric("size", len(prompts))
        log_extra("said", prompts)
        return images.mean((1, 2, 3)).tolist()

    def restart(self, args, state, control, **kwargs):
        later.clear()

    args = make_args(
        APEXConfig, rollout_batch_size=4, per_device_train_batch_size=8, log_completions=True, num_completions_to_print=0,
        baseline_prompts=6, eval_strategy="steps", eval_steps=1, max_steps=2, updates_per_iteration=1,
    )  # fmt: skip
    callback = type("Restart", (TrainerCallback,), {"on_step_end": restart})()
    trainer = APEXTrainer(pipeline, [echo], args, dataset, dataset, callbacks=[callback], peft_config=lora)
    trainer.train()
    assert [entry["size"] for entry in trainer.state.log_history if "size" in entry] == [4.0, 4.0]
    for table in (Path(args.output_dir) / "completions").glob("*.parquet"):
        rows = pandas.read_parquet(table)
        assert list(rows["said"]) == list(rows["prompt"])


def test_a_callback_may_set_the_weights_as_numbers(pipeline, dataset, lora, make_args):
    trainer = APEXTrainer(pipeline, [redness, contrast], make_args(max_steps=1), dataset, peft_config=lora)
    trainer.reward_weights = [1.0, 9.0]
    trainer.train()
    assert line(trainer)["priority/contrast"] == pytest.approx(0.9)
    with pytest.raises(ValueError, match="one number per objective"):
        trainer.reward_weights = [1.0]


@pytest.mark.filterwarnings("ignore:The reward `cost` failed")
@pytest.mark.parametrize("broken", [2, 4])
def test_an_evaluation_without_an_objective_is_not_the_best(broken, pipeline, dataset, lora, make_args):
    def cost(prompts, trainer_state, **kwargs):
        if trainer_state.global_step == broken and evaluating:
            raise OSError("the server is down")
        return [-5.0] * len(prompts)

    evaluating: list[bool] = []
    args = make_args(
        DiffusionGRPOConfig, max_steps=6, eval_strategy="steps", eval_steps=2, lr_scheduler_type="reduce_lr_on_plateau",
        metric_for_best_model="reward", max_reward_failure_rate=1.0,
    )  # fmt: skip
    trainer = DiffusionGRPOTrainer(pipeline, [redness, cost], args, dataset, dataset, peft_config=lora)
    inner = trainer.evaluate

    def evaluate(*args, **kwargs):
        evaluating.append(True)
        try:
            return inner(*args, **kwargs)
        finally:
            evaluating.clear()

    trainer.evaluate = evaluate
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    assert ["eval_reward" in entry for entry in found] == [broken != step for step in (2, 4, 6)]
    assert trainer.state.best_metric < 0


def test_an_objective_that_scores_nothing_is_named_once(pipeline, dataset, lora, make_args, caplog):
    args = make_args(DiffusionGRPOConfig, max_steps=5)
    trainer = DiffusionGRPOTrainer(pipeline, [redness, nothing], args, dataset, peft_config=lora)
    with caplog.at_level(logging.WARNING, "trl_apex"):
        trainer.train()
    named = [message for message in caplog.messages if "scored no image" in message]
    assert len(named) == 1 and "'nothing'" in named[0]


def test_apex_names_an_objective_that_scores_nothing_once(pipeline, dataset, lora, make_args, caplog):
    trainer = APEXTrainer(pipeline, [redness, nothing], make_args(max_steps=10), dataset, peft_config=lora)
    with caplog.at_level(logging.WARNING, "trl_apex"), pytest.warns(UserWarning) as caught:
        trainer.train()
    texts = [str(warning.message) for warning in caught] + caplog.messages
    (named,) = [text for text in texts if "'nothing'" in text]
    assert "has had no reward at all for 5 iterations" in named


def test_skipped_updates_are_counted_and_their_share_is_logged(pipeline, dataset, lora, make_args):
    calls = []

    def constant_at_first(images, **kwargs):
        calls.append(1)
        return constant(images) if len(calls) < 2 else redness(None, images)

    args = make_args(max_steps=4, logging_steps=4)
    trainer = APEXTrainer(pipeline, [constant_at_first], args, dataset, peft_config=lora)
    trainer.train()
    logged = line(trainer)
    assert logged["skipped_updates/dead"] == 2 and logged["skipped_updates/dead_rate"] == 0.5
    assert logged["skipped_updates/nonfinite"] == logged["skipped_updates/nonfinite_rate"] == 0


@pytest.mark.filterwarnings("ignore:The reward `breaks` failed")
def test_failures_are_counted_over_all_iterations_of_a_log_line(pipeline, dataset, lora, make_args):
    def breaks(prompts, **kwargs):
        return [1 / 0 for _ in prompts]

    args = make_args(max_steps=4, logging_steps=4, max_reward_failure_rate=1.0)
    trainer = APEXTrainer(pipeline, [redness, breaks], args, dataset, peft_config=lora)
    trainer.train()
    assert line(trainer)["reward_failures/breaks"] == 16 and line(trainer)["reward_failure_rate/breaks"] == 1.0
    assert line(trainer)["reward_failure_rate/redness"] == 0.0


def test_clip_ratios_have_trls_names(pipeline, dataset, lora, make_args):
    args = make_args(max_steps=2, num_iterations=2, epsilon=1e-7, learning_rate=1e-2)
    trainer = APEXTrainer(pipeline, [redness], args, dataset, peft_config=lora)
    trainer.train()
    logged = line(trainer)  # one process: its share is the least and the largest
    assert logged["clip_ratio/low_min"] == logged["clip_ratio/low_mean"]
    assert logged["clip_ratio/high_max"] == logged["clip_ratio/high_mean"]
    assert logged["clip_ratio/low_min"] + logged["clip_ratio/high_max"] > 0


def test_pictures_are_kept_for_the_first_64_rows_alone(pipeline, dataset, lora, make_args):
    args = make_args(eval_num_inference_steps=1, per_device_eval_batch_size=35)
    many = Dataset.from_dict({"prompt": PROMPTS * 17})
    trainer = APEXTrainer(pipeline, [redness, contrast], args, dataset, many, peft_config=lora)
    metrics = trainer.evaluate()
    kept = [record["image"] is not None for record in trainer.eval_records]
    assert kept == [True] * 64 + [False] * 4
    sums = torch.tensor([sum(record["rewards"].values()) for record in trainer.eval_records], dtype=torch.float64)
    assert metrics["eval_reward"] == pytest.approx(sums.mean().item())
    assert metrics["eval_reward_std"] == pytest.approx(sums.std().item())


def test_a_rollouts_table_has_every_row_and_the_pictures_of_the_shown(pipeline, lora, make_args):
    args = make_args(
        per_device_train_batch_size=20, generation_batch_size=20, num_generations=10, num_inference_steps=2,
        max_steps=1, log_completions=True, num_completions_to_print=0,
    )  # fmt: skip
    trainer = APEXTrainer(pipeline, [redness], args, Dataset.from_dict({"prompt": PROMPTS}), peft_config=lora)
    trainer.train()
    logs = trainer._logs
    assert len(logs["prompt"]) == len(logs["images"]) == len(logs["advantages"]) == 20
    assert [len(images) for images in logs["images"]] == ([1] * 8 + [0] * 2) * 2
    json.dumps(line(trainer))


@pytest.mark.parametrize(
    "given, message",
    [
        ("test", "the trainer has no named ones"),
        (Dataset.from_dict({"text": ["a"]}), "must have a `prompt` column"),
        (Dataset.from_dict({"prompt": ["a"]}), "`by_level`.*missing a required argument: 'level'"),
    ],
)
def test_evaluate_checks_its_dataset_as_the_constructor_does(pipeline, dataset, lora, make_args, given, message):
    trainer = APEXTrainer(pipeline, [redness, by_level], make_args(), dataset, peft_config=lora)
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(given)
    with pytest.raises(NotImplementedError, match="evaluate"):
        trainer.predict(dataset)


def test_a_named_evaluation_dataset_can_be_asked_for(pipeline, dataset, lora, make_args):
    sets = {"few": dataset.select(range(2)), "more": dataset.select(range(3))}
    args = make_args(eval_num_inference_steps=1)
    trainer = APEXTrainer(pipeline, [redness, nothing], args, dataset, sets, peft_config=lora)
    metrics = trainer.evaluate("few")
    assert metrics["eval_few_reward"] == metrics["eval_few_rewards/redness/mean"]
    assert "eval_few_rewards/nothing/mean" not in metrics and len(trainer.eval_records) == 2
