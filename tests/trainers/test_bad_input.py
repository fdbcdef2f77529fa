"""What cannot work is refused before any compute, with what was expected, what was found and what to do."""

import copy
import dataclasses
import functools

import pytest
import torch
from adapter_trainers import build, make
from datasets import Dataset
from diffusers import FlowMatchHeunDiscreteScheduler
from peft import LoraConfig
from toy_rewards import contrast, redness
from trl import GRPOConfig

from trl_apex import APEXConfig, APEXTrainer, DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_apex.tiny.world import weights_path
from trl_apex.trainers.config import HARMLESS_FIELDS, HONOURED_FIELDS, REFUSED_FIELDS


def constructed(pipeline, dataset, lora, args, **overrides):
    values = {"model": pipeline, "reward_funcs": [redness, contrast], "args": args, "train_dataset": dataset}
    return APEXTrainer(**{**values, "peft_config": lora, **overrides})


def named(name):
    reward = functools.partial(redness)
    return reward if name == "partial" else redness


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"reward_funcs": []}, "at least one reward function"),
        ({"reward_funcs": ["some/reward-model"]}, "must be one of aesthetic.*Found 'some/reward-model'"),
        ({"reward_funcs": ["pickscor"]}, "Found 'pickscor'. Did you mean 'pickscore'"),
        ({"reward_funcs": [3]}, r"must be functions or callable objects. Found 3 \(int\)"),
        ({"train_dataset": None}, "datasets.Dataset.*Found NoneType"),
        ({"train_dataset": Dataset.from_dict({"caption": ["a"]})}, "`prompt` column.*caption"),
        ({"train_dataset": Dataset.from_dict({"prompt": []})}, "at least one prompt"),
        ({"train_dataset": Dataset.from_dict({"prompt": ["a"]})}, "needs 2 prompts.*Found a dataset of 1"),
        ({"train_dataset": Dataset.from_dict({"prompt": [["chat"], ["chat"]]})}, "must be a string.*list in row 0"),
        ({"eval_dataset": Dataset.from_dict({"text": ["a"]})}, "`eval_dataset` must have a `prompt` column"),
        ({"peft_config": LoraConfig(target_modules=["to_q", "nowhere"])}, "must match.*nowhere.*to_q"),
        ({"peft_config": LoraConfig(lora_dropout=0.1)}, "`lora_dropout` must be 0"),
        ({"quantization_config": object()}, "`quantization_config` must be one that diffusers knows"),
        ({"callbacks": object()}, "`callbacks` must be a list. Found object"),
    ],
)
def test_bad_arguments(pipeline, dataset, lora, make_args, overrides, message):
    with pytest.raises(ValueError, match=message):
        constructed(pipeline, dataset, lora, make_args(), **overrides)


