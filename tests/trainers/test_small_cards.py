"""A quantized base, 8-bit optimizers and the choice of an attention kernel. What needs a package that is missing is skipped."""

import pytest
import torch
from families import build
from peft import LoraConfig
from tiny_runs import equal_weights, history, tiny_pipeline, tiny_trainer, weights_of

from trl_apex import APEXTrainer
from trl_apex.diffusion.families import load_policy
from trl_apex.trainers.adapters import adapted

INT8 = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(params=["torchao", "bitsandbytes"])
def quantized(request, tmp_path, monkeypatch):
    """A trainer on a base that is quantized as it is loaded, on the CPU, which diffusers leaves to torchao."""
    pytest.importorskip(request.param)
    if request.param == "bitsandbytes":  # it computes on a CPU, but diffusers asks for a GPU
        from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer as Quantizer

        monkeypatch.setattr(Quantizer, "validate_environment", lambda *arguments, **options: None)
        monkeypatch.setattr(Quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    tiny_pipeline().save_pretrained(tmp_path / "base")

    def make(cls=APEXTrainer, lora=True, **options):
        options = {"quantization_config": INT8 if request.param == "torchao" else NF4, **options}
        return tiny_trainer(tmp_path / "run", cls=cls, pipeline=str(tmp_path / "base"), lora=lora, **options)

    return make


def frozen_weights(trainer):
    """The numbers that are stored of each weight."""
    frozen = {name: p.data for name, p in trainer.model.named_parameters() if not p.requires_grad}
    return {name: getattr(value, "qdata", value).clone() for name, value in frozen.items()}


@pytest.mark.parametrize("options", [{}, {"beta": 0.1, "guidance_scale": 2.0}], ids=["plain", "kl"])
def test_an_adapter_trains_on_a_quantized_base_and_loads_on_the_plain_one(quantized, tmp_path, options):
    trainer = quantized(**options)
    base = frozen_weights(trainer)
    kinds = {type(p).__name__ for p in trainer.model.parameters()}
    assert kinds & {"Int8Tensor", "Params4bit"}
    start = weights_of(trainer)
    trainer.train()
    assert history(trainer, "ratio/max_deviation")[0] == history(trainer, "ratio/first_update_deviation")[0] == 0
    assert not options or history(trainer, "kl")[0] == 0 < history(trainer, "kl")[-1]
    assert not equal_weights(start, weights_of(trainer))
    assert equal_weights(base, frozen_weights(trainer))
    trainer.save_model(str(tmp_path / "saved"))

    plain = load_policy(str(tmp_path / "base"))
    latents = torch.randn(2, *trainer.latent_shape, generator=torch.Generator().manual_seed(0))
    inputs = latents, torch.tensor([900.0, 400.0]), plain.encode(["a", "b"], 12), 1.0

    def velocity(policy, model):
        with torch.no_grad():
            return policy.predict(model.eval(), *inputs)

    before = velocity(plain, plain.denoiser)
    with adapted(plain, tmp_path / "saved"):
        tuned = velocity(plain, plain.denoiser)
    trained = velocity(trainer.policy, trainer.model)
    with trainer.model.disable_adapter():
        untrained = velocity(trainer.policy, trainer.model)
    moved, noise = (tuned - before).norm(), (untrained - before).norm()
    assert 0 < noise < before.norm() / 5, "quantizing changes little"
    torch.testing.assert_close(trained - untrained, tuned - before, rtol=0.2, atol=moved.item() / 10)


def test_a_run_on_a_quantized_base_resumes_exactly(quantized, tmp_path):
    whole = quantized(save_strategy="steps", save_steps=2)
    whole.train()
    resumed = quantized()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert equal_weights(weights_of(resumed), weights_of(whole))


def test_training_goes_on_from_an_adapter_on_a_quantized_pipeline(quantized, tmp_path):
    first = quantized()
    first.train()
    first.save_model(str(tmp_path / "saved"))
    pipeline = quantized(unload_text_encoders=False).policy.pipeline
    pipeline.transformer.unload_lora()
    pipeline.load_lora_weights(str(tmp_path / "saved"))
    second = tiny_trainer(tmp_path / "run", pipeline=pipeline, lora=None, beta=0.1)
    assert equal_weights(weights_of(second), weights_of(first))
    second.train()
    assert history(second, "ratio/max_deviation")[0] == 0 == history(second, "kl")[0] < history(second, "kl")[-1]


def test_all_weights_of_a_quantized_base_are_not_trained(quantized):
    with pytest.raises(ValueError, match="must stay frozen.*Found neither `peft_config` nor `adapter`"):
        quantized(lora=None)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"quant_method": "magic"}, "that diffusers knows.*Unknown quantization type, got magic"),
        ("{int8}", "must be JSON"),
    ],
)
def test_a_quantization_that_is_unknown_is_refused(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, quantization_config=config)


def test_a_pipeline_that_is_loaded_already_is_not_quantized(tmp_path):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="loaded by name. Found a SD3Transformer2DModel that is not quantized"):
        tiny_trainer(tmp_path, quantization_config=NF4)


@pytest.mark.parametrize("optim, package", [("adamw_bnb_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao")])
def test_an_optimizer_with_8_bit_states_trains_and_resumes(tmp_path, optim, package):
    pytest.importorskip(package)
    options = {"optim": optim, "lora": LoraConfig(r=64, lora_alpha=64)}
    whole = tiny_trainer(tmp_path, save_strategy="steps", save_steps=2, **options)
    whole.train()
    states = [value for state in whole.optimizer.state.values() for value in state.values()]
    assert any(getattr(value, "dtype", None) == torch.uint8 or "8bit" in type(value).__name__ for value in states)
    resumed = tiny_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal_weights(weights_of(resumed), weights_of(whole))


@pytest.fixture
def default_attention():
    """diffusers also keeps the last choice for the whole process."""
    yield
    build("flux").transformer.reset_attention_backend()


@pytest.mark.parametrize("family", ["flux", "flux2-klein", "qwen-image", "z-image"])
def test_an_attention_kernel_serves_rollout_and_update(tmp_path, family, default_attention):
    options = {"attention_backend": "_native_math", "max_steps": 1, "height": 16, "width": 16}
    trainer = tiny_trainer(tmp_path, pipeline=build(family), **options)
    kernels = {m.processor._attention_backend for m in trainer.policy.denoiser.modules() if hasattr(m, "processor")}
    assert kernels == {"_native_math"}
    trainer.train()
    assert history(trainer, "ratio/max_deviation") == [0]


@pytest.mark.parametrize(
    "backend, message",
    [
        ("flsh", "must be one of flash, .*native.*Found 'flsh'. Did you mean 'flash'"),
        ("sage", "must be one of flash"),
        ("xformers", "that is installed. Found 'xformers'"),
    ],
)
def test_an_attention_kernel_that_cannot_train_is_refused(tmp_path, backend, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, pipeline=build("flux"), attention_backend=backend)
    with pytest.raises(ValueError, match="Found SD3Transformer2DModel, which always calls PyTorch's"):
        tiny_trainer(tmp_path, attention_backend="native")
