"""Each family's policy draws the image that diffusers' own pipeline draws."""

import inspect
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from families import FAMILIES, build, conditions, draw, longest, plain_call

from trl_apex.diffusion.families import FAMILIES as REGISTERED
from trl_apex.diffusion.families import base, load_policy
from trl_apex.diffusion.rollout import denoise, guided_prediction, keyed_noise, sample
from trl_apex.diffusion.schedule import Sampler

PROMPTS = ['a red circle with "CAT"', 'a blue star with "HUT"']
SIZE = 16


@pytest.mark.parametrize("guidance, width", [(1.0, SIZE), (4.0, SIZE + 8)])
@pytest.mark.parametrize("name", FAMILIES)
def test_deterministic_sampling_equals_the_pipeline(name, guidance, width):
    pipeline = build(name)
    policy = load_policy(pipeline)
    shape = policy.latent_shape(SIZE, width)
    noise = keyed_noise([(0,), (1,)], shape)
    expected = draw(pipeline, PROMPTS, 4, noise, guidance, (SIZE, width))
    sampler = Sampler(policy.schedule(4, SIZE, width), policy.transitions[0], 0.7)
    embeddings = policy.encode(conditions(policy, PROMPTS, negative=""), longest(name))
    negative = policy.encode_negative("", 12) if policy.batched_guidance and not policy.edits else None

    def predict(latents, timesteps, rows):
        return guided_prediction(policy, policy.denoiser, latents, timesteps, embeddings, negative, guidance)

    final, _ = denoise(predict, sampler, noise, range(0), noise.new_zeros(2, 0, *shape))
    torch.testing.assert_close(policy.decode(final), expected.float(), rtol=1e-4, atol=2e-4)
    assert expected.std() > 0.01


@pytest.mark.parametrize("name", ["qwen-image", "z-image"])
def test_padding_changes_nothing(name):
    policy = load_policy(build(name))
    latents = keyed_noise([(0,), (1,)], policy.latent_shape(SIZE, SIZE))
    prompts = ["a red star", "a blue circle with a"]
    timesteps = torch.tensor([700.5, 300.0])

    def velocity(rows, max_sequence_length):
        embeddings = policy.encode([prompts[i] for i in rows], max_sequence_length)
        assert all(value.shape[:1] == (len(rows),) for value in embeddings.values())
        with torch.no_grad():
            return policy.predict(policy.denoiser, latents[rows], timesteps[rows], embeddings, 1.0)

    together = velocity([0, 1], 16)
    for row in (0, 1):
        for length in (16, 24):
            torch.testing.assert_close(velocity([row], length)[0], together[row], rtol=1e-5, atol=1e-5)
    assert (together - velocity([0, 1], 3)).abs().max() > 1e-4, "the prompts' own tokens count"


@pytest.mark.parametrize("name", FAMILIES)
def test_default_lora_targets_exist(name):
    policy = load_policy(build(name))
    modules = [key for key, _ in policy.denoiser.named_modules()]
    for target in policy.lora_targets:
        assert any(module.endswith(target) for module in modules), target


def test_size_that_the_model_cannot_draw():
    with pytest.raises(ValueError, match="multiples of 4 pixels.*Found 18 x 16. Use 16 x 16"):
        load_policy(build("sd3")).latent_shape(18, 16)


def test_images_are_decoded_a_few_at_a_time(monkeypatch):
    policy = load_policy(build("sd3"))
    latents = keyed_noise([(i,) for i in range(5)], policy.latent_shape(SIZE, SIZE))
    together = policy.decode(latents)
    sizes = []
    policy.pipeline.vae.decoder.register_forward_hook(lambda module, given, images: sizes.append(len(images)))
    monkeypatch.setattr(base, "DECODE_PIXELS", 2 * SIZE * SIZE)
    torch.testing.assert_close(policy.decode(latents), together)
    assert sizes == [2, 2, 1]
    monkeypatch.setattr(base, "DECODE_PIXELS", 1)
    policy.decode(latents)
    assert sizes[3:] == [1] * 5  # an image larger than the limit goes alone


