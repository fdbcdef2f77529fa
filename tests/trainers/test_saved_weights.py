"""What `evaluate` draws with is what `save_model`, a checkpoint's adapter and an upload hold: plain diffusers draws its images."""

import dataclasses

import adapter_trainers
import pytest
import torch
from adapter_trainers import PROMPTS, build, distance, draw, plain_call
from diffusers import AutoModel
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig
from safetensors.torch import load_file

from trl_apex import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_apex.diffusion.families import load_policy
from trl_apex.diffusion.rollout import evaluation_noise
from trl_apex.trainers import adapters, weights

FILE = weights.LORA_FILE


def make(output_dir, peft_config, name="sd3", adapter=None, **overrides):
    options = {"max_steps": 2, "learning_rate": 1e-2, **overrides}
    return adapter_trainers.make(build(name), output_dir, peft_config, adapter, **options)


def evaluated(trainer):
    """The images of `evaluate`, before they are rounded to pixels."""
    seen = []

    def record(images, **columns):
        seen.append(images.clone())
        return [0.0] * len(images)

    funcs, names = trainer.reward_funcs, trainer.reward_func_names
    trainer.reward_funcs, trainer.reward_func_names = [record], ["record"]
    trainer.evaluate()
    trainer.reward_funcs, trainer.reward_func_names = funcs, names
    return torch.cat(seen)


