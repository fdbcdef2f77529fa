import pytest
import torch

from trl_apex.diffusion.losses import clipped_surrogate, gaussian_kl


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