def test_a_float16_vae_that_overflows_decodes_in_float32():
    policy = load_policy(build("sdxl"))
    vae, latents = policy.pipeline.vae, keyed_noise([(0,)], policy.latent_shape(SIZE, SIZE))
    vae.decoder.conv_in.weight.data.mul_(1e6).clamp_(-6e4, 6e4)  # beyond float16's 65504 in the activations
    expected = policy.decode(latents)
    vae.half()
    assert not vae.decode(latents.half()).sample.isfinite().all()
    assert vae.config.force_upcast
    images = policy.decode(latents)
    assert images.dtype == torch.float32 and vae.dtype == torch.float16
    torch.testing.assert_close(images, expected, rtol=0, atol=0.02)
    assert images.std() > 0.01


def test_sd3_and_flux_train_at_512_pixels_where_nothing_is_said(monkeypatch):
    for name, own in (("sd3", 16), ("flux", 128 * 2), ("sdxl", 16)):
        policy = load_policy(build(name))
        assert policy.default_size() == (own, own)  # smaller than 512: the model's own
    large = {"sample_size": 128, "block_out_channels": (8, 16, 16, 16)}
    for name, size in (("sd3", 512), ("sdxl", 1024)):
        policy = load_policy(build(name))
        monkeypatch.setattr(type(policy), "vae_scale_factor", 8)
        policy.denoiser.register_to_config(**large)
        assert policy.default_size() == (size, size)


def test_a_family_is_one_short_file():
    for file in {Path(inspect.getsourcefile(policy)) for policy in REGISTERED.values()}:
        assert len(file.read_text().splitlines()) < 150, file.name


@pytest.mark.parametrize(
    "other, found",
    [
        (UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "UniPCMultistepScheduler"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), "DPMSolverMultistep"),
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler"),
        (EulerDiscreteScheduler(), "EulerDiscreteScheduler"),
        (DDIMScheduler(), "DDIMScheduler"),
        (
            FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            "FlowMatchEulerDiscreteScheduler with invert_sigmas=True",
        ),
    ],
)
def test_flow_models_refuse_other_schedulers_by_name(other, found):
    for name in ("sd3", "flux", "flux-kontext", "flux2", "flux2-klein", "qwen-image", "qwen-image-edit", "z-image"):
        pipeline = build(name)
        pipeline.scheduler = other
        with pytest.raises(ValueError, match=f"must be a FlowMatchEulerDiscreteScheduler.*Found {found}"):
            load_policy(pipeline)


def test_noise_predicting_models_refuse_flow_schedulers():
    for scheduler in (
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        DDIMScheduler(prediction_type="sample"),
    ):
        pipeline = build("sdxl")
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=f"must have betas.*Found {type(scheduler).__name__}"):
            load_policy(pipeline)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(build("sdxl").scheduler.config)  # as SDXL is published
    load_policy(pipeline)


SCHEDULERS = [name for name in dir(diffusers) if name.endswith("Scheduler")]


@pytest.mark.parametrize("family", ["sd3", "sd1.5"])
def test_every_scheduler_of_diffusers_is_sampled_with_or_refused_by_name(family):
    pipeline, taken = build(family), []
    config = pipeline.scheduler.config
    for name in SCHEDULERS:
        for make in (getattr(diffusers, name), partial(getattr(diffusers, name).from_config, config)):
            try:
                pipeline.scheduler = make()
            except Exception:  # needs another package, or has no such form
                continue
            try:
                policy = load_policy(pipeline)
            except ValueError as error:
                assert name in str(error)
                continue
            sigmas = policy.schedule(3, SIZE, SIZE).sigmas
            assert sigmas.isfinite().all() and len(sigmas.unique()) == 4, name
            taken.append(name)
    assert ("FlowMatchEulerDiscreteScheduler" in taken) == (family == "sd3")
    assert ("DDIMScheduler" in taken) == (family == "sd1.5") and (len(set(taken)) > 9) == (family == "sd1.5")


