"""AWM, DiffusionNFT and the flow-matching ratio, against the formulas written out element by element."""

import math

import pytest
import torch

from trl_apex.diffusion.losses import (
    WEIGHTINGS,
    add_noise,
    awm_log_likelihood,
    fpo_log_likelihood,
    nft_loss,
    training_sigmas,
)

GRID = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0])


def rows(seed: int, count: int = 3):
    generator = torch.Generator().manual_seed(seed)
    clean, noise, prediction, old = torch.randn(4, count, 2, 3, 3, generator=generator)
    sigmas = torch.rand(count, generator=generator) * 0.8 + 0.1
    advantage = torch.randn(count, generator=generator) * 3
    return clean, noise, prediction, old, sigmas, advantage


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_awm_is_the_written_formula(weighting):
    clean, noise, prediction, _, sigmas, _ = rows(0)
    found = awm_log_likelihood(prediction, noise - clean, sigmas, weighting)
    for i in range(3):
        t = float(sigmas[i])
        errors = [
            (float(v) - (float(e) - float(x))) ** 2
            for v, e, x in zip(prediction[i].flatten(), noise[i].flatten(), clean[i].flatten(), strict=True)
        ]
        m = sum(errors) / len(errors)
        wanted = {
            "ghuber": -(t / 0.25) * ((m + 1e-10) ** 0.25 - 1e-10**0.25),
            "huber": -t * (math.sqrt(m + 1e-10) - 1e-5),
            "uniform": -m,
            "t": -t * m,
            "t2": -t * t * m,
        }[weighting]
        assert found[i].item() == pytest.approx(wanted, rel=1e-6)


def test_the_flow_matching_ratio_is_the_written_formula():
    clean, noise, prediction, old, _, _ = rows(1)
    target = noise - clean
    new, before = fpo_log_likelihood(prediction, target), fpo_log_likelihood(old, target)
    for i in range(3):
        loss_new = ((prediction[i] - target[i]).double() ** 2).mean().item()
        loss_old = ((old[i] - target[i]).double() ** 2).mean().item()
        assert (new - before).exp()[i].item() == pytest.approx(math.exp(10 * (loss_old - loss_new)), rel=1e-5)


def test_nft_is_the_written_formula():
    clean, noise, prediction, old, sigmas, advantage = rows(2)
    noisy, beta = add_noise(clean, noise, sigmas), 0.3
    found = nft_loss(prediction, old, noisy, clean, sigmas, advantage, beta)
    for i in range(3):
        t, a = float(sigmas[i]), max(-5.0, min(5.0, float(advantage[i])))
        r = a / 10 + 0.5
        losses = []
        for sign in (1, -1):
            v = [
                (1 - sign * beta) * float(o) + sign * beta * float(n)
                for o, n in zip(old[i].flatten(), prediction[i].flatten(), strict=True)
            ]
            error = [
                float(x) - t * w - float(c) for x, w, c in zip(noisy[i].flatten(), v, clean[i].flatten(), strict=True)
            ]
            width = max(sum(abs(e) for e in error) / len(error), 1e-5)
            losses.append(sum(e * e / width for e in error) / len(error))
        wanted = 5 * (r * losses[0] / beta + (1 - r) * losses[1] / beta)
        assert found[i].item() == pytest.approx(wanted, rel=1e-5)


def test_at_the_old_policy_the_value_of_nft_is_blind_to_the_advantage_and_its_gradient_is_not():
    clean, noise, prediction, _, sigmas, _ = rows(3, count=1)
    noisy, values, gradients = add_noise(clean, noise, sigmas), [], []
    for advantage in (-2.0, 0.0, 2.0):
        velocity = prediction.clone().requires_grad_(True)
        loss = nft_loss(velocity, prediction, noisy, clean, sigmas, torch.tensor([advantage]))
        loss.sum().backward()
        values.append(loss.item())
        gradients.append(velocity.grad)
    assert values[0] == pytest.approx(values[1]) == pytest.approx(values[2])
    torch.testing.assert_close(gradients[0], -gradients[2])
    assert gradients[1].abs().max() < 1e-7 < gradients[2].abs().max()
    # A good image pulls the velocity towards its own target: a step against the gradient lowers the error.
    target = noise - clean
    closer = prediction - 1e-3 * gradients[2]
    assert (closer - target).square().mean() < (prediction - target).square().mean()


def test_where_model_and_old_policy_agree_the_ratios_gradient_is_the_advantage_times_that_of_the_likelihood():
    clean, noise, prediction, _, sigmas, advantage = rows(4)
    target = noise - clean
    for likelihood in (lambda v: awm_log_likelihood(v, target, sigmas), lambda v: fpo_log_likelihood(v, target)):
        velocity = prediction.clone().requires_grad_(True)
        new = likelihood(velocity)
        ((new - new.detach()).exp() * advantage).sum().backward()
        plain = prediction.clone().requires_grad_(True)
        (likelihood(plain) * advantage).sum().backward()
        torch.testing.assert_close(velocity.grad, plain.grad)


@pytest.mark.parametrize("strategy", ["grid", "stratified", "uniform", "logit_normal"])
def test_noise_levels_lie_in_their_bounds_and_repeat_with_the_seed(strategy):
    first, again = (
        training_sigmas(strategy, GRID, (50, 4), torch.Generator().manual_seed(1), low=0.2, high=0.95)
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert first.shape == (50, 4) and first.min() >= 0.2 and first.max() <= 0.95
    if strategy in ("grid", "stratified"):
        assert set(first.flatten().tolist()) <= set(GRID.tolist())
        assert all(len(set(row)) == 4 for row in first.tolist())


def test_one_level_of_each_stratum():
    levels = training_sigmas("stratified", GRID, (200, 3), torch.Generator().manual_seed(0))
    for low, high in ((0.9, 1.0), (0.5, 0.7), (0.1, 0.3)):
        assert (((levels > low - 1e-6) & (levels < high + 1e-6)).sum(1) == 1).all()
    assert set(levels.flatten().tolist()) == set(GRID[:-1].tolist())


def test_too_few_noise_levels_are_refused_with_a_way_out():
    with pytest.raises(ValueError, match="timesteps_per_image.*at most 2.*Found 3"):
        training_sigmas("grid", GRID, (1, 3), torch.Generator(), low=0.6, high=0.95)
