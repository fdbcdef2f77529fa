"""The cost of an aggregation grows linearly with the batch."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trl_apex.aggregation import MultiObjectiveRewardAggregator


class Elements(TorchDispatchMode):
    """Counts the elements that all operations together produce."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.count += sum(one.numel() for one in made if isinstance(one, torch.Tensor))
        return result


def elements(rows: int) -> int:
    rewards, groups = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0)), torch.arange(rows) // 24
    aggregator = MultiObjectiveRewardAggregator(list("abcd"))
    with Elements() as made:
        aggregator(rewards, groups)
    return made.count


def test_work_is_linear_in_the_batch():
    small, large = elements(2_400), elements(24_000)
    assert 8 * small < large < 11 * small  # a quadratic step would be 100


def test_unequal_groups_take_no_more_memory_than_rows():
    """One huge group among many tiny ones: padding to the largest would need 20,000 x 20,000 cells."""
    sizes = torch.cat([torch.ones(20_000, dtype=torch.int64), torch.tensor([20_000])])
    groups = torch.arange(len(sizes)).repeat_interleave(sizes)
    rewards = torch.randn(len(groups), 2, generator=torch.Generator().manual_seed(0))
    for rule in ("apex", "normalize_then_sum", "sum_then_normalize"):
        advantages, _ = MultiObjectiveRewardAggregator(["a", "b"], rule=rule)(rewards, groups)
        assert (advantages[:20_000] == 0).all() or rule == "normalize_then_sum"
        assert advantages[20_000:].std() > 0.5
