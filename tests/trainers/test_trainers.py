"""Training a real (tiny, untrained) Stable Diffusion 3 pipeline."""

import asyncio
import copy
import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny_runs import history
from tiny_runs import weights_of as weights
from toy_rewards import PROMPTS, contrast, redness
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_apex import APEXConfig, APEXTrainer, DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_apex.diffusion.rollout import evaluation_noise
from trl_apex.trainers.weights import LORA_FILE


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_trainer_is_trls():
    assert issubclass(APEXTrainer, DiffusionGRPOTrainer) and issubclass(DiffusionGRPOTrainer, GRPOTrainer)
    assert issubclass(APEXConfig, DiffusionGRPOConfig) and issubclass(DiffusionGRPOConfig, GRPOConfig)


@pytest.mark.parametrize("transition, guidance", [("flow_sde", 1.0), ("cps", 1.0), ("flow_sde", 4.0)])
def test_ratio_is_one_on_every_first_update(pipeline, dataset, lora, make_args, transition, guidance):
    args = make_args(transition=transition, guidance_scale=guidance, gradient_accumulation_steps=1, max_steps=6)
    trainer = APEXTrainer(pipeline, [redness, contrast], args, dataset, peft_config=lora)
    assert trainer.updates_per_iteration == 2
    before = weights(trainer)
    trainer.train()
    deviation = history(trainer, "ratio/max_deviation")
    assert max(deviation[0::2]) < 1e-6
    assert min(deviation[1::2]) > 1e-4
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_a_script_for_grpo_trainer_runs_unchanged(pipeline, dataset, lora, tmp_path):
    seen = {}

    async def patience(prompts, completions, level, trainer_state, log_metric, log_extra, **kwargs):
        await asyncio.sleep(0)
        seen["size"], seen["step"] = completions[0].size, trainer_state.global_step
        log_metric("level_mean", sum(level) / len(level))
        log_extra("level", level)
        return [None if value == 0 else float(value) for value in level]

    def first_letter(completions, prompts, completion_ids, **kwargs):
        return [float(len(p)) + i % 3 for i, p in enumerate(prompts)]

    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=4,
        max_steps=2, logging_steps=1, save_strategy="no", report_to="none", log_completions=True, beta=0.1,
    )  # fmt: skip
    trainer = DiffusionGRPOTrainer(
        model=pipeline, reward_funcs=[patience, first_letter], args=args, train_dataset=dataset, peft_config=lora
    )
    assert trainer.args.epsilon == 1e-4 and trainer.args.beta == 0.1  # ours where the user said nothing
    trainer.train()
    assert seen["size"] == (32, 32)
    for key in ("reward", "reward_std", "frac_reward_zero_std", "rewards/patience/mean", "kl", "level_mean", "loss"):
        assert history(trainer, key), key
    assert os.listdir(tmp_path / "completions")


def test_kl_term_pulls_back_with_a_gradient_of_its_own(pipeline, dataset, lora, make_args):
    def constant(prompts, **kwargs):
        return [1.0] * len(prompts)

    args = make_args(beta=1.0, max_steps=10, learning_rate=3e-3)
    trainer = APEXTrainer(pipeline, [constant], args, dataset, peft_config=lora)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    trainer.train()
    kl = history(trainer, "kl")
    assert min(history(trainer, "grad_norm")) > 0
    assert kl[0] > 0 and sum(kl[-2:]) < 0.8 * sum(kl[:2])


def test_an_update_without_advantages_leaves_the_weights_alone(pipeline, dataset, lora, make_args):
    def constant(prompts, **kwargs):
        return [1.0] * len(prompts)

    def missing(prompts, **kwargs):
        return [None] * len(prompts)

    trainer = APEXTrainer(pipeline, [constant, missing], make_args(max_steps=3), dataset, peft_config=lora)
    before = weights(trainer)
    trainer.train()
    assert_equal_weights(before, weights(trainer))
    assert history(trainer, "skipped_updates/dead") == history(trainer, "skipped_updates/dead_rate") == [1.0] * 3


