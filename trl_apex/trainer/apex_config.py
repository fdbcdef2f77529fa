"""Arguments of APEXTrainer."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..aggregation.options import RULES, ApexOptions
from .diffusion_grpo_config import DiffusionGRPOConfig, _help


@dataclass
class APEXConfig(ApexOptions, DiffusionGRPOConfig):
    """[`DiffusionGRPOConfig`] plus every option of the aggregator, under the same names ([`ApexOptions`]).

    `multi_objective_aggregation` is "apex" by default and may name any rule of
    [`MultiObjectiveRewardAggregator`], so that baselines run in the same trainer.
    """

    multi_objective_aggregation: str = field(
        default="apex", metadata=_help(f"How rewards become one advantage: one of {', '.join(RULES)}.")
    )

    def __post_init__(self) -> None:
        DiffusionGRPOConfig.__post_init__(self)
        ApexOptions.__post_init__(self)

    @classmethod
    def allowed_rules(cls) -> tuple[str, ...]:
        return RULES

    def aggregator_options(self) -> dict[str, Any]:
        """The options of the aggregator, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(ApexOptions)}
