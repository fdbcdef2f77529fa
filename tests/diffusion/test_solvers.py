"""Deterministic solvers of the rollout: against diffusers, and by their order of accuracy and calls of the network."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler
from test_transition import gaussian_velocity, normal

from trl_apex.diffusion.nouns import Schedule
from trl_apex.diffusion.rollout import denoise
from trl_apex.diffusion.schedule import Sampler


def walk(solver, sigmas, initial, velocity, window=range(0), noise=None):
    """Final latents, and how often the velocity was asked for."""
    calls = []

    def predict(latents, timesteps, rows):
        calls.append(len(latents))
        return velocity(latents, timesteps.view(-1, 1, 1, 1) / 1000)

    sampler = Sampler(Schedule(sigmas, sigmas[:-1] * 1000), "flow_sde", 0.7, solver)
    return denoise(predict, sampler, initial, window, noise)[0], len(calls)


def curved(latents, sigma):
    return torch.tanh(latents) * (1 + sigma) + torch.cos(5 * sigma)


@pytest.mark.parametrize("steps", [2, 5, 10])
@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m"])
def test_a_rollout_is_that_of_the_scheduler_of_diffusers(solver, steps):
    if solver == "heun":
        scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(steps)
        levels = scheduler.timesteps / 1000  # names most of them twice
    else:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
        scheduler = DPMSolverMultistepScheduler(**flow)
        scheduler.set_timesteps(steps)
        levels = scheduler.sigmas[:-1]
    initial = expected = normal(3, 2, 4, 4)
    for timestep, sigma in zip(scheduler.timesteps, levels, strict=True):
        expected = scheduler.step(curved(expected, sigma), timestep, expected, return_dict=False)[0]
    grid = torch.cat([levels.unique_consecutive(), torch.zeros(1)])
    torch.testing.assert_close(walk(solver, grid, initial, curved)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver, order, calls", [("euler", 1, 512), ("heun", 2, 1023), ("dpmpp_2m", 2, 512)])
def test_halving_the_steps_shows_the_order_of_a_solver_and_its_calls(solver, order, calls):
    initial = normal(50, 1, 1, 1).double()
    exact = 1.5 + 0.4 * initial  # where the flow of N(1.5, 0.4^2) ends

    def error(steps):
        sigmas = torch.linspace(1, 0, steps + 1).double()
        final, counted = walk(solver, sigmas, initial, gaussian_velocity)
        return (final - exact).abs().max().item(), counted

    (coarse, _), (fine, counted) = error(256), error(512)
    assert coarse / fine == pytest.approx(2**order, rel=0.2)
    assert counted == calls


def test_a_multistep_solver_starts_anew_behind_stochastic_steps():
    sigmas, noise = torch.linspace(1, 0, 7), normal(2, 2, 1, 3, 3, seed=1)
    final, _ = walk("dpmpp_2m", sigmas, normal(2, 1, 3, 3), curved, range(1, 3), noise)
    seen = []

    def remember(latents, sigma):
        seen.append(latents)
        return curved(latents, sigma)

    walk("euler", sigmas, normal(2, 1, 3, 3), remember, range(1, 3), noise)
    rest = Schedule(sigmas[3:], sigmas[3:-1] * 1000)
    alone, _ = denoise(
        lambda x, t, rows: curved(x, t.view(-1, 1, 1, 1) / 1000), Sampler(rest, "flow_sde", 0.7, "dpmpp_2m"), seen[3]
    )
    torch.testing.assert_close(final, alone)


def test_models_that_predict_noise_have_no_other_solver():
    with pytest.raises(ValueError, match="`rollout_solver` must be 'euler'.*Found 'heun'"):
        Sampler(Schedule(torch.tensor([0.1, 0.5, 1.0]), torch.tensor([900.0, 400.0])), "ddim", 1.0, "heun")
