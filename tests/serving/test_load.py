"""Many trainers at once against one server: whoever has to wait is served, and nothing counts as failed."""

import time

import pytest
import torch
from loopback import running

from trl_apex.rewards import RemoteReward, RewardScorer
from trl_apex.serving.server import Limits


@pytest.mark.parametrize("options", [{}, {"batch_size": 64}, {"as_uint8": False}])
def test_eight_clients_at_once(options):
    """Each with 144 images in chunks of 24, as a rollout sends them; two bodies fit into the server at a time."""
    sizes = []

    def corner(images, **keywords):
        time.sleep(0.02)
        sizes.append(len(images))
        return (images[:, 0, 0, 0] * 255).tolist()

    images = torch.zeros(144, 3, 16, 16)
    images[:, 0, 0, 0] = torch.arange(144) / 255
    limits = Limits(max_body=64 * 3 * 4 * 16 * 16 + 2000, max_memory=2 * (64 * 3 * 4 * 16 * 16 + 2000))
    with running([corner], limits=limits, max_batch=64) as url:
        scorers = [RewardScorer([RemoteReward(url, "corner", **options)]) for _ in range(8)]
        futures = [
            [s.submit(prompts=["a"] * 24, completions=[None] * 24, images=part) for part in images.split(24)]
            for s in scorers
        ]
        scored = [[future.result(timeout=60) for future in own] for own in futures]
        for scorer in scorers:
            scorer.close()
    for own in scored:
        assert torch.cat([s.rewards[:, 0] for s in own]).tolist() == pytest.approx(list(range(144)), abs=1e-3)
        assert all(s.failures == {"corner": 0} for s in own)
    assert sum(sizes) == 8 * 144 and max(sizes) <= 64


def test_more_connections_than_the_server_takes():
    """Some are answered 503, some cut off while they send: all of them come again."""

    def corner(completions, **keywords):
        return [float(image.getpixel((0, 0))[0]) for image in completions]

    images = torch.ones(12, 3, 512, 512) / 255
    with running([corner], limits=Limits(max_connections=6)) as url:
        scorers = [RewardScorer([RemoteReward(url, "corner", batch_size=2)], max_retries=0) for _ in range(2)]
        futures = [s.submit(prompts=["a"] * 12, completions=[None] * 12, images=images) for s in scorers]
        scored = [future.result(timeout=60) for future in futures]
        for scorer in scorers:
            scorer.close()
    for own in scored:
        assert own.failures == {"corner": 0} and own.rewards.flatten().tolist() == [1.0] * 12
