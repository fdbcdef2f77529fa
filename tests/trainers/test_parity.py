"""One whole iteration against a straight-line computation that shares no code with the package but the random numbers.

The formulas are Flow-GRPO's (arXiv 2505.05470): SDE step, mean log-probability, group-normalized advantage, clipped ratio, and the
KL divergence of two Gaussians of equal width. Two updates on one rollout, so that the second has a ratio away from 1, rows that
are clipped, and a KL term with a gradient.
"""

import copy
import math

import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from toy_rewards import PROMPTS, contrast, redness
from transformers import TrainerCallback

from trl_apex import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl_apex.diffusion.rollout import INITIAL_NOISE, STEP_NOISE, keyed_noise

STEPS, GUIDANCE, NOISE_LEVEL, CLIP, GROUP, BETA, RATE = 4, 3.0, 0.7, 1e-4, 4, 0.3, 0.5
FAR = 1e-6


def assert_close(found, expected):
    """To 1e-5 in norm, and no entry further off than 3e-5 of the largest."""
    assert found.shape == expected.shape
    error = found - expected
    assert error.norm() <= 1e-5 * expected.norm(), error.norm() / expected.norm()
    assert error.abs().max() <= 3e-5 * expected.abs().max(), error.abs().max() / expected.abs().max()


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([p.grad.clone() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("guard", [None, "kl_mask", "grpo_guard"])
def test_one_iteration_equals_the_formulas(pipeline, lora, make_args, guard):
    base = copy.deepcopy(pipeline.transformer)
    dataset = Dataset.from_dict({"prompt": PROMPTS[:2]})
    args = make_args(
        DiffusionGRPOConfig, num_inference_steps=STEPS, guidance_scale=GUIDANCE, noise_level=NOISE_LEVEL, epsilon=CLIP,
        gradient_accumulation_steps=3, max_steps=2, num_iterations=2, optim="sgd", learning_rate=RATE, max_grad_norm=0.0,
        weight_decay=0.0, reward_weights=[2.0, 1.0], shuffle_dataset=False, beta=BETA, ratio_guard=guard,
        **({"kl_mask_threshold": FAR} if guard == "kl_mask" else {}),
    )  # fmt: skip
    seen = Gradients()
    trainer = DiffusionGRPOTrainer(pipeline, [contrast, redness], args, dataset, peft_config=lora, callbacks=[seen])
    model = copy.deepcopy(trainer.model)
    run = {}
    original = trainer._generate_and_score_completions

    def keep(inputs):
        run.update(original(inputs))
        return run

    trainer._generate_and_score_completions = keep
    trainer.train()

    # The reference. The run gives it nothing but the unit normal numbers.
    prompts = [p for p in PROMPTS[:2] for _ in range(GROUP)]
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=True, negative_prompt=[""] * 8, max_sequence_length=12
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.tolist()
    start = keyed_noise([(args.seed, INITIAL_NOISE, 0, i) for i in range(8)], (16, 8, 8))
    draws = keyed_noise([(args.seed, STEP_NOISE, 0, i) for i in range(8)], (STEPS - 1, 16, 8, 8))

    def velocity(network, x, step):
        predicted = network(
            torch.cat([x, x]), encoder_hidden_states=torch.cat([negative, embeds]), return_dict=False,
            pooled_projections=torch.cat([negative_pooled, pooled]), timestep=torch.full((16,), sigmas[step] * 1000),
        )[0]  # fmt: skip
        free, conditional = predicted[:8], predicted[8:]
        return free + GUIDANCE * (conditional - free)

    def gaussian(network, x, step):
        sigma, dt = sigmas[step], sigmas[step + 1] - sigmas[step]
        s = NOISE_LEVEL * math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
        v = velocity(network, x, step)
        mean = x * (1 + s * s / (2 * sigma) * dt) + v * (1 + s * s * (1 - sigma) / (2 * sigma)) * dt
        return mean, s * math.sqrt(-dt)

    def log_density(x, mean, std):
        return (-((x - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2).mean((1, 2, 3))

    # Rollout
    with torch.no_grad():
        path, old, means = [start], [], []
        for step in range(STEPS - 1):
            mean, std = gaussian(model, path[-1], step)
            path.append(mean + std * draws[:, step])
            old.append(log_density(path[-1], mean, std))
            means.append(mean)
        final = path[-1] - sigmas[STEPS - 1] * velocity(model, path[-1], STEPS - 1)
        decoded = pipeline.vae.decode(final / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor)[0]
        images = (decoded / 2 + 0.5).clamp(0, 1)
    assert_close(run["latents"], torch.stack(path, 1))
    assert_close(run["old"], torch.stack(old, 1))

    # Rewards and advantages
    total = 2 * 100 * images.std((1, 2, 3)) + images[:, 0].mean((1, 2))
    first = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert first["reward"] == pytest.approx(total.mean().item(), rel=1e-5)
    grouped = total.double().view(2, GROUP)
    advantages = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten().float()
    assert_close(run["advantages"], advantages)

    # Loss and gradients of both updates, from what was just found right to 1e-5: an error of rounding there is none here
    path, old, advantages = run["latents"].unbind(1), run["old"].unbind(1), run["advantages"]
    if guard is not None:
        assert_close(run["old_mean"], torch.stack(means, 1))
        means = run["old_mean"].unbind(1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for update in range(2):
        losses, kls, clipped = [], [], []
        for step in range(STEPS - 1):
            mean, std = gaussian(model, path[step], step)
            change = log_density(path[step + 1], mean, std) - old[step]
            moved = ((mean - means[step]) ** 2 / (2 * std**2)).mean((1, 2, 3))
            ratio = torch.exp(std * (change + moved) if guard == "grpo_guard" else change)
            bounded = ratio.clamp(1 - CLIP, 1 + CLIP)
            with torch.no_grad():
                frozen, _ = gaussian(base, path[step], step)
            kls.append(((mean - frozen) ** 2 / (2 * std**2)).mean((1, 2, 3)))
            if guard == "kl_mask":
                clipped.append((moved > FAR) & ((ratio - 1) * advantages > 0))
                own = torch.where(clipped[-1], 0.0, -ratio * advantages)
            else:
                clipped.append(bounded * advantages < ratio * advantages)
                own = -torch.minimum(ratio * advantages, bounded * advantages)
            losses.append((own / (sigmas[step] - sigmas[step + 1]) if guard == "grpo_guard" else own) + BETA * kls[-1])
        loss = torch.stack(losses).mean()
        gradients = torch.autograd.grad(loss, parameters)
        assert logged[update]["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert logged[update]["kl"] == pytest.approx(torch.stack(kls).mean().item(), abs=1e-5)
        assert logged[update]["clip_ratio/region_mean"] == pytest.approx(
            torch.stack(clipped).float().mean().item(), abs=1e-6
        )
        largest = max(g.abs().max().item() for g in gradients)
        assert largest > 1e-4
        assert_close(*(torch.cat([g.flatten() for g in one]) for one in (seen.steps[update], gradients)))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= RATE * gradient
    assert logged[1]["kl"] > 0 and 0 < logged[1]["clip_ratio/region_mean"] < 1
    for ours, theirs in zip(parameters, [p for p in trainer.model.parameters() if p.requires_grad], strict=True):
        torch.testing.assert_close(theirs.detach(), ours.detach(), rtol=0, atol=1e-5)
