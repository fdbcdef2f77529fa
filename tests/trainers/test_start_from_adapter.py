"""Going on from an adapter, however it comes to the trainer: from its images, it alone trains, it alone is saved."""

import copy

import pytest
import torch
from adapter_trainers import PROMPTS, build, distance, make, plain_call
from peft import LoHaConfig, LoraConfig, PeftModel
from safetensors.torch import load_file

from trl_apex.diffusion.families import load_policy

LORA = {"r": 2, "lora_alpha": 6, "init_lora_weights": "gaussian"}


def images(pipeline):
    """What a plain pipeline draws."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()  # as `from_pretrained` leaves them
    generator = torch.Generator().manual_seed(1)
    return pipeline(
        prompt=PROMPTS["prompt"][:], generator=generator, num_inference_steps=2, **plain_call(pipeline)
    ).images


def drawn(trainer):
    """What a plain pipeline draws with the trainer's model."""
    pipeline, name = copy.copy(trainer.policy.pipeline), trainer.policy.denoiser_name
    setattr(pipeline, name, trainer.model)
    return images(pipeline)


def tuned(name, run):
    """A run folder, and a pipeline with its adapter."""
    trainer = make(build(name), run, LoraConfig(**LORA))
    with torch.no_grad():
        for key, parameter in trainer.model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    trainer.save_model()
    pipeline = build(name)
    pipeline.load_lora_weights(str(run), weight_name="pytorch_lora_weights.safetensors")
    return pipeline


@pytest.mark.parametrize("name", ["sd3.5-medium", "flux", "flux2-klein", "qwen-image", "z-image", "sd1.5", "sdxl"])
def test_a_loaded_adapter_is_trained_on_alone_and_saved_alone(name, tmp_path):
    pipeline = tuned(name, tmp_path / "first")
    base, start = images(build(name)), images(pipeline)
    assert distance(base, start) > 1e-3
    before = {key: p.clone() for key, p in load_policy(build(name)).denoiser.named_parameters()}

    trainer = make(pipeline, tmp_path / "second")
    assert distance(drawn(trainer), start) == 0
    trainable = [key for key, p in trainer.model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in key for key in trainable)
    trainer.train()
    assert distance(drawn(trainer), start) > 1e-4
    frozen = {key: p for key, p in trainer.model.get_base_model().named_parameters() if "lora_" not in key}
    assert len(frozen) == len(before)
    assert all(torch.equal(p, before[key.replace(".base_layer", "")]) for key, p in frozen.items())

    trainer.save_model()
    assert {p.name for p in (tmp_path / "second").iterdir() if p.is_dir()} == set()
    loaded = build(name)
    loaded.load_lora_weights(str(tmp_path / "second"), weight_name="pytorch_lora_weights.safetensors")
    assert distance(images(loaded), drawn(trainer)) < 1e-6


@pytest.mark.parametrize("name", ["sd3", "sd1.5"])
def test_an_adapter_by_its_folder_and_a_peft_model_start_alike(name, tmp_path):
    start = images(tuned(name, tmp_path / "first"))
    by_folder = make(build(name), tmp_path / "second", adapter=tmp_path / "first")
    assert distance(drawn(by_folder), start) == 0
    for trainable in (True, False):
        pipeline = build(name)
        part = load_policy(pipeline).denoiser_name
        wrapped = PeftModel.from_pretrained(getattr(pipeline, part), tmp_path / "first", is_trainable=trainable)
        setattr(pipeline, part, wrapped)
        trainer = make(pipeline, tmp_path / "third")
        assert distance(drawn(trainer), start) == 0
    trainer.train()
    trainer.save_model()
    loaded = build(name)
    loaded.load_lora_weights(str(tmp_path / "third"), weight_name="pytorch_lora_weights.safetensors")
    assert distance(images(loaded), drawn(trainer)) < 1e-6