def test_rewards_may_be_named(pipeline, dataset, lora, make_args):
    named = {"reward_funcs": ["jpeg_compressibility", redness], "monitor_funcs": "jpeg_incompressibility(quality=50)"}
    trainer = constructed(pipeline, dataset, lora, make_args(), **named)
    assert trainer.reward_func_names == ["jpeg_compressibility", "redness"]
    assert trainer.monitor_funcs[0].quality == 50


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"reward_weights": [1.0]}, "one number per objective.*Found 1"),
        ({"reward_weights": [1.0, -1.0]}, "must not be negative"),
        ({"reward_weights": [0.0, 0.0]}, "not all zero"),
        ({"gradient_accumulation_steps": 3}, "whole updates.*gradient_accumulation_steps=2"),
        ({"transition": "ddim"}, "`transition` must be one of.*flow_sde"),
        ({"height": 30}, "multiples of 4 pixels.*Found 30 x 32"),
        ({"sde_window_size": 5}, "sde_window_range"),
        ({"num_inference_steps": 1}, "at least 2"),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_rewards(pipeline, dataset, lora, make_args, overrides, message):
    with pytest.raises(ValueError, match=message):
        constructed(pipeline, dataset, lora, make_args(**overrides))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"generation_batch_size": 12, "num_generations": 8, "per_device_train_batch_size": 4},
            "divisible by num_gen",
        ),
        ({"num_generations": 1}, "at least 2.*Found 1"),
        ({"temperature": 0.7}, "`temperature` must stay.*no meaning"),
        ({"use_vllm": True}, "`use_vllm` must stay.*no meaning"),
        ({"multi_objective_aggregation": "average"}, "must be one of apex"),
        ({"noise_level": 0.0}, "`noise_level` must be positive"),
        ({"rollout_solver": "rk4"}, "`rollout_solver` must be one of euler, heun, dpmpp_2m. Found 'rk4'"),
        ({"ratio_guard": "kl_mask", "loss_type": "fpo"}, "`ratio_guard` needs loss_type='grpo'"),
        ({"ratio_guard": "kl_mask", "delta": 2.0}, "`delta` has no effect"),
        ({"timestep_shift": -1.0}, "`timestep_shift` must be positive"),
        ({"nft_beta": 0}, "`nft_beta` must be positive"),
        (
            {"loss_type": "fpo", "guidance_scale": None, "anchor_decay": [0, 0.1, 0.5]},
            "`anchor_decay` needs loss_type 'nft'",
        ),
        (
            {"loss_type": "nft", "guidance_scale": None, "anchor_decay": [0, 0.1, 1.0]},
            "the last below 1.*Found .0, 0.1, 1.0",
        ),
        ({"awm_trust_region": -1.0}, "`awm_trust_region` must be at least 0"),
        ({"num_generations_eval": 2}, "one image per prompt"),
        ({"ds3_gather_for_generation": False}, "Use `gather_for_rollout`"),
        ({"accelerator_config": {"dispatch_batches": True}}, "`dispatch_batches` off"),
        ({"timestep_batch_size": 0}, "`timestep_batch_size`"),
        ({"ema_decay": 1.5}, "`ema_decay`"),
        ({"aggregation_options": {"priority_temperature": -1.0}}, "priority_temperature"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"updates_per_iteration": 2, "generation_batch_size": None}, "needs `generation_batch_size`"),
        ({"updates_per_iteration": 2, "gradient_accumulation_steps": 2}, "leave out the other"),
        ({"updates_per_iteration": 3}, "must divide.*1 x 2 / 1. Found 3"),
        ({"torch_compile": True}, "`torch_compile` must stay.*compile_denoiser=True"),
        ({"compile_denoiser": True, "gradient_probe": True}, "Turn off one of the two"),
        ({"enable_jit_checkpoint": True}, "inside an iteration.*SIGTERM.*`request_stop`"),
    ],
)
def test_bad_configuration(make_args, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_args(**overrides)


KL_MASK = {"ratio_guard": "kl_mask"}
CHANGED = {
    "noise_level": 0.8, "transition": "cps", "epsilon": 0.3, "epsilon_high": 0.3, "delta": 2.0, "kl_mask_threshold": 1e-3,
    "timestep_sampling": "uniform", "timestep_range": (0.1, 1.0), "timestep_shift": 2.0, "awm_weighting": "t",
    "awm_trust_region": 0.5, "advantage_max": 2.0, "fpo_scale": 1.0, "nft_beta": 0.5, "ema_update_steps": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "base, effective",
    [
        ({"loss_type": "grpo"}, "noise_level transition epsilon epsilon_high delta"),
        ({"loss_type": "grpo", **KL_MASK}, "noise_level transition epsilon kl_mask_threshold"),
        (
            {"loss_type": "awm", "timestep_sampling": "uniform"},
            "epsilon epsilon_high delta timestep_sampling timestep_range timestep_shift awm_weighting awm_trust_region "
            "advantage_max",
        ),
        ({"loss_type": "nft"}, "timestep_sampling timestep_range nft_beta"),
        ({"loss_type": "fpo"}, "epsilon epsilon_high delta timestep_sampling timestep_range fpo_scale"),
        (
            {"loss_type": "grpo", "ema_decay": 0.9},
            "noise_level transition epsilon epsilon_high delta ema_update_steps",
        ),
    ],
)
def test_options_without_an_effect_are_refused_and_their_defaults_are_not(make_args, base, effective):
    plain = make_args(**base, guidance_scale=None)
    saved = {field: value for field, value in plain.to_dict().items() if field in CHANGED}
    make_args(**saved | base, guidance_scale=None)  # as config.json holds it
    for name, value in CHANGED.items():
        if name in effective.split():
            make_args(**base | {name: value}, guidance_scale=None)
        else:
            with pytest.raises(ValueError, match=f"`{name}` has no effect: it needs .*Leave it out"):
                make_args(**base | {name: value}, guidance_scale=None)


def test_every_inherited_field_is_honoured_refused_or_harmless(make_args):
    inherited = {entry.name: entry for entry in dataclasses.fields(GRPOConfig)}
    assert not HONOURED_FIELDS & HARMLESS_FIELDS
    assert set(inherited) >= REFUSED_FIELDS
    examples = "vllm_mode sapo_temperature_pos vespo_k_pos entropy_target label_smoothing_factor neftune_noise_alpha"
    assert set(examples.split()) <= REFUSED_FIELDS  # a field that a release adds is refused too
    assert {"disable_dropout", "metric_for_best_model", "dataloader_num_workers", "deepspeed"} <= HONOURED_FIELDS
    for name in REFUSED_FIELDS:
        default = getattr(DiffusionGRPOConfig, name, inherited[name].default)
        value = not default if isinstance(default, bool) else 7
        with pytest.raises(ValueError, match=f"`{name}` must stay at its default"):
            make_args(**{name: value})


def test_negative_weights_are_taken_by_trls_own_rules(pipeline, dataset, lora, make_args):
    args = make_args(DiffusionGRPOConfig, reward_weights=[1.0, -1.0])
    trainer = DiffusionGRPOTrainer(pipeline, [redness, contrast], args, dataset, peft_config=lora)
    assert trainer.reward_weights.tolist() == [1.0, -1.0]


def needs_target(prompts, completions, target, **kwargs):
    return [0.0] * len(prompts)


def without_kwargs(prompts, completions):
    return [0.0] * len(prompts)


class Judge:
    def __call__(self, prompts, **kwargs):
        return [0.0] * len(prompts)


@pytest.mark.parametrize(
    "reward, message",
    [
        (needs_target, "`needs_target`.*missing a required argument: 'target'"),
        (without_kwargs, "`without_kwargs`.*unexpected keyword argument 'completion_ids'"),
        (Judge, r"Found the class Judge. Pass `Judge\(...\)`"),
        (max, "`max`.*no signature found"),
    ],
)
def test_a_reward_that_cannot_be_called_is_refused(pipeline, dataset, lora, make_args, reward, message):
    with pytest.raises(ValueError, match=message):
        constructed(pipeline, dataset, lora, make_args(), reward_funcs=[reward])
    with pytest.raises(ValueError, match=message):
        constructed(pipeline, dataset, lora, make_args(), monitor_funcs=[reward], eval_dataset=dataset)


def test_columns_that_no_reward_sees_are_named(pipeline, lora, make_args):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "images": [1, 2], "target": ["c", "d"]})
    with pytest.warns(UserWarning, match="Found images in `train_dataset`"):
        constructed(pipeline, rows, lora, make_args(), reward_funcs=[needs_target])


