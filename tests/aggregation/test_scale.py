"""Fast enough to forget about: the cost grows linearly with the batch."""

import time

import pytest
import torch

from trl_apex.aggregation import MultiObjectiveRewardAggregator


def seconds(rows: int, repeats: int) -> float:
    g = torch.Generator().manual_seed(0)
    rewards, groups = torch.randn(rows, 4, generator=g), torch.arange(rows) // 24
    aggregator = MultiObjectiveRewardAggregator(list("abcd"))
    aggregator(rewards, groups)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        aggregator(rewards, groups)
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.slow
def test_linear_in_the_batch():
    small, large = seconds(24_000, 5), seconds(240_000, 5)
    assert large < 30 * small  # a quadratic step would be 100


def test_unequal_groups_take_no_more_memory_than_rows():
    """One huge group among many tiny ones: padding to the largest would need 20,000 x 20,000 cells."""
    sizes = torch.cat([torch.ones(20_000, dtype=torch.int64), torch.tensor([20_000])])
    groups = torch.arange(len(sizes)).repeat_interleave(sizes)
    rewards = torch.randn(len(groups), 2, generator=torch.Generator().manual_seed(0))
    for rule in ("apex", "normalize_then_sum", "sum_then_normalize"):
        advantages, _ = MultiObjectiveRewardAggregator(["a", "b"], rule=rule)(rewards, groups)
        assert (advantages[:20_000] == 0).all() or rule == "normalize_then_sum"
        assert advantages[20_000:].std() > 0.5