def test_an_adapter_keeps_its_precision_in_a_pipeline_of_bf16(tmp_path):
    tuned("sd3", tmp_path / "first")
    trainer = make(build("sd3").to(torch.bfloat16), tmp_path / "second", adapter=str(tmp_path / "first"))
    trainer.save_model()
    first, second = (load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_peft_config_that_describes_the_adapter_is_taken_and_another_is_refused(tmp_path):
    start = images(tuned("sd3", tmp_path / "first"))
    fitting = make(build("sd3"), tmp_path / "second", LoraConfig(**LORA), adapter=tmp_path / "first")
    assert distance(drawn(fitting), start) == 0
    for other in ({"r": 3}, {"lora_alpha": 5}, {"use_rslora": True}, {"target_modules": ["attn.to_q"]}):
        pipeline = tuned("sd3", tmp_path / "first")
        with pytest.raises(ValueError, match="Leave out `peft_config` .*fuse_lora.*unload_lora_weights"):
            make(pipeline, tmp_path / "second", LoraConfig(**{**LORA, **other}))
        assert distance(images(pipeline), start) == 0  # as it was
        pipeline.fuse_lora()  # the second way out
        pipeline.unload_lora_weights()
        on_top = make(pipeline, tmp_path / "second", LoraConfig(**{**LORA, **other}))
        assert distance(drawn(on_top), start) < 1e-4


def test_one_pipeline_in_two_trainers_goes_on_or_is_refused(tmp_path):
    pipeline = build("sd3")
    first = make(pipeline, tmp_path / "first", LoraConfig(**LORA))
    first.train()
    image = drawn(first)
    with pytest.raises(ValueError, match="must describe the adapter that is on the model already"):
        make(pipeline, tmp_path / "second", LoraConfig(**LORA, target_modules=["attn.to_q"]))
    assert distance(drawn(make(pipeline, tmp_path / "second")), image) == 0
    pipeline.unload_lora_weights()
    assert distance(drawn(make(pipeline, tmp_path / "third", LoraConfig(**LORA))), images(build("sd3"))) == 0


def test_adapters_that_would_not_start_from_their_images_are_refused(tmp_path):
    pipeline = tuned("sd3", tmp_path / "first")
    with pytest.warns(UserWarning, match="multiple adapters"):
        pipeline.load_lora_weights(str(tmp_path / "first"), weight_name="pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="one adapter to train on. Found 2: default_0, default_1.*delete_adapters"):
        make(pipeline, tmp_path / "second")
    with pytest.raises(ValueError, match="must come without adapters"):
        make(tuned("sd3", tmp_path / "first"), tmp_path / "second", adapter=tmp_path / "first")
    for change in (lambda p: p.fuse_lora(), lambda p: p.disable_lora()):
        pipeline = tuned("sd3", tmp_path / "first")
        change(pipeline)
        with pytest.raises(ValueError, match="Found 'default_0' merged or switched off"):
            make(pipeline, tmp_path / "second")
    pipeline = tuned("sd3", tmp_path / "first")
    pipeline.set_adapters(["default_0"], [0.5])
    with pytest.raises(ValueError, match="the scale of its configuration, 3. Found 1.5 in"):
        make(pipeline, tmp_path / "second")
    pipeline = build("sd3")
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Only the transformer may carry an adapter.*`text_encoder`"):
        make(pipeline, tmp_path / "second")
    with pytest.raises(ValueError, match="Found no folder"):
        make(build("sd3"), tmp_path / "second", adapter=tmp_path / "none" / "such")
    with pytest.raises(ValueError, match="took|must have weights of"):
        make(build("sd1.5"), tmp_path / "second", adapter=tmp_path / "first")


def test_the_kl_divergence_is_to_the_adapter_that_was_gone_on_from(tmp_path):
    tuned("sd3", tmp_path / "first")
    options = {"beta": 0.1, "max_steps": 2, "updates_per_iteration": 1, "generation_batch_size": 4}
    trainer = make(build("sd3"), tmp_path / "second", adapter=tmp_path / "first", **options)
    shared = {id(p) for p in trainer.model.parameters()} & {id(p) for p in trainer._reference.parameters()}
    assert len(shared) == sum(not p.requires_grad for p in trainer.model.parameters())
    kept = [p.clone() for p in trainer._reference.parameters()]
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == 0 and kl[1] > 0  # to the base it would not start at 0
    assert all(torch.equal(a, b) for a, b in zip(kept, trainer._reference.parameters(), strict=True))


def test_other_kinds_of_adapters_are_refused(tmp_path):
    for config, found in (({"r": 4}, "dict"), (LoHaConfig(target_modules=["attn.to_q"]), "LoHaConfig")):
        with pytest.raises(ValueError, match=f"must be a `peft.LoraConfig`.*Found {found}"):
            make(build("sd3"), tmp_path / "run", config)
