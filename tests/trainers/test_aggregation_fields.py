"""The options of the aggregator in the trainers' configurations: new places, old names, and what a user is told."""

import json

import pytest
from transformers import TrainerCallback

from trl_apex import APEXConfig, APEXGRPOConfig, APEXTrainer
from trl_apex.aggregation import ApexOptions
from trl_apex.cli import all_options, train_options
from trl_apex.trainers.config import FLAT, OLD

PLAIN = {"output_dir": "run", "use_cpu": True, "bf16": False}


@pytest.mark.parametrize("cls", [APEXConfig, APEXGRPOConfig])
@pytest.mark.parametrize(
    "given",
    [ApexOptions(scale_blend=0.5), {"scale_blend": 0.5}, '{"scale_blend": 0.5}'],
    ids=["object", "dict", "json"],
)
def test_all_options_go_in_one_argument(cls, given):
    config = cls(**PLAIN, aggregation_options=given, need_coef=2.0)
    assert config.apex_options() == ApexOptions(scale_blend=0.5, need_coef=2.0)
    saved = json.loads(config.to_json_string())
    assert saved["aggregation_options"] == {"scale_blend": 0.5} and saved["need_coef"] == 2.0
    assert not set(OLD) & set(saved) and set(FLAT) <= set(saved)
    again = cls(**{**PLAIN, "aggregation_options": saved["aggregation_options"], "need_coef": saved["need_coef"]})
    assert again.apex_options() == config.apex_options()


@pytest.mark.parametrize("cls", [APEXConfig, APEXGRPOConfig])
def test_names_of_0_1_0_are_taken_with_a_warning(cls):
    with pytest.warns(FutureWarning) as caught:
        config = cls(**PLAIN, scale_blend=0.5, need_temperature=1.0)
    texts = [str(warning.message) for warning in caught if warning.filename == __file__]
    assert any("Pass aggregation_options={'scale_blend': 0.5, 'need_temperature': 1.0}." in text for text in texts)
    assert config.apex_options() == ApexOptions(scale_blend=0.5, need_temperature=1.0)
    assert json.loads(config.to_json_string())["aggregation_options"] == {"scale_blend": 0.5, "need_temperature": 1.0}


def test_names_of_0_1_0_are_taken_from_yaml_and_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("scale_blend: 0.5\nadaptive_priorities: false\nuse_cpu: true\noutput_dir: run\n")
    with pytest.warns(FutureWarning, match="Found the fields .*z_clip"):
        config = train_options(["--config", str(path), "--z_clip", "3"])[-1]
    assert config.apex_options() == ApexOptions(scale_blend=0.5, adaptive_priorities=False, z_clip=3.0)
    path.write_text("aggregation_options: {scale_blend: 0.5}\nneed_coef: 2\nuse_cpu: true\noutput_dir: run\n")
    assert train_options(["--config", str(path)])[-1].apex_options() == ApexOptions(scale_blend=0.5, need_coef=2.0)
    flags = ["--aggregation_options", '{"z_clip": 3}', "--use_cpu", "true", "--output_dir", "run"]
    assert train_options(flags)[-1].apex_options() == ApexOptions(z_clip=3)
    text = all_options()
    assert "--aggregation_options" in text and "--need_coef" in text and "--scale_blend" not in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"aggregation_options": {"tau": 1.0}}, "must be fields of ApexOptions. Found tau"),
        ({"aggregation_options": {"z_clip": 0.0}}, "`z_clip` must be positive"),
        ({"aggregation_options": "z_clip=0"}, "must be JSON. Found 'z_clip=0'"),
        ({"aggregation_options": {"need_coef": 3.0}, "need_coef": 2.0}, "one value. Found 2.0, and 3.0"),
        (
            {"aggregation_options": {"scale_rewards": "batch"}, "scale_rewards": "none"},
            "`scale_rewards` must have one",
        ),
        ({"aggregation_options": {"adaptive_priorities": "no"}}, "must be True or False. Found 'no'"),
    ],
)
def test_wrong_options_say_what_to_do(values, message):
    for cls in (APEXConfig, APEXGRPOConfig):
        with pytest.raises(ValueError, match=message):
            cls(**PLAIN, **values)


def test_weights_that_a_callback_changes_count_in_the_next_rollout(pipeline, dataset, lora, make_args):
    def redness(images, **others):
        return images[:, 0].mean((1, 2)).tolist()

    def contrast(images, **others):
        return (100 * images.std((1, 2, 3))).tolist()

    class Annealing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.reward_weights = trainer.reward_weights.new_tensor([1.0, 9.0])

    args = make_args(max_steps=4, aggregation_options={"adaptive_priorities": False})
    trainer = APEXTrainer(pipeline, [redness, contrast], args, dataset, peft_config=lora, callbacks=[Annealing()])
    trainer.train()
    used = [row["priority/contrast"] for row in trainer.state.log_history if "priority/contrast" in row]
    assert used[0] == pytest.approx(0.5) and used[-1] == pytest.approx(0.9)


def test_rewards_of_one_name_are_numbered_with_one_warning(pipeline, dataset, lora, make_args):
    def brightness(images, **others):
        return images.mean((1, 2, 3)).tolist()

    with pytest.warns(UserWarning, match=r"named \['brightness', 'brightness_2', 'brightness_3'\] here"):
        trainer = APEXTrainer(
            pipeline, [brightness] * 2, make_args(max_steps=2), dataset, peft_config=lora, monitor_funcs=[brightness]
        )
    trainer.train()
    assert "priority/brightness_2" in trainer.state.log_history[0]
    assert "eval_rewards/brightness_3/mean" in trainer.evaluate(dataset)
