"""Numbers of the transitions: against diffusers, torch.distributions and a case with a known answer."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from trl_apex.diffusion.nouns import Schedule
from trl_apex.diffusion.schedule import Sampler, sde_window
from trl_apex.diffusion.transition import Transition, cps, ddim, flow_euler, flow_sde, log_prob, squared_error_log_prob


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def latents_and_velocity():
    return normal(3, 4, 5, 6), normal(3, 4, 5, 6, seed=1)


@pytest.mark.parametrize("transition", [flow_sde, cps])
def test_noise_level_zero_is_the_euler_step_of_diffusers(transition, latents_and_velocity):
    latents, velocity = latents_and_velocity
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    extra = (float(scheduler.sigmas[1]),) if transition is flow_sde else ()
    for i, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        now, after = scheduler.sigmas[i].expand(3), scheduler.sigmas[i + 1].expand(3)
        mean, std = transition(latents, velocity, now, after, 0.0, *extra)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)
        assert std.abs().max() == 0
        torch.testing.assert_close(flow_euler(latents, velocity, now, after), expected, rtol=0, atol=1e-6)


def test_flow_sde_matches_the_published_formula_by_hand():
    # sigma .8 -> .6, a = .7: s^2 = .49 * .8 / .2 = 1.96, dt = -.2
    x, v = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    mean, std = flow_sde(x, v, torch.tensor([0.8]), torch.tensor([0.6]), 0.7, sigma_max=0.99)
    assert mean.item() == pytest.approx(2 * (1 - 1.96 / 1.6 * 0.2) + 3 * (1 + 1.96 * 0.2 / 1.6) * -0.2, abs=1e-6)
    assert std.item() == pytest.approx(1.4 * math.sqrt(0.2), abs=1e-6)


def test_flow_sde_at_pure_noise_uses_the_second_sigma():
    x = torch.ones(1, 1, 1, 1)
    _, std = flow_sde(x, x, torch.tensor([1.0]), torch.tensor([0.9]), 0.7, sigma_max=0.9)
    assert std.item() == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.1), abs=1e-6)
    for nearly in (0.99999994, 0.9997):  # a grid that starts a little below 1
        _, close = flow_sde(x, x, torch.tensor([nearly]), torch.tensor([0.9]), 0.7, sigma_max=0.9)
        assert close.item() == pytest.approx(std.item(), rel=2e-3)


def test_ddim_matches_the_diffusers_scheduler():
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    latents, noise, draw = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1), normal(2, 4, 3, 3, seed=2)
    for timestep in scheduler.timesteps[:-1]:
        expected = scheduler.step(noise, timestep, latents, eta=0.8, variance_noise=draw, return_dict=False)[0]
        now = scheduler.alphas_cumprod[timestep].expand(2)
        after = scheduler.alphas_cumprod[timestep - 100].expand(2)
        mean, std = ddim(latents, noise, now, after, eta=0.8)
        torch.testing.assert_close(mean + std * draw, expected, rtol=1e-4, atol=1e-5)


def test_log_prob_is_the_mean_of_the_normal_log_density():
    mean, sample, std = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1, 1)
    expected = torch.distributions.Normal(mean, std).log_prob(sample).flatten(1).mean(1)
    torch.testing.assert_close(log_prob(sample, Transition(mean, std)), expected)
    squared = squared_error_log_prob(sample, Transition(mean, std))
    torch.testing.assert_close(squared, -((sample - mean) ** 2).flatten(1).mean(1))


def gaussian_velocity(latents, sigma, center=1.5, spread=0.4):
    """The exact marginal velocity of the flow between N(0, 1) noise and N(center, spread^2) images."""
    variance = (1 - sigma) ** 2 * spread**2 + sigma**2
    residual = latents - (1 - sigma) * center
    image = center + (1 - sigma) * spread**2 / variance * residual
    noise = sigma / variance * residual
    return noise - image


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.7])
def test_many_fine_steps_keep_the_marginals_of_the_ode(noise_level):
    kind, steps, samples = "flow_sde", 300, 20_000
    sigmas = torch.linspace(1, 0, steps + 1)
    sampler = Sampler(Schedule(sigmas, sigmas[:-1] * 1000), kind, noise_level)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(samples, 1, 1, 1, generator=generator)
    for step in range(steps):
        velocity = gaussian_velocity(latents, sigmas[step])
        index = torch.full((samples,), step)
        if step == steps - 1 or noise_level == 0:
            latents = flow_euler(latents, velocity, *sampler._grid(index))
        else:
            mean, std = sampler.stochastic(latents, velocity, index)
            latents = mean + std * torch.randn(latents.shape, generator=generator)
    assert latents.mean().item() == pytest.approx(1.5, abs=4 * 0.4 / samples**0.5 + 0.01)
    assert latents.std().item() == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("noise_level", [0.0, 0.5, 0.9])
def test_cps_keeps_the_shares_of_signal_and_noise(noise_level):
    """With one image only, so that x0 is known, the latents are N((1 - sigma) image, sigma^2) after every step."""
    sigmas, samples = torch.linspace(1, 0, 7), 40_000
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(samples, 1, 1, 1, generator=generator)
    for now, after in zip(sigmas[:-2], sigmas[1:-1], strict=True):
        velocity = gaussian_velocity(latents, now, spread=0.0)
        mean, std = cps(latents, velocity, now.expand(samples), after.expand(samples), noise_level)
        latents = mean + std * torch.randn(latents.shape, generator=generator)
        assert latents.mean().item() == pytest.approx((1 - after.item()) * 1.5, abs=0.03)
        assert latents.std().item() == pytest.approx(after.item(), abs=0.02)


def test_window_is_the_same_for_everyone_and_moves_between_iterations():
    windows = [sde_window(10, 3, (0, 6), seed=1, iteration=i) for i in range(40)]
    assert windows == [sde_window(10, 3, (0, 6), seed=1, iteration=i) for i in range(40)]
    assert {w.start for w in windows} == {0, 1, 2, 3}
    assert all(len(w) == 3 for w in windows)


@pytest.mark.parametrize("size, where", [(4, (0, 3)), (1, (0, 10)), (0, (0, 5)), (10, None), (2, (-1, 4))])
def test_window_that_does_not_fit_is_refused(size, where):
    with pytest.raises(ValueError, match="sde_window_range.*Found size"):
        sde_window(10, size, where, 0, 0)
