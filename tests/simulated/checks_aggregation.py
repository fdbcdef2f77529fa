"""Every rule works where the rewards are, and the aggregator returns its advantages there, with the CPU's numbers."""

import pytest
import torch

from trl_apex.aggregation import RULES, MultiObjectiveRewardAggregator
from trl_apex.aggregation.normalize import group_rows
from trl_apex.aggregation.rules import TABLE

GENERATOR = torch.Generator().manual_seed(0)
REWARDS = torch.randn(24, 3, generator=GENERATOR) * torch.tensor([0.3, 1.0, 0.4]) + torch.tensor([0.5, 21.5, 4.0])
REWARDS[3, 1] = torch.nan
IDS = torch.arange(4).repeat_interleave(6)


@pytest.mark.parametrize("rule", TABLE)
def test_a_rule_takes_its_device_from_the_rewards(rule):
    weights = torch.tensor([1.0, 2.0, 1.0])
    expected = TABLE[rule].function(REWARDS, weights, group_rows(IDS))
    found = TABLE[rule].function(REWARDS.to("sim:0"), weights.to("sim:0"), group_rows(IDS.to("sim:0")))
    for here, there in zip(expected, found, strict=True):
        assert there.device.type == "sim"
        torch.testing.assert_close(there.cpu(), here)


@pytest.mark.parametrize("rule", RULES)
def test_the_aggregator_returns_advantages_on_the_device_of_the_rewards(rule):
    here, _ = MultiObjectiveRewardAggregator(["a", "b", "c"], rule=rule)(REWARDS, IDS)
    aggregator = MultiObjectiveRewardAggregator(["a", "b", "c"], rule=rule)
    there, _ = aggregator(REWARDS.to("sim:0"), IDS.to("sim:0"))
    assert there.device.type == "sim" and aggregator.normalized.device.type == "sim"
    torch.testing.assert_close(there.cpu(), here)