def test_unknown_key(make_args):
    with pytest.raises(TypeError, match="guidance_scal"):
        make_args(guidance_scal=3.0)


def test_static_trainer_refuses_adaptive_rules(make_args):
    with pytest.raises(ValueError, match="sum_then_normalize, normalize_then_sum.*APEXConfig"):
        make_args(DiffusionGRPOConfig, multi_objective_aggregation="apex")


@pytest.mark.parametrize("output, message", [([1.0], "1.*16|returned 1"), ("good", "str|number")])
def test_reward_that_returns_nonsense_stops_before_an_update(pipeline, dataset, lora, make_args, output, message):
    def nonsense(prompts, **kwargs):
        return [output] * len(prompts) if isinstance(output, str) else output

    trainer = constructed(pipeline, dataset, lora, make_args(), reward_funcs=[nonsense])
    with pytest.raises(ValueError, match="nonsense"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_other_pipelines_and_arguments_are_named(pipeline, dataset, lora, make_args):
    with pytest.raises(ValueError, match="supported text-to-image pipeline.*Found Linear"):
        constructed(torch.nn.Linear(1, 1), dataset, lora, make_args())
    with pytest.raises(ValueError, match="`args` must be a APEXConfig or a trl.GRPOConfig. Found dict"):
        constructed(pipeline, dataset, lora, {"output_dir": "x"})
    with pytest.raises(ValueError, match="`model_init_kwargs` needs `model` to be a name"):
        constructed(pipeline, dataset, lora, make_args(APEXConfig, model_init_kwargs={"variant": "fp16"}))


def test_a_failing_reward_stops_with_a_checkpoint(pipeline, dataset, lora, make_args, tmp_path):
    def broken(prompts, **kwargs):
        raise RuntimeError("no such model")

    trainer = constructed(pipeline, dataset, lora, make_args(max_steps=20), reward_funcs=[broken, redness])
    with (
        pytest.warns(UserWarning, match="no such model"),
        pytest.raises(RuntimeError, match="broken.*max_reward_failure"),
    ):
        trainer.train()
    assert (tmp_path / "run" / f"checkpoint-{trainer.state.global_step}").is_dir()
    assert trainer.state.global_step == trainer.updates_per_iteration


@pytest.mark.parametrize(
    "component, other, message",
    [
        ("scheduler", FlowMatchHeunDiscreteScheduler(), "a FlowMatchEulerDiscreteScheduler.*Found FlowMatchHeun"),
        ("scheduler", None, "Found `scheduler` None"),
        ("text_encoder_2", None, "Found `text_encoder_2` None. Load the pipeline without `text_encoder_2=None`"),
        ("vae", None, "Found `vae` None"),
        ("transformer", None, "Found `transformer` None"),
    ],
)
def test_a_pipeline_that_cannot_be_trained(pipeline, dataset, lora, make_args, component, other, message):
    setattr(pipeline, component, other)
    with pytest.raises(ValueError, match=message):
        constructed(pipeline, dataset, lora, make_args())


def test_projections_that_are_fused_or_cast_are_refused_where_they_would_not_train(pipeline, dataset, lora, make_args):
    cast = copy.deepcopy(pipeline)
    cast.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(ValueError, match="Found layerwise_casting. Undo it"):
        constructed(cast, dataset, None, make_args())
    constructed(cast, dataset, lora, make_args())  # the adapter's own weights are not cast
    pipeline.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="Found fused projections. Undo it .`unfuse_qkv_projections"):
        constructed(pipeline, dataset, lora, make_args())
    pipeline.transformer.unfuse_qkv_projections()
    constructed(pipeline, dataset, lora, make_args())


def test_an_optimizer_of_the_base_is_refused_where_an_adapter_trains(pipeline, dataset, lora, make_args):
    optimizer = torch.optim.SGD(pipeline.transformer.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="Found a SGD of others: a new adapter's weights do not exist"):
        constructed(pipeline, dataset, lora, make_args(), optimizers=(optimizer, None))


def test_a_pipeline_may_be_a_path_and_an_evaluation_set_a_name_among_several(dataset, lora, make_args):
    path = weights_path("pipeline")
    trainer = constructed(path, dataset, lora, make_args(), eval_dataset={"own": dataset, "held_out": "tiny"})
    assert trainer.sources.model == "tiny" and len(trainer.eval_dataset["held_out"]) > len(dataset)


def test_a_distilled_model_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="distilled.*blur.*Train the base model"):
        make(build("flux2-klein-distilled"), tmp_path, LoraConfig(r=2))