@pytest.mark.parametrize(
    ("family", "option"),
    [
        *(("sd1.5", option) for option in (
            {"clip_sample": True}, {"thresholding": True}, {"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"},
            {"steps_offset": 1}, {"set_alpha_to_one": False}, {"beta_schedule": "squaredcos_cap_v2"}, {"num_train_timesteps": 500},
        )),
        *(("sd3", option) for option in (
            {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}, {"shift_terminal": 0.1},
            {"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"shift": 1.0},
            {"invert_sigmas": True}, {"stochastic_sampling": True},
        )),
    ],
    ids=str,
)  # fmt: skip
def test_an_option_of_a_scheduler_draws_the_pipelines_image_or_is_refused(family, option):
    pipeline = build(family)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **option)
    try:
        policy = load_policy(pipeline)
    except ValueError as error:
        assert next(iter(option)) in str(error)
        return
    noise = keyed_noise([(0,), (1,)], policy.latent_shape(SIZE, SIZE))
    expected = pipeline(PROMPTS, num_inference_steps=3, **plain_call(pipeline, noise, 1.0)).images
    sampler = Sampler(policy.schedule(3, SIZE, SIZE), policy.transitions[0], 0.7)
    found = sample(policy, policy.denoiser, sampler, policy.encode(PROMPTS, 12), None, 1.0, noise).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def from_pure_noise(name):
    pipeline = build(name)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return pipeline


def test_v_prediction_from_pure_noise_draws_the_pipelines_image_and_trains():
    pipeline = from_pure_noise("sd2-v")
    policy = load_policy(pipeline)
    shape = policy.latent_shape(SIZE, SIZE)
    noise = keyed_noise([(0,), (1,)], shape)
    expected = draw(pipeline, PROMPTS, 4, noise)
    schedule = policy.schedule(4, SIZE, SIZE)
    assert schedule.sigmas[0] == 0
    args = (policy, policy.denoiser, Sampler(schedule, "ddim", 1.0), policy.encode(PROMPTS, 12), None, 1.0, noise)
    torch.testing.assert_close(sample(*args).images, expected.float(), rtol=1e-4, atol=2e-4)
    rollout = sample(*args, range(3), keyed_noise([(2,), (3,)], (3, *shape)))
    assert rollout.images.isfinite().all() and rollout.trajectory.log_prob.isfinite().all()
    with pytest.raises(ValueError, match="needs a model that predicts v"):
        load_policy(from_pure_noise("sd1.5")).schedule(4, SIZE, SIZE)


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2-klein", "qwen-image-edit", "z-image", "sd1.5", "sdxl"])
def test_a_pipeline_without_a_component_is_refused_by_its_name(name):
    policy = load_policy(build(name))
    own = ["processor"] if policy.edits else []
    for component in ("vae", "scheduler", policy.denoiser_name, "tokenizer", *policy.encoder_names, *own):
        pipeline = build(name)
        setattr(pipeline, component, None)
        if component == "text_encoder_3":  # SD3 draws without T5
            load_policy(pipeline).encode(PROMPTS, 12)
            continue
        with pytest.raises(
            ValueError, match=rf"Found `{component}` None. Load the pipeline without `{component}=None`"
        ):
            load_policy(pipeline)


def test_sequential_offload_is_refused():
    pipeline = build("sd3")
    cpu_offload(pipeline.vae, "cpu")
    with pytest.raises(ValueError, match="Found `vae` on the meta device.*without `enable_sequential_cpu_offload"):
        load_policy(pipeline)


def test_a_subclass_of_a_supported_pipeline_is_accepted():
    class Mine(StableDiffusion3Pipeline):
        pass

    assert isinstance(load_policy(Mine(**build("sd3").components)), REGISTERED["StableDiffusion3Pipeline"])


def test_a_size_without_positions_is_refused():
    policy = load_policy(build("sd3"))
    assert policy.latent_shape(32, 16) == (16, 16, 8)
    with pytest.raises(ValueError, match="at most 32 pixels.*Found 36 x 16"):
        policy.latent_shape(36, 16)
