"""The aggregator without any trainer: rewards in, advantages out."""

import torch

from trl_apex import MultiObjectiveRewardAggregator

PROMPTS, GROUP = 8, 6  # six samples for each of eight prompts


def batch(iteration: int, generator: torch.Generator) -> torch.Tensor:
    """Three rewards of one rollout: loud (spread 10), quiet (spread 0.1, rises by itself), and one often missing."""
    loud = 10 * torch.randn(PROMPTS * GROUP, generator=generator)
    quiet = 0.1 * torch.randn(PROMPTS * GROUP, generator=generator) - 0.005 * loud + 0.02 * iteration
    sparse = torch.rand(PROMPTS * GROUP, generator=generator)
    sparse[: PROMPTS * GROUP // 4] = torch.nan  # two prompts ask for nothing that this reward could judge
    return torch.stack([loud, quiet, sparse], dim=1)


def main(iterations: int = 30) -> dict[str, float]:
    generator, group_ids = torch.Generator().manual_seed(0), torch.arange(PROMPTS).repeat_interleave(GROUP)
    aggregator = MultiObjectiveRewardAggregator(
        ["loud", "quiet", "sparse"], options={"warmup_iterations": 5, "ramp_iterations": 5}
    )
    for iteration in range(iterations):
        advantages, metrics = aggregator(batch(iteration, generator), group_ids)
        if iteration % 10 == 9:
            print(iteration + 1, {name: round(value, 2) for name, value in aggregator.priorities.items()})
    print("advantages of the first prompt:", [round(value, 2) for value in advantages[:GROUP].tolist()])
    return aggregator.priorities


if __name__ == "__main__":
    main()
