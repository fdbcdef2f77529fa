"""One whole iteration against a straight-line computation that shares no code with the package.

The formulas are Flow-GRPO's (arXiv 2505.05470): SDE step, mean log-probability, group-normalized advantage, clipped ratio.
"""

import copy
import math

import torch
from conftest import PROMPTS, redness
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler

from trl_apex import DiffusionGRPOConfig, DiffusionGRPOTrainer

STEPS, GUIDANCE, NOISE_LEVEL, CLIP, GROUP = 4, 3.0, 0.7, 1e-4, 4


def brightness(images, prompts, **kwargs):
    return images.mean((1, 2, 3)).tolist()


def test_one_iteration_equals_the_formulas(pipeline, lora, make_args):
    dataset = Dataset.from_dict({"prompt": PROMPTS[:2]})
    args = make_args(
        DiffusionGRPOConfig, num_inference_steps=STEPS, guidance_scale=GUIDANCE, noise_level=NOISE_LEVEL, epsilon=CLIP,
        gradient_accumulation_steps=3, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, weight_decay=0.0,
        reward_weights=[2.0, 1.0], shuffle_dataset=False,
    )  # fmt: skip
    trainer = DiffusionGRPOTrainer(pipeline, [brightness, redness], args, dataset, peft_config=lora)
    model = copy.deepcopy(trainer.model)
    noises = {}
    original = trainer._generate_and_score_completions

    def keep(inputs):
        result = original(inputs)
        noises["latents"], noises["old"] = result["latents"], result["old_log_prob"]
        noises["advantages"] = result["advantages"]
        return result

    trainer._generate_and_score_completions = keep
    trainer.train()
    moved = {
        name: before - after.detach()
        for (name, before), after in zip(model.named_parameters(), trainer.model.parameters(), strict=True)
        if before.requires_grad
    }

    # The reference. Only the noise is taken from the run: the latents' start, and each step's draw by inversion.
    prompts = [p for p in PROMPTS[:2] for _ in range(GROUP)]
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=True, negative_prompt=[""] * 8, max_sequence_length=12
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas

    def velocity(x, step):
        t = torch.full((8,), float(sigmas[step]) * 1000)
        conditional = model(x, encoder_hidden_states=embeds, pooled_projections=pooled, timestep=t, return_dict=False)[
            0
        ]
        free = model(
            x, encoder_hidden_states=negative, pooled_projections=negative_pooled, timestep=t, return_dict=False
        )[0]
        return free + GUIDANCE * (conditional - free)

    def gaussian(x, step):
        sigma, dt = float(sigmas[step]), float(sigmas[step + 1] - sigmas[step])
        s = NOISE_LEVEL * math.sqrt(sigma / (1 - (float(sigmas[1]) if sigma == 1 else sigma)))
        v = velocity(x, step)
        mean = x * (1 + s * s / (2 * sigma) * dt) + v * (1 + s * s * (1 - sigma) / (2 * sigma)) * dt
        return mean, s * math.sqrt(-dt)

    latents = noises["latents"]
    x, log_probs = latents[:, 0], []
    for step in range(STEPS - 1):
        mean, std = gaussian(x, step)
        x = latents[:, step + 1]
        log_probs.append(torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2, 3)))
    with torch.no_grad():
        final = x - float(sigmas[STEPS - 1]) * velocity(x, STEPS - 1)
        decoded = pipeline.vae.decode(final / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor)[0]
        images = (decoded / 2 + 0.5).clamp(0, 1)
    log_prob = torch.stack(log_probs, 1)
    torch.testing.assert_close(log_prob, noises["old"], rtol=0, atol=1e-5)

    total = 2 * images.mean((1, 2, 3)) + images[:, 0].mean((1, 2))
    grouped = total.view(2, GROUP)
    advantages = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    torch.testing.assert_close(noises["advantages"], advantages, rtol=1e-4, atol=1e-4)

    ratio = torch.exp(log_prob - log_prob.detach())
    weighted = noises["advantages"][:, None]
    loss = -torch.minimum(ratio * weighted, ratio.clamp(1 - CLIP, 1 + CLIP) * weighted).mean()
    loss.backward()
    scale = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    assert scale > 1e-6
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(moved[name], parameter.grad, rtol=1e-3, atol=1e-5 * max(scale, 1), msg=name)