def test_adapter_loads_in_a_plain_pipeline_and_changes_its_images(pipeline, dataset, lora, make_args):
    original = copy.deepcopy(pipeline)
    trainer = APEXTrainer(pipeline, [redness, contrast], make_args(learning_rate=1e-2), dataset, peft_config=lora)
    trainer.train()
    trainer.save_model()

    def image(pipe):
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 32, "width": 32, "max_sequence_length": 12}
        return pipe(PROMPTS[0], generator=generator, output_type="pt", **call).images

    plain = image(original)
    trainer.model.eval()
    original.load_lora_weights(trainer.args.output_dir, weight_name=LORA_FILE)
    loaded = image(original)
    assert (loaded - plain).abs().max() > 1e-3
    pipeline.transformer = trainer.model
    torch.testing.assert_close(loaded, image(pipeline), rtol=0, atol=1e-5)  # lora_alpha / r = 3 survived


@pytest.mark.parametrize("offload", [False, True])
def test_kl_of_full_fine_tuning_is_to_a_frozen_copy(pipeline, dataset, make_args, offload):
    args = make_args(beta=0.1, max_steps=4, learning_rate=1e-3, offload_reference=offload)
    trainer = APEXTrainer(pipeline, [redness], args, dataset)
    frozen = {name: p.clone() for name, p in trainer._reference.named_parameters()}
    trainer.train()
    kl = history(trainer, "kl")
    assert kl[0] == 0 and kl[1] > 0
    assert all(torch.equal(p, frozen[name]) for name, p in trainer._reference.named_parameters())


