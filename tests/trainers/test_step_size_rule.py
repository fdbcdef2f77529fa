"""The measure of an iteration's movement, the rate that follows it, and the decays of slower copies."""

import math
import random

import pytest
import torch

from trl_apex.diffusion.losses import AWM_DECAY, NFT_DECAY, NFT_TEXT_DECAY, Decay
from trl_apex.trainers.step_size import movement, next_rate_factor


def test_movement_is_the_mean_squared_change_of_the_velocity():
    old = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    new = old + torch.tensor([0.1, -0.2, 0.3]).view(3, 1, 1, 1)
    assert movement(new, old).item() == pytest.approx((0.01 + 0.04 + 0.09) / 3, rel=1e-5)
    assert movement(old, old) == 0


@pytest.mark.parametrize("start", [1 / 3, 1.0, 3.0])
def test_a_rate_three_times_off_is_put_right_within_a_few_iterations(start):
    """A base rate that is `start` times the right one, and a noisy movement that grows with the square of the rate."""
    factor, noise, seen = 1.0, random.Random(0), []
    for _ in range(40):
        moved = 0.02 * (start * factor) ** 2 * math.exp(noise.gauss(0, 0.3))
        factor = next_rate_factor(factor, moved, target=0.02)
        seen.append(start * factor)
    assert all(0.5 < rate < 2 for rate in seen[4:])
    assert math.prod(seen[4:]) ** (1 / 36) == pytest.approx(1, rel=0.1)


def test_the_rate_stays_within_its_bounds_and_changes_little_at_a_time():
    up = down = 1.0
    for _ in range(20):
        before = up, down
        up, down = next_rate_factor(up, 1e-9, 1.0), next_rate_factor(down, 1e9, 1.0)
        assert up <= 1.5 * before[0] + 1e-12 and down >= before[1] / 1.5 - 1e-12
    assert (up, down) == (10.0, 0.1)
    assert next_rate_factor(2.0, 1.0, 1.0) == 2.0


@pytest.mark.parametrize("moved", [0.0, math.nan, math.inf])
def test_an_iteration_that_says_nothing_leaves_the_rate(moved):
    assert next_rate_factor(0.7, moved, 0.02) == 0.7


@pytest.mark.parametrize(
    "decay, wanted",
    [
        (NFT_DECAY, {0: 0, 1: 0.001, 300: 0.3, 500: 0.5, 9000: 0.5}),
        (NFT_TEXT_DECAY, {0: 0, 75: 0, 76: 0.0075, 208: 0.9975, 209: 0.999}),
        (AWM_DECAY, {0: 0, 150: 0.15, 300: 0.3, 301: 0.3}),
        (Decay(0, 0.0, 0.0), {0: 0, 100: 0}),
    ],
)
def test_decays_are_those_of_the_papers(decay, wanted):
    assert {step: decay.at(step) for step in wanted} == pytest.approx(wanted)
