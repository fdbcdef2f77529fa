"""The population estimate on a problem whose true conflict is known."""

import json
import math

import pytest
import torch
from torch import nn

from trl_apex.aggregation import PopulationConflict
from trl_apex.aggregation.normalize import adaptive_normalize, group_moments, group_rows, pooled_variance
from trl_apex.trainers.probe import GradientProbe

SIZE, PROMPTS, GROUP = 16, 32, 8


class KnownConflict:
    """A linear Gaussian policy, y = W a + noise, whose objectives' true gradients have a chosen cosine.

    Objective k rewards <noise, M_k a>, so its true gradient at W is proportional to M_k. Both rewards also share a
    large part that no action causes (a lucky prompt background, say): it makes the scores correlate positively,
    whatever the gradients do.
    """

    def __init__(self, cosine: float, shared: float, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        first, other = torch.randn(2, SIZE, SIZE, generator=self.generator)
        first = first / first.norm()
        other = other - (other * first).sum() * first
        second = cosine * first + math.sqrt(1 - cosine**2) * other / other.norm()
        self.directions = torch.stack([first, second])
        self.shared = shared
        self.policy = nn.Linear(SIZE, SIZE, bias=False)
        self.probe = GradientProbe(self.policy, ["a", "b"])

    def update(self):
        prompts = torch.randn(PROMPTS, SIZE, generator=self.generator).repeat_interleave(GROUP, 0)
        noise = torch.randn(PROMPTS * GROUP, SIZE, generator=self.generator)
        luck = self.shared * torch.randn(PROMPTS * GROUP, 1, generator=self.generator)
        rewards = torch.einsum("bo,koi,bi->bk", noise, self.directions, prompts) + luck
        groups = group_rows(torch.arange(PROMPTS).repeat_interleave(GROUP))
        moments = group_moments(rewards.double(), torch.ones_like(rewards, dtype=torch.bool), groups)
        scores = adaptive_normalize(moments, groups, pooled_variance(moments).sqrt()).float()
        advantages = scores.mean(1)
        with self.probe.step():
            self.probe.rows(advantages, scores, halves=groups.index % 2)
            mean = self.policy(prompts)
            action = (mean + noise).detach()
            log_prob = -0.5 * ((action - mean) ** 2).sum(1)
            (-advantages * log_prob).mean().backward()
        return self.probe.result()


def test_right_where_the_batch_cosine_is_wrong():
    true = -0.8
    problem, estimate = KnownConflict(true, shared=2.0, seed=0), PopulationConflict(2, decay=1.0)
    batch = []
    for _ in range(200):
        result = problem.update()
        batch.append(float(result.cosine[0, 1]))
        estimate.update(result.cross)
    assert sum(batch) / len(batch) > 0.2  # the batch cosine sees friends
    cosine, error = estimate.estimate()
    assert float(error[0, 1]) < 0.15
    assert abs(float(cosine[0, 1]) - true) < 3 * float(error[0, 1])
    assert float(cosine[0, 1]) < -0.5


@pytest.mark.slow
def test_standard_errors_are_honest():
    """Over seeds and true cosines, the error in units of its standard error has about unit size."""
    errors = []
    for seed in range(24):
        true = (-0.8, 0.0, 0.6)[seed % 3]
        problem, estimate = KnownConflict(true, shared=1.0, seed=seed), PopulationConflict(2, decay=1.0)
        for _ in range(100):
            estimate.update(problem.update().cross)
        cosine, error = estimate.estimate()
        errors.append((float(cosine[0, 1]) - true) / float(error[0, 1]))
    size = math.sqrt(sum(value**2 for value in errors) / len(errors))
    assert 0.6 < size < 1.6


def test_it_says_nothing_until_it_knows():
    estimate = PopulationConflict(2)
    assert estimate.estimate()[0].isnan().all()
    estimate.update(torch.eye(2))
    assert estimate.estimate()[0].isnan().all()  # one update has no spread
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        estimate.update(torch.randn(2, 2, generator=g))
    assert estimate.estimate()[0].isnan().all()  # pure noise: no diagonal is clearly positive


def test_decay_follows_a_change():
    slow, fast = PopulationConflict(2, decay=1.0), PopulationConflict(2, decay=0.8)
    g = torch.Generator().manual_seed(0)
    for step in range(80):
        true = torch.tensor([[1.0, 0.9], [0.9, 1.0]]) if step < 60 else torch.tensor([[1.0, -0.9], [-0.9, 1.0]])
        for estimate in (slow, fast):
            estimate.update(true + 0.05 * torch.randn(2, 2, generator=g))
    assert fast.estimate()[0][0, 1] < -0.8 and slow.estimate()[0][0, 1] > 0.3


def test_state_round_trip():
    estimate = PopulationConflict(3)
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        estimate.update(torch.eye(3) + 0.1 * torch.randn(3, 3, generator=g))
    other = PopulationConflict(3)
    other.load_state_dict(json.loads(json.dumps(estimate.state_dict())))
    assert torch.equal(estimate.estimate()[0], other.estimate()[0])
    assert torch.equal(estimate.estimate()[1], other.estimate()[1])
    with pytest.raises(ValueError, match="must be of 2 objectives. Found 3"):
        PopulationConflict(2).load_state_dict(estimate.state_dict())


def test_decay_must_make_sense():
    with pytest.raises(ValueError, match="`decay` must lie in"):
        PopulationConflict(2, decay=0.0)