@pytest.mark.parametrize("full", [False, True])
def test_resume_continues_to_identical_weights(pipeline, dataset, lora, make_args, tmp_path, full):
    config = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "num_iterations": 2, "ema_decay": 0.9}
    config |= {"lr_scheduler_type": "cosine", "warmup_iterations": 1, "learning_rate": 1e-4 if full else 1e-3}
    peft_config = None if full else lora

    def trainer(folder, **overrides):
        args = make_args(**{**config, "output_dir": str(tmp_path / folder), **overrides})
        return APEXTrainer(copy.deepcopy(pipeline), [redness, contrast], args, dataset, peft_config=peft_config)

    whole = trainer("whole")
    whole.train()
    # save_steps=3 falls inside an iteration of 4 updates: the checkpoint is made at its end.
    assert sorted(p.name for p in (tmp_path / "whole").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_equal_weights(weights(whole), weights(resumed))
    assert resumed.aggregator.state_dict() == whole.aggregator.state_dict()
    assert resumed.aggregator.iteration == 2
    first, second = (tmp_path / run / "checkpoint-8" / "ema.safetensors" for run in ("whole", "resumed"))
    averages = load_file(first), load_file(second)
    assert_equal_weights(*averages)
    assert int(averages[0]["optimization_step"]) == 8


def test_a_checkpoint_of_other_objectives_is_refused(pipeline, dataset, lora, make_args, tmp_path):
    args = make_args(save_strategy="steps", save_steps=2, max_steps=2)
    APEXTrainer(copy.deepcopy(pipeline), [redness, contrast], args, dataset, peft_config=lora).train()
    other = APEXTrainer(pipeline, [contrast, redness], make_args(max_steps=4), dataset, peft_config=lora)
    with pytest.raises(ValueError, match="saved state.*objectives"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_full_fine_tuning_trains_every_weight(pipeline, dataset, make_args):
    args = make_args(DiffusionGRPOConfig, learning_rate=1e-4, max_steps=2)
    trainer = DiffusionGRPOTrainer(pipeline, redness, args=args, train_dataset=dataset)
    before = weights(trainer)
    assert len(before) == len(list(trainer.model.parameters()))
    trainer.train()
    changed = [name for name, value in weights(trainer).items() if not torch.equal(before[name], value)]
    assert len(changed) > 0.9 * len(before)
    # Adam moves no weight further than the learning rate in an update, whatever the gradient.
    moved = max(float((value - before[name]).abs().max()) for name, value in weights(trainer).items())
    assert 0.5e-4 < moved < 2.2e-4


def test_evaluation_is_deterministic_counts_each_row_once_and_reports_monitors(pipeline, dataset, lora, make_args):
    def monitor(prompts, images, **kwargs):
        return [float(i) for i in range(len(prompts))]

    args = make_args(eval_num_inference_steps=4, per_device_eval_batch_size=3, eval_strategy="no", do_eval=False)
    held_out = dataset.select(range(5))
    trainer = APEXTrainer(
        pipeline, [redness, contrast], args, dataset, held_out, peft_config=lora, monitor_funcs=[monitor]
    )
    first, records = trainer.evaluate(), trainer.eval_records
    second = trainer.evaluate()
    assert first["eval_rewards/redness/mean"] == second["eval_rewards/redness/mean"]
    assert [r["row"] for r in records] == [0, 1, 2, 3, 4]
    assert first["eval_rewards/monitor/mean"] == pytest.approx((0 + 1 + 2 + 0 + 1) / 5)
    assert first["eval_rewards/redness/se"] > 0
    assert set(trainer.reward_func_names) == {"redness", "contrast"}


def test_overlapped_rewards_and_rollout_chunks_change_nothing(pipeline, dataset, lora, make_args):
    results = []
    for overlap, chunk in [(True, 4), (False, 4), (True, None)]:
        args = make_args(reward_overlap=overlap, rollout_batch_size=chunk, max_steps=2)
        trainer = APEXTrainer(copy.deepcopy(pipeline), [redness, contrast], args, dataset, peft_config=lora)
        trainer.train()
        results.append(history(trainer, "rewards/contrast/mean"))
    assert results[0] == results[1]
    assert results[0] == pytest.approx(results[2], rel=1e-5)


def test_state_is_written_beside_the_adapter(pipeline, dataset, lora, make_args):
    trainer = APEXTrainer(pipeline, [redness, contrast], make_args(), dataset, peft_config=lora)
    trainer.train()
    trainer.save_model()
    folder = trainer.args.output_dir
    state = json.loads(Path(folder, "aggregator_state.json").read_text())
    assert state["objectives"] == ["redness", "contrast"]
    assert {"pytorch_lora_weights.safetensors", "adapter_model.safetensors"} <= set(os.listdir(folder))


def test_telemetry_is_not_sent_where_ci_is_unset(pipeline, dataset, lora, make_args, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    APEXTrainer(pipeline, [redness], make_args(), dataset, peft_config=lora)


def test_columns_reach_the_rewards_aligned_with_their_prompts(pipeline, lora, make_args):
    dataset = Dataset.from_dict({"prompt": PROMPTS, "name": [p[2:5] for p in PROMPTS]})

    def check(prompts, name, **kwargs):
        assert [p[2:5] for p in prompts] == name
        assert all(prompts[i] == prompts[i + 1] for i in range(0, len(prompts), 4) for i in range(i, i + 3))
        return [0.0] * len(prompts)

    trainer = APEXTrainer(pipeline, [check, redness], make_args(), dataset, peft_config=lora)
    trainer.train()
    assert sum(history(trainer, "reward_failures/check")) == 0


def test_an_epsilon_as_large_as_the_gradients_is_warned_about(pipeline, dataset, lora, make_args):
    trainer = APEXTrainer(pipeline, [redness], make_args(adam_epsilon=1.0, max_steps=1), dataset, peft_config=lora)
    with pytest.warns(UserWarning, match="adam_epsilon=1 and.*gradients of root mean square"):
        trainer.train()
    assert 0 < history(trainer, "grad_rms")[0] < 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler itself
def test_compiled_blocks_serve_rollout_and_update(pipeline, dataset, lora, make_args):
    results = []
    for compiled in (False, True):
        args = make_args(compile_denoiser=compiled, max_steps=2, optim="sgd", learning_rate=1.0)
        trainer = APEXTrainer(copy.deepcopy(pipeline), [redness], args, dataset, peft_config=lora)
        trainer.train()
        assert history(trainer, "ratio/max_deviation")[0] < 1e-5
        results.append(weights(trainer))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_updates_per_iteration_sets_the_accumulation(pipeline, dataset, lora, make_args, updates):
    args = make_args(per_device_train_batch_size=4, updates_per_iteration=updates)
    assert args.gradient_accumulation_steps == 4 // updates
    trainer = APEXTrainer(pipeline, [redness], args, dataset, peft_config=lora)
    assert trainer.updates_per_iteration == updates
    static = make_args(DiffusionGRPOConfig, per_device_train_batch_size=4, updates_per_iteration=updates)
    assert APEXConfig.from_grpo_config(static).gradient_accumulation_steps == 4 // updates


def test_evaluation_in_mixed_precision_gives_the_same_numbers_before_and_after_training(
    pipeline, dataset, lora, make_args
):
    trainer = APEXTrainer(
        model=pipeline,
        reward_funcs=[redness, contrast],
        args=make_args(bf16=True, learning_rate=0.0, max_steps=1),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(2)),
        peft_config=lora,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_reward"] == after["eval_reward"]


def test_evaluation_during_training_keeps_the_training_as_it_was(pipeline, dataset, lora, make_args):
    after = []
    for strategy in ("no", "steps"):
        args = make_args(
            eval_strategy=strategy, eval_steps=2, eval_num_inference_steps=2, per_device_eval_batch_size=3
        )
        trainer = APEXTrainer(
            copy.deepcopy(pipeline), [redness], args, dataset, dataset.select(range(4)), peft_config=lora
        )
        trainer.train()
        after.append(weights(trainer))
    assert len(history(trainer, "eval_rewards/redness/mean")) == 2
    assert_equal_weights(*after)


def test_evaluation_has_a_guidance_of_its_own_and_the_negative_prompt(pipeline, dataset, lora, make_args):
    args = make_args(
        guidance_scale=1.0, eval_guidance_scale=3.0, negative_prompt="a grey blur", eval_num_inference_steps=3
    )
    trainer = APEXTrainer(pipeline, [redness], args, dataset, dataset.select(range(2)), peft_config=lora)
    trainer.evaluate()
    noise = evaluation_noise(args.seed, [0, 1], trainer.latent_shape)
    call = {"num_inference_steps": 3, "height": 32, "width": 32, "max_sequence_length": 12, "output_type": "pt"}
    for guidance, negative, equal in ((3.0, "a grey blur", True), (1.0, "a grey blur", False), (3.0, "", False)):
        expected = pipeline(
            PROMPTS[:2], negative_prompt=[negative] * 2, guidance_scale=guidance, latents=noise, **call
        ).images  # the adapter is new, so the base's images
        rewards = [record["rewards"]["redness"] for record in trainer.eval_records]
        assert (rewards == pytest.approx(expected[:, 0].mean((1, 2)).tolist(), abs=1e-5)) is equal


def test_the_default_settings_train_an_iteration_and_evaluate(pipeline, tmp_path):
    shown = []

    def seen(images, **kwargs):
        shown.append(len(images))
        return images[:, 0].mean((1, 2)).tolist()

    class OneIteration(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == trainer.updates_per_iteration

    args = APEXConfig(output_dir=str(tmp_path), use_cpu=True)
    rows = Dataset.from_dict({"prompt": PROMPTS[:1]})
    trainer = APEXTrainer(pipeline, [seen, contrast], args, rows, rows, callbacks=[OneIteration()])
    before = weights(trainer)
    trainer.train()
    assert shown.pop(0) == 1, "the start, of one prompt"
    assert shown.pop() == 1, "the evaluation at the end"
    assert sum(shown) == args.generation_batch_size == args.num_generations == 8
    assert trainer.state.global_step == trainer.updates_per_iteration == args.num_inference_steps - 1
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())
    assert trainer.state.log_history[-1]["eval_rewards/seen/mean"] > 0
