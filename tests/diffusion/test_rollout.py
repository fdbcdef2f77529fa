import torch

from trl_apex.diffusion.nouns import Schedule
from trl_apex.diffusion.rollout import denoise, keyed_noise
from trl_apex.diffusion.schedule import Sampler

SIGMAS = torch.linspace(1, 0, 7)
SAMPLER = Sampler(Schedule(SIGMAS, SIGMAS[:-1] * 1000), "flow_sde", 0.7)
SHAPE = (2, 3, 3)


class Counting:
    """A prediction that differs by sample and step, and counts what it was asked for."""

    def __init__(self):
        self.rows = []

    def __call__(self, latents, timesteps, samples):
        self.rows.append(len(latents))
        return torch.tanh(latents) * (1 + timesteps.view(-1, 1, 1, 1) / 1000) + (samples // 4).view(-1, 1, 1, 1)


def test_noise_depends_on_its_key_alone():
    many = keyed_noise([(7, 0, i) for i in range(6)], SHAPE)
    torch.testing.assert_close(many[4:], keyed_noise([(7, 0, 4), (7, 0, 5)], SHAPE), rtol=0, atol=0)
    assert not torch.equal(many[0], many[1])
    assert not torch.equal(many[0], keyed_noise([(7, 1, 0)], SHAPE)[0])
    assert abs(keyed_noise([(0, i) for i in range(2000)], (4,)).std().item() - 1) < 0.05


def test_noise_is_float32_while_another_thread_has_changed_the_default():
    expected = keyed_noise([(7, 0, 1)], SHAPE)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = keyed_noise([(7, 0, 1)], SHAPE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_log_prob_of_the_trajectory_is_what_the_update_recomputes():
    predict, window = Counting(), range(1, 4)
    initial = keyed_noise([(0, i) for i in range(8)], SHAPE)
    noise = keyed_noise([(1, i) for i in range(8)], (3, *SHAPE))
    final, trajectory = denoise(predict, SAMPLER, initial, window, noise)
    assert trajectory.latents.shape == (8, 4, *SHAPE) and trajectory.log_prob.shape == (8, 3)
    assert predict.rows == [8] * 6
    for i, step in enumerate(window):
        steps = torch.full((8,), step)
        prediction = predict(trajectory.latents[:, i], SAMPLER.timesteps(steps), torch.arange(8))
        transition = SAMPLER.stochastic(trajectory.latents[:, i], prediction, steps)
        again = SAMPLER.log_prob(trajectory.latents[:, i + 1], transition)
        assert torch.equal(again, trajectory.log_prob[:, i])
    assert torch.isfinite(final).all()


def test_shared_prefix_costs_one_forward_a_group_and_changes_nothing():
    window = range(3, 5)
    initial = keyed_noise([(0, i // 4) for i in range(8)], SHAPE)
    noise = keyed_noise([(1, i) for i in range(8)], (2, *SHAPE))
    plain, shared = Counting(), Counting()
    expected, reference = denoise(plain, SAMPLER, initial, window, noise)
    representative = torch.arange(8) // 4 * 4
    final, trajectory = denoise(shared, SAMPLER, initial, window, noise, representative)
    torch.testing.assert_close(final, expected, rtol=0, atol=0)
    torch.testing.assert_close(trajectory.log_prob, reference.log_prob, rtol=0, atol=0)
    assert plain.rows == [8] * 6
    assert shared.rows == [2, 2, 2, 8, 8, 8]


def test_an_empty_window_is_the_ode():
    initial = keyed_noise([(0, i) for i in range(2)], SHAPE)
    final, _ = denoise(Counting(), SAMPLER, initial, range(0), initial.new_zeros(2, 0, *SHAPE))
    latents, predict = initial, Counting()
    for step in range(6):
        velocity = predict(latents, SIGMAS[step].expand(2) * 1000, torch.arange(2))
        latents = latents + (SIGMAS[step + 1] - SIGMAS[step]) * velocity
    torch.testing.assert_close(final, latents)
