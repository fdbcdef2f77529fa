"""Prompts are encoded once for a whole run, and the encoders leave when nobody needs them."""

import copy

import pytest
import torch
from adapter_trainers import build, make
from datasets import Dataset
from peft import LoraConfig
from tiny_runs import equal_weights, weights_of
from toy_rewards import PROMPTS, contrast, redness

from trl_apex import APEXTrainer

OTHERS = ['a red star with " C O T "', PROMPTS[0]]


@pytest.fixture
def encoded(monkeypatch):
    """The prompts that the pipeline's encoders were asked for."""
    from diffusers import StableDiffusion3Pipeline

    prompts: list[str] = []
    original = StableDiffusion3Pipeline.encode_prompt

    def count(self, prompt, *args, **kwargs):
        prompts.extend(prompt)
        return original(self, prompt, *args, **kwargs)

    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", count)
    return prompts


def test_every_distinct_prompt_is_encoded_once_before_training(pipeline, dataset, lora, make_args, encoded):
    evaluation = Dataset.from_dict({"prompt": OTHERS})
    trainer = APEXTrainer(
        pipeline, [redness, contrast], make_args(max_steps=2), dataset, {"one": evaluation}, peft_config=lora
    )
    assert sorted(encoded) == sorted({*PROMPTS, *OTHERS})
    trainer.train()
    trainer.evaluate()
    assert len(encoded) == len({*PROMPTS, *OTHERS})
    assert all(isinstance(getattr(pipeline, name), torch.nn.Module) for name in trainer.policy.encoder_names)


def test_on_demand_only_what_a_rollout_needs(pipeline, dataset, lora, make_args, encoded):
    args = make_args(max_steps=1, precompute_prompts=False)
    trainer = APEXTrainer(pipeline, [redness, contrast], args, dataset, peft_config=lora)
    assert encoded == []
    trainer.train()
    assert len(encoded) == 2  # one iteration is about two prompts


def test_a_later_run_encodes_nothing_and_trains_alike(pipeline, dataset, lora, make_args, tmp_path, encoded):
    trained = []
    for cache, count in ((None, 4), (str(tmp_path / "cache"), 8), (str(tmp_path / "cache"), 8)):
        args = make_args(max_steps=2, prompt_cache_dir=cache)
        trainer = APEXTrainer(copy.deepcopy(pipeline), [redness, contrast], args, dataset, peft_config=copy.copy(lora))
        trainer.train()
        trained.append(weights_of(trainer))
        assert len(encoded) == count
    for other in trained[1:]:
        assert equal_weights(trained[0], other)


def test_a_pipeline_loaded_by_name_loses_its_encoders(pipeline, dataset, lora, make_args, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    args = make_args(max_steps=2, guidance_scale=3.0, output_dir=str(tmp_path / "a"))
    kept = APEXTrainer(pipeline, [redness, contrast], args, dataset, peft_config=copy.copy(lora))
    kept.train()
    args = make_args(max_steps=2, guidance_scale=3.0, output_dir=str(tmp_path / "b"))
    trainer = APEXTrainer(
        str(tmp_path / "pipeline"), [redness, contrast], args, dataset, dataset, peft_config=copy.copy(lora)
    )
    assert all(getattr(trainer.policy.pipeline, name) is None for name in trainer.policy.encoder_names)
    trainer.train()
    assert equal_weights(weights_of(kept), weights_of(trainer))
    trainer.args.eval_guidance_scale = 5.0  # the negative prompt's embedding is there in any case
    trainer.evaluate()
    trainer.save_model()
    with pytest.raises(ValueError, match="encoders were unloaded.*Found another prompt: 'a red star.*unload_text_enc"):
        trainer.evaluate(Dataset.from_dict({"prompt": OTHERS}))


def test_encoders_of_a_passed_pipeline_stay_usable(pipeline, dataset, lora, make_args):
    args = make_args(max_steps=1, unload_text_encoders=True)
    trainer = APEXTrainer(pipeline, [redness, contrast], args, dataset, peft_config=lora)
    trainer.train()
    assert pipeline.text_encoder.device.type == "cpu"
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 12}
    assert pipeline("a new prompt", **call).images


def test_unloading_needs_the_prompts_first(make_args):
    with pytest.raises(ValueError, match="`unload_text_encoders` needs `precompute_prompts`"):
        make_args(precompute_prompts=False, unload_text_encoders=True)


@pytest.mark.parametrize("name", ["flux2", "flux2-klein", "qwen-image", "z-image"])
def test_what_a_language_model_encoded_is_read_from_the_disk_without_it(name, tmp_path):
    build(name).save_pretrained(tmp_path / "pipeline")
    trained = []
    for source, cache in ((build(name), None), (str(tmp_path / "pipeline"), str(tmp_path / "cache"))):
        trainer = make(source, tmp_path / "run", LoraConfig(r=2), guidance_scale=3.0, prompt_cache_dir=cache)
        trainer.train()
        trained.append(weights_of(trainer))
    assert trainer.policy.pipeline.text_encoder is None
    assert equal_weights(*trained)
