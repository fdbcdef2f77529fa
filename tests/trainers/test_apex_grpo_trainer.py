"""APEX in TRL's own trainer: a tiny language model and a tiny vision-language model are really trained."""

import inspect
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from tiny_language_models import tiny_causal_lm, tiny_tokenizer, tiny_vlm
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_apex import APEXConfig, APEXGRPOConfig, APEXGRPOTrainer
from trl_apex.aggregation import ApexOptions
from trl_apex.trainers.config import OF_TRL


def share_of(word: str, scale: float):
    """Rewards the share of `word` in what was written; two of these cannot both be 1."""

    def reward(completions, **kwargs):
        return [scale * text.split().count(word) / 8 for text in completions]

    reward.__name__ = f"many_{word}"
    return reward


LOUD, QUIET = share_of("a", 10.0), share_of("b", 0.01)


def settings(directory, **changes):
    values = {
        "output_dir": str(directory),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 16,
        "generation_batch_size": 32,
        "gradient_accumulation_steps": 2,
        "num_generations": 8,
        "max_completion_length": 8,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1.0,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "max_steps": 2,
        "seed": 3,
    }
    return {**values, **changes}


def prompts(rows: int = 32) -> Dataset:
    return Dataset.from_dict({"prompt": ["say c d", "say e f", "say g", "say h c"] * (rows // 4)})


def trainer(directory, rewards=(LOUD, QUIET), kind=APEXGRPOTrainer, config=APEXGRPOConfig, data=None, **changes):
    arguments = config(**settings(directory, **changes))
    return kind(
        tiny_causal_lm(),
        list(rewards),
        arguments,
        prompts() if data is None else data,
        processing_class=tiny_tokenizer(),
    )


def column(log_history, key):
    return [row[key] for row in log_history if key in row]


def test_both_of_two_conflicting_rewards_rise_where_the_plain_sum_drops_one(tmp_path):
    gains = {}
    for rule in ("apex", "sum_then_normalize"):
        run = trainer(tmp_path / rule, max_steps=60, multi_objective_aggregation=rule)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.train()
        hijacked = any("'many_a' has owned more than 70%" in str(warning.message) for warning in caught)
        assert hijacked == (rule == "sum_then_normalize")
        logs = run.state.log_history
        for name in ("many_a", "many_b"):
            values = column(logs, f"rewards/{name}/mean")
            gains[rule, name] = sum(values[-10:]) / sum(values[:10])
    assert gains["apex", "many_a"] > 1.3, gains
    assert gains["apex", "many_b"] > 1.3, gains
    assert gains["sum_then_normalize", "many_a"] > 2, gains
    assert gains["sum_then_normalize", "many_b"] < 1, gains


def test_the_update_uses_the_aggregators_advantages_and_logs_its_keys(tmp_path):
    run = trainer(tmp_path, log_completions=True, num_completions_to_print=0)
    seen = []
    inner = run.aggregator.__class__.__call__

    class Recording(run.aggregator.__class__):
        def __call__(self, rewards, group_ids, **kwargs):
            result = inner(self, rewards, group_ids, **kwargs)
            seen.append((rewards.clone(), group_ids.clone(), result[0].clone()))
            return result

    run.aggregator.__class__ = Recording
    used = []
    loss = run._compute_loss
    run._compute_loss = lambda model, inputs: used.append(inputs["advantages"].clone()) or loss(model, inputs)
    run.train()
    rewards, groups, advantages = seen[0]
    assert rewards.shape == (32, 2) and groups.tolist() == [i // 8 for i in range(32)]
    assert sorted(torch.cat(used[:2]).tolist()) == pytest.approx(sorted(advantages.tolist()), abs=1e-6)
    keys = set(run.state.log_history[0])
    for key in ("priority", "potential", "conflict_penalty", "need", "hijack_share", "advantage_std"):
        assert {f"{key}/many_a", f"{key}/many_b"} <= keys
    assert "conflict/many_a/many_b" in keys
    assert list(run._logs["advantages"]) == pytest.approx(seen[-1][2].tolist(), abs=1e-6)


@pytest.mark.parametrize("rule", ["sum_then_normalize", "normalize_then_sum"])
def test_trls_own_rules_give_the_weights_of_trls_own_trainer(tmp_path, rule):
    weights = {"reward_weights": [1.0, 3.0], "multi_objective_aggregation": rule, "max_steps": 3}
    ours = trainer(tmp_path / "ours", **weights)
    ours.train()
    theirs = trainer(tmp_path / "theirs", kind=GRPOTrainer, config=GRPOConfig, **weights)
    theirs.train()
    for own, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    assert column(ours.state.log_history, "reward") == column(theirs.state.log_history, "reward")


def test_a_missing_reward_is_masked_and_an_unscorable_completion_teaches_nothing(tmp_path):
    def half(completions, **kwargs):
        return [None if i % 2 else float(len(text)) for i, text in enumerate(completions)]

    def none(completions, **kwargs):
        return [None] * len(completions)

    run = trainer(tmp_path, rewards=(half, none), max_steps=1)
    kept = []
    loss = run._compute_loss
    run._compute_loss = lambda model, inputs: kept.append(inputs["advantages"]) or loss(model, inputs)
    run.train()
    row = run.state.log_history[0]
    assert row["missing/half"] == 0.5 and row["missing/none"] == 1.0
    assert (torch.cat(kept) == 0).sum() >= 16
    assert all(math.isfinite(value) for key, value in row.items() if key.startswith(("priority/", "hijack_share/")))


def test_resume_from_a_checkpoint_continues_the_same_run(tmp_path):
    def fresh(name, **changes):
        return trainer(
            tmp_path / name, data=prompts(64), save_strategy="steps", save_steps=3.0, warmup_iterations=1, **changes
        )

    whole = fresh("whole", max_steps=6)
    whole.train()
    state_file = tmp_path / "whole/checkpoint-3/aggregator_state.json"
    assert json.loads(state_file.read_text())["iteration"] == 3
    resumed = fresh("whole", max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert resumed.aggregator.state_dict() == whole.aggregator.state_dict()
    for own, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    plain = trainer(tmp_path, kind=GRPOTrainer, config=GRPOConfig, save_strategy="steps", save_steps=1.0, max_steps=1)
    plain.train()
    with pytest.raises(ValueError, match="must hold the state of the aggregator"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_state_of_a_wrong_form_is_refused_before_anything_is_loaded(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=1.0, max_steps=1).train()
    (tmp_path / "checkpoint-1" / "aggregator_state.json").write_text("[]")
    (tmp_path / "checkpoint-1" / "model.safetensors").unlink()  # would be the first to be missed
    with pytest.raises(ValueError, match="aggregator_state.json must hold a JSON object. Found list"):
        trainer(tmp_path).train(True)


def test_evaluation_reports_the_metrics_and_leaves_the_state_alone(tmp_path):
    run = trainer(tmp_path, max_steps=1, per_device_eval_batch_size=8, num_generations_eval=4)
    run.train()
    before = run.aggregator.state_dict()
    scores = run.evaluate(prompts(4))
    assert run.aggregator.state_dict() == before
    assert scores["eval_loss"] == pytest.approx(scores["eval_loss"])
    logged = run.state.log_history[-1]
    assert "eval_hijack_share/many_a" in logged and "eval_rewards/many_b/mean" in logged


def test_a_plain_grpo_config_keeps_every_value_and_gets_apex(tmp_path):
    plain = GRPOConfig(**settings(tmp_path, epsilon=0.13, num_iterations=2, scale_rewards="batch", temperature=0.9))
    upgraded = APEXGRPOConfig.from_grpo_config(plain)
    assert upgraded.multi_objective_aggregation == "apex" and upgraded.warmup_iterations == 10
    for name, value in vars(plain).items():
        if name != "multi_objective_aggregation":
            assert getattr(upgraded, name) == value, name
    run = APEXGRPOTrainer(tiny_causal_lm(), [LOUD, QUIET], plain, prompts(), processing_class=tiny_tokenizer())
    run.train()
    assert run.aggregator.rule == "apex" and run.epsilon_low == 0.13 and run.num_iterations == 2


def test_every_field_of_trls_config_is_there_with_trls_default():
    theirs = {f.name: f for f in GRPOConfig.__dataclass_fields__.values()}
    ours = {f.name: f for f in APEXGRPOConfig.__dataclass_fields__.values()}
    changed = {
        name for name in theirs if name not in ours or (theirs[name].default, theirs[name].init) != (
            ours[name].default, ours[name].init
        )
    }  # fmt: skip
    assert changed == {"multi_objective_aggregation"}
    both = set(theirs) & {f.name for f in ApexOptions.__dataclass_fields__.values()}
    assert both == set(OF_TRL), f"trl {trl.__version__} has an option of the aggregator's name: {both}"


def test_the_output_directory_is_the_first_argument(tmp_path):
    for config in (APEXGRPOConfig, APEXConfig, GRPOConfig):
        assert config(str(tmp_path), use_cpu=True, bf16=False).output_dir == str(tmp_path)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
def test_the_folder_is_named_after_the_model_and_the_card_cites_apex(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Without arguments TRL asks for bf16, and transformers for a GPU that has it.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    model = tiny_causal_lm()
    model.config._name_or_path = "somebody/tiny-talker"
    run = APEXGRPOTrainer(model, [LOUD, QUIET], None, prompts(), processing_class=tiny_tokenizer())
    assert run.args.output_dir == "tiny-talker-APEX"
    run.create_model_card()
    card = Path("tiny-talker-APEX/README.md").read_text()
    assert "2601.06574" in card and "DeepSeekMath" not in card


def test_weights_that_a_callback_changes_count_in_the_next_update(tmp_path):
    class Annealing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            run.reward_weights = torch.tensor([1.0, 9.0])

    for rule in ("apex", "sum_then_normalize"):
        run = trainer(tmp_path / rule, multi_objective_aggregation=rule, generation_batch_size=16, max_steps=3)
        run.add_callback(Annealing())
        run.train()
        used = column(run.state.log_history, "priority/many_b")
        assert used[0] == pytest.approx(0.5) and used[1] == pytest.approx(0.9) and used[2] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_weights": [1.0, -1.0]}, "`reward_weights` of a trainer.*rule that takes negative weights: sum_then"),
        ({"multi_objective_aggregation": "sum"}, "must be one of apex, sum_then_normalize"),
        ({"aggregation_options": {"conflict_source": "gradient"}}, "has no gradient probe"),
        ({"priority_floor": 3.0}, r"must lie in \[0, 1\]"),
    ],
)
def test_wrong_options_say_what_to_do(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **changes)


def test_rewards_of_one_name_are_numbered_with_one_warning(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(tmp_path, rewards=(LOUD, share_of("a", 1.0)), max_steps=1)
    told = [str(warning.message) for warning in caught if "Reward names" in str(warning.message)]
    assert len(told) == 1 and "named ['many_a', 'many_a_2'] here" in told[0]
    run.train()
    assert {"priority/many_a", "priority/many_a_2", "rewards/many_a_2/mean"} <= set(run.state.log_history[0])


def test_a_vision_language_model_trains_on_images(tmp_path):
    from PIL import Image

    model, processor = tiny_vlm()
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90)] * 4
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": "say see"}]] * 16,
            "image": [Image.new("RGB", (8, 8), colour) for colour in colours],
        }
    )

    def many(word, scale):
        plain = share_of(word, scale)

        def reward(completions, image, **kwargs):
            assert len(image) == len(completions)
            return plain([turn[0]["content"] for turn in completions])

        reward.__name__ = f"many_{word}"
        return reward

    run = APEXGRPOTrainer(
        model,
        [many("a", 10.0), many("b", 0.01)],
        APEXGRPOConfig(**settings(tmp_path, per_device_train_batch_size=8, generation_batch_size=16)),
        data,
        processing_class=processor,
    )
    before = {name: value.clone() for name, value in model.named_parameters()}
    run.train()
    assert len(run.state.log_history) == 3 and "hijack_share/many_b" in run.state.log_history[0]
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert any("vision" in name for name in moved) and any("language" in name for name in moved)


def test_the_seam_in_trl_has_not_moved():
    """Names what an installed TRL release has changed under `APEXGRPOTrainer`."""
    expected = {
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_load_optimizer_and_scheduler": ["self", "checkpoint"],
        "save_model": ["self", "output_dir", "_internal_call"],
    }
    release = f"trl {trl.__version__}"
    for method, parameters in expected.items():
        found = getattr(GRPOTrainer, method, None)
        assert found is not None, f"{release} has no GRPOTrainer.{method}"
        now = list(inspect.signature(inspect.unwrap(found)).parameters)
        assert now == parameters, f"{release} calls GRPOTrainer.{method} with {now} instead of {parameters}"
    source = Path(inspect.getsourcefile(GRPOTrainer)).read_text()
    for text in (
        "rewards_per_func = self._calculate_rewards(",
        '"advantages": advantages,',
        "self.multi_objective_aggregation = args.multi_objective_aggregation",
        'self._logs["advantages"].extend(',
        "self._step % generate_every == 0 or self._buffered_inputs is None",
        "self.reward_func_names = []",
    ):
        assert text in source, f"{release} no longer contains `{text}` in its GRPO trainer"


def test_an_adapter_trains_and_resumes_inside_an_iteration(tmp_path):
    from peft import LoraConfig

    def fresh(**changes):
        values = {"steps_per_generation": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        arguments = APEXGRPOConfig(
            **settings(
                tmp_path, generation_batch_size=None, save_strategy="steps", save_steps=3.0, **values, **changes
            )
        )
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return APEXGRPOTrainer(
            tiny_causal_lm(),
            [LOUD, QUIET],
            arguments,
            prompts(64),
            processing_class=tiny_tokenizer(),
            peft_config=adapter,
        )

    first = fresh(max_steps=3)  # two updates an iteration: stops in the middle of the second
    first.train()
    assert first.aggregator.iteration == 2 and (tmp_path / "checkpoint-3/adapter_model.safetensors").is_file()
    resumed = fresh(max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    # The second iteration is completed on fresh completions, the third starts where the data do.
    assert resumed.aggregator.iteration == 4 and resumed.state.global_step == 6 and resumed._step == 12
