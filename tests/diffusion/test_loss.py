"""The clipped ratio of denoising steps, its guards and its KL divergence."""

import math

import pytest
import torch

from trl_apex.diffusion.losses import clipped_surrogate, gaussian_kl, grpo_guard_surrogate, kl_masked_surrogate
from trl_apex.diffusion.transition import Transition, log_prob


def test_unclipped_gradient_is_minus_advantage_times_ratio():
    log_prob = torch.tensor([0.0, 0.01], requires_grad=True)
    result = clipped_surrogate(log_prob, torch.zeros(2), torch.tensor([2.0, -1.0]), 0.1, 0.1)
    result.loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([-2.0, 1.0100502]))
    assert result.ratio[0] == 1


@pytest.mark.parametrize(
    "shift, advantage, gradient_is_zero, low, high",
    [
        (0.2, 1.0, True, False, True),
        (0.2, -1.0, False, False, False),
        (-0.2, 1.0, False, False, False),
        (-0.2, -1.0, True, True, False),
    ],
)
def test_clip_stops_only_moves_that_went_far_enough(shift, advantage, gradient_is_zero, low, high):
    log_prob = torch.tensor([shift], requires_grad=True)
    result = clipped_surrogate(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.1, 0.1)
    result.loss.backward()
    assert (log_prob.grad.item() == 0) == gradient_is_zero
    assert (result.low.item(), result.high.item()) == (low, high)


def test_delta_bounds_a_large_ratio_with_negative_advantage():
    log_prob = torch.tensor([3.0], requires_grad=True)
    result = clipped_surrogate(log_prob, torch.zeros(1), torch.tensor([-1.0]), 0.1, 0.1, delta=2.0)
    assert result.loss.item() == pytest.approx(2.0)


def test_kl_equals_torch_distributions_and_has_a_gradient():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(3, 2, 4, 4, generator=generator).requires_grad_()
    reference = torch.randn(3, 2, 4, 4, generator=generator)
    std = torch.tensor([0.3, 1.0, 2.0]).view(3, 1, 1, 1)
    kl = gaussian_kl(mean, reference, std)
    normals = torch.distributions.Normal(mean, std), torch.distributions.Normal(reference, std)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(*normals).flatten(1).mean(1))
    kl.sum().backward()
    assert mean.grad.abs().min() > 0


def steps_of_a_policy(shift=0.01, count=6):
    """Old means, the latents drawn from them, and new means `shift` away: rows of Flow-SDE at several noise levels."""
    generator = torch.Generator().manual_seed(0)
    old, noise, move = torch.randn(3, count, 2, 4, 4, generator=generator).double()
    std = torch.linspace(0.1, 0.6, count).double().view(-1, 1, 1, 1)
    advantage = torch.tensor([2.0, -1.0, 0.5, -3.0, 1.0, -0.2]).double()
    return old, old + std * noise, (old + shift * move).requires_grad_(), std, advantage


def test_the_kl_mask_drops_what_is_far_and_moves_outward():
    old, drawn, new, std, advantage = steps_of_a_policy()
    before, after = (log_prob(drawn, Transition(mean, std)) for mean in (old, new))
    kl = gaussian_kl(new, old, std)
    threshold = kl.sort().values[2].item()
    result = kl_masked_surrogate(after, before, advantage, kl, threshold)
    result.loss.sum().backward()
    kinds = set()
    for i in range(6):
        d = ((new[i] - old[i]) ** 2).mean().item() / (2 * std[i].item() ** 2)
        x, m, o = drawn[i], new[i], old[i]
        ratio = math.exp((((x - o) ** 2).mean() - ((x - m) ** 2).mean()).item() / (2 * std[i].item() ** 2))
        a = advantage[i].item()
        dropped = d > threshold and ((a > 0 and ratio > 1) or (a < 0 and ratio < 1))
        kinds.add((d > threshold, dropped))
        assert result.loss[i].item() == pytest.approx(0 if dropped else -a * ratio, rel=1e-9)
        assert (result.high | result.low)[i].item() == dropped and (not dropped or result.high[i].item() == (a > 0))
        assert (new.grad[i].abs().max() == 0) == dropped
    assert len(kinds) == 3  # near, far and outward, far and inward


def test_ratios_of_grpo_guard_are_those_of_the_paper():
    old, drawn, new, std, advantage = steps_of_a_policy(0.05)
    lengths = torch.linspace(0.05, 0.2, 6).double()
    result = grpo_guard_surrogate(new, old, drawn, std, lengths, advantage, 1e-3, 2e-3)
    for i in range(6):
        s, a = std[i].item(), advantage[i].item()
        change = (log_prob(drawn, Transition(new, std)) - log_prob(drawn, Transition(old, std)))[i].item()
        bias = ((new[i] - old[i]) ** 2).mean().item() / (2 * s**2)
        ratio = math.exp(s * (change + bias))
        clipped = min(max(ratio, 1 - 1e-3), 1 + 2e-3)
        assert result.ratio[i].item() == pytest.approx(ratio, rel=1e-9)
        assert result.loss[i].item() == pytest.approx(max(-a * ratio, -a * clipped) / lengths[i].item(), rel=1e-9)
    assert result.low.any() or result.high.any()


def test_log_ratios_of_grpo_guard_have_one_center_and_one_spread_at_every_noise_level():
    noise, move = torch.randn(2, 4000, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    plain, guarded = [], []
    for s in (0.05, 0.5):
        std, one = torch.full((4000, 1, 1, 1), s).double(), torch.ones(4000).double()
        result = grpo_guard_surrogate(0.1 * move, 0 * move, s * noise, std, one, one)
        guarded.append(result.ratio.log())
        old = Transition(0 * move, std)
        plain.append(log_prob(s * noise, Transition(0.1 * move, std)) - log_prob(s * noise, old))
    assert plain[0].mean() < -1.9 and plain[0].std() > 5 * plain[1].std()
    for log_ratio in guarded:
        assert abs(log_ratio.mean()) < 4 * log_ratio.std() / 4000**0.5
    assert guarded[0].std() == pytest.approx(guarded[1].std().item(), rel=1e-6)


def test_where_the_policy_has_not_moved_every_guard_has_the_gradient_of_the_plain_ratio():
    old, drawn, new, std, advantage = steps_of_a_policy(0.0)
    lengths = torch.linspace(0.05, 0.2, 6).double()
    before, after = log_prob(drawn, Transition(old, std)), log_prob(drawn, Transition(new, std))
    plain = clipped_surrogate(after, before, advantage, 1e-4, 1e-4)
    masked = kl_masked_surrogate(after, before, advantage, gaussian_kl(new, old, std))
    guarded = grpo_guard_surrogate(new, old, drawn, std, lengths, advantage)
    gradients = [torch.autograd.grad(s.loss.sum(), new, retain_graph=True)[0] for s in (plain, masked, guarded)]
    for surrogate in (plain, masked, guarded):
        assert torch.equal(surrogate.ratio, torch.ones(6).double()) and not (surrogate.low | surrogate.high).any()
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0] * std / lengths.view(-1, 1, 1, 1))
    assert gradients[0].abs().max() > 0.01