def plain(folder, trainer, name="sd3", lora=True):
    """What diffusers alone draws with the weights in `folder`, from the noise of `evaluate`."""
    pipeline = build(name)
    if lora:
        pipeline.load_lora_weights(str(folder), weight_name=FILE)
    else:
        part = load_policy(pipeline).denoiser_name
        setattr(pipeline, part, AutoModel.from_pretrained(str(folder), subfolder=part))
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    noise = evaluation_noise(5, [0, 1], trainer.latent_shape)
    return draw(pipeline, PROMPTS["prompt"][:], 2, noise, size=(trainer.height, trainer.width))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_the_average_is_evaluated_and_saved(lora, tmp_path):
    peft_config = LoraConfig(r=2, lora_alpha=8, init_lora_weights="gaussian") if lora else None
    rate = 3e-2 if lora else 1e-3
    options = {"ema_decay": 0.5, "learning_rate": rate, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer = make(tmp_path / "run", peft_config, **options)
    trainer.train()
    images = evaluated(trainer)
    trainer.save_model()
    assert distance(plain(tmp_path / "run", trainer, lora=lora), images) < 1e-5
    trainer._ema.copy = None  # without the average it would draw otherwise
    assert distance(evaluated(trainer), images) > 1e-3
    if lora:
        last = tmp_path / "run" / "checkpoint-4"
        assert distance(plain(last, trainer), images) < 1e-5
        raw, own = load_file(last / "adapter_model.safetensors"), load_file(tmp_path / "run/adapter_model.safetensors")
        name = next(key for key in raw if "lora_B" in key)
        assert torch.equal(raw[name], trainer.model.state_dict()[name.replace(".weight", ".default.weight")])
        assert not torch.equal(raw[name], own[name])
        further = make(tmp_path / "further", None, adapter=str(last), learning_rate=0.0)
        assert distance(evaluated(further), images) < 1e-6


def of_every_option():
    """A value other than the default for each option of LoraConfig."""
    return {
        "r": 3, "lora_alpha": 5, "target_modules": ["attn.to_q", "proj_out"], "use_rslora": True, "use_dora": True,
        "exclude_modules": ["transformer_blocks.0.attn.to_q"], "layers_to_transform": [0],
        "layers_pattern": "transformer_blocks", "rank_pattern": {"attn.to_q": 5}, "alpha_pattern": {"attn.to_q": 7},
        "lora_bias": True, "task_type": "CAUSAL_LM", "inference_mode": True, "init_lora_weights": "orthogonal",
        "base_model_name_or_path": "a/b", "revision": "main", "auto_mapping": {}, "peft_version": "0.1",
        "peft_type": "LORA", "lora_dropout": 0.1, "bias": "lora_only", "modules_to_save": ["proj_out"],
        "fan_in_fan_out": True, "megatron_config": {"a": 1}, "megatron_core": "other", "trainable_token_indices": [0],
        "loftq_config": {"loftq_bits": 4}, "eva_config": "any", "corda_config": "any", "lora_ga_config": "any",
        "velora_config": {"a": 1}, "alora_invocation_tokens": [1], "use_qalora": True, "qalora_group_size": 8,
        "monteclora_config": "any", "layer_replication": [(0, 1)], "runtime_config": "any",
        "target_parameters": ["proj_out.weight"], "use_bdlora": "any", "arrow_config": "any", "kasa_config": "any",
        "ensure_weight_tying": True,
    }  # fmt: skip


FIELDS = [field.name for field in dataclasses.fields(LoraConfig)]


def test_every_option_of_lora_config_is_known_to_the_tests():
    assert set(of_every_option()) >= set(FIELDS)


@pytest.mark.parametrize("option", FIELDS)
def test_an_option_of_lora_config_is_delivered_or_refused(option, tmp_path):
    config = LoraConfig(r=2, lora_alpha=6)
    name = "sd1.5" if option.startswith("layers_") else "sd3"
    config.layers_to_transform = [0] if option == "layers_pattern" else None
    setattr(config, option, of_every_option()[option])
    before = {name: getattr(config, name) for name in FIELDS}
    if option not in adapters.DELIVERED | adapters.WITHOUT_EFFECT or option == "lora_dropout":
        with pytest.raises(ValueError, match=f"`{option}`"):
            make(tmp_path, config)
        return
    trainer = make(tmp_path, config, name, learning_rate=1e-1)
    assert {name: getattr(config, name) for name in FIELDS} == before, "the user's own is not written into"
    start = evaluated(trainer)
    assert distance(start, evaluated(make(tmp_path, None, name))) < 1e-6  # a new adapter draws what the base draws
    trainer.train()
    images = evaluated(trainer)
    assert distance(images, start) > 1e-4
    trainer.save_model()
    assert distance(plain(tmp_path, trainer, name), images) < 1e-5


@pytest.mark.parametrize("kind", sorted(PEFT_TYPE_TO_CONFIG_MAPPING.keys() - {"LORA"}))
def test_every_other_kind_of_adapter_is_refused_by_name(kind):
    config = object.__new__(PEFT_TYPE_TO_CONFIG_MAPPING[kind])
    config.peft_type = kind
    with pytest.raises(ValueError, match=f"must be a `peft.LoraConfig`.*Found {type(config).__name__}"):
        adapters._check_options(config)


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_4", "olora", "eva", "corda", "loftq", "lora_ga", "mica"])
def test_initialisations_that_change_the_base_are_refused(value, tmp_path):
    config = LoraConfig(r=2)
    config.init_lora_weights = value
    with pytest.raises(ValueError, match=f"`init_lora_weights` must be one of.*Found '{value}'"):
        make(tmp_path, config)


def test_convolutions_of_a_unet_and_layers_by_pattern_are_delivered(tmp_path):
    config = LoraConfig(r=2, lora_alpha=6, target_modules=r".*(conv1|to_q|time_emb_proj)")
    trainer = make(tmp_path, config, "sd1.5", learning_rate=1e-1)
    trainer.train()
    images = evaluated(trainer)
    trainer.save_model()
    assert distance(plain(tmp_path, trainer, "sd1.5"), images) < 1e-5


def test_a_save_that_misses_weights_and_a_load_that_takes_a_part_are_errors(tmp_path):
    trainer = make(tmp_path / "run", LoraConfig(r=2))
    state = trainer.model.state_dict()
    del state[next(name for name in state if "lora_A" in name)]
    with pytest.raises(RuntimeError, match=r"all its (\d+) layers, \d+ in all. Found \d+"):
        weights.save_diffusers_lora(trainer.model, trainer.policy, tmp_path / "run", state)
    assert not (tmp_path / "run" / FILE).exists()
    trainer = make(tmp_path / "dual", LoraConfig(r=2, target_modules=["attn2.to_q", "to_k"]), "sd3.5-medium")
    trainer.save_model()
    # sd3 has no attn2
    with pytest.raises(ValueError, match="must load completely. Found .* of which the transformer took"):
        make(tmp_path / "run", None, adapter=str(tmp_path / "dual"))


def test_all_weights_of_a_pipeline_in_bf16_are_trained_in_float32_at_a_rate_of_their_own(tmp_path, monkeypatch):
    pipeline = build("sd3").to(torch.bfloat16)
    values = {"output_dir": str(tmp_path), "use_cpu": True, "num_generations": 2, "per_device_train_batch_size": 4}
    args = DiffusionGRPOConfig(**values, height=16, width=16, num_inference_steps=2, max_sequence_length=12)

    def trainer(model, peft_config=None):
        return DiffusionGRPOTrainer(
            model, [lambda images, **columns: [0.0] * len(images)], args, PROMPTS, peft_config=peft_config
        )

    full = trainer(pipeline)
    assert {p.dtype for p in full.model.parameters()} == {torch.float32}
    assert full.args.learning_rate == 1e-5
    assert trainer(build("sd3"), LoraConfig(r=2)).args.learning_rate == 3e-4
    assert args.learning_rate is None, "the same arguments serve both"
    monkeypatch.setattr(weights, "MANY_WEIGHTS", 1000)
    with pytest.warns(UserWarning, match="All 0.0 billion weights of SD3Transformer2DModel.*peft_config=LoraConfig"):
        trainer(build("sd3"))


def test_training_anew_after_a_resume_starts_a_new_average(tmp_path):
    trainer = make(tmp_path, LoraConfig(r=2), ema_decay=0.5, save_strategy="steps", save_steps=1)
    trainer.train()
    for checkpoint in (str(tmp_path / "checkpoint-1"), None):
        trainer.train(resume_from_checkpoint=checkpoint)
        first, last = (load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 2))
        average = load_file(tmp_path / "checkpoint-2" / "ema.safetensors")
        for name, value in first.items():
            found = average[name.replace(".weight", ".default.weight")]
            torch.testing.assert_close(found, (value + last[name]) / 2, atol=1e-7, rtol=0)


def test_evaluation_draws_at_a_size_of_its_own(tmp_path):
    trainer = make(tmp_path, LoraConfig(r=2), name="qwen-image", eval_height=24, eval_width=32)
    pipeline = build("qwen-image")
    noise = evaluation_noise(5, [0, 1], trainer.policy.latent_shape(24, 32))
    call = {**plain_call(pipeline, noise), "height": 24, "width": 32, "num_inference_steps": 2}
    assert distance(evaluated(trainer), pipeline(prompt=PROMPTS["prompt"][:], **call).images) < 1e-4
    assert trainer.latent_shape == trainer.policy.latent_shape(16, 16)
    with pytest.raises(ValueError, match="multiples of 4 pixels.*Found 18 x 16"):
        make(tmp_path, LoraConfig(r=2), name="qwen-image", eval_height=18)
