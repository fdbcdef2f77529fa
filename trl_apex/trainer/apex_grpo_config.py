"""Arguments of APEXGRPOTrainer."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ..aggregation.options import RULES, ApexOptions

# Fields that both parents have, under TRL's meaning and default here.
SHARED_FIELDS = ("scale_rewards",)


@dataclass
class APEXGRPOConfig(GRPOConfig, ApexOptions):
    """`trl.GRPOConfig` plus every option of the aggregator, under the same names ([`ApexOptions`]).

    Nothing of TRL's is changed or forbidden; only `multi_objective_aggregation` is "apex" by default and may name any
    rule of [`MultiObjectiveRewardAggregator`]. `scale_rewards` is TRL's option and reaches the rules that know it.

    Raises:
        ValueError: for an unknown rule, an option out of its range, or a conflict source that needs the gradient probe,
            which the language trainer does not have.

    Example:
        >>> config = APEXGRPOConfig(output_dir="run", use_cpu=True, bf16=False, warmup_iterations=5)
        >>> config.multi_objective_aggregation, config.warmup_iterations, config.epsilon
        ('apex', 5, 0.2)
    """

    multi_objective_aggregation: str = field(
        default="apex", metadata={"help": f"How rewards become one advantage: one of {', '.join(RULES)}."}
    )

    def __post_init__(self) -> None:
        GRPOConfig.__post_init__(self)
        self._check_aggregation()

    def _check_aggregation(self) -> None:
        ApexOptions(**self.aggregator_options())
        if self.multi_objective_aggregation not in RULES:
            raise ValueError(
                f"`multi_objective_aggregation` must be one of {', '.join(RULES)}. "
                f"Found {self.multi_objective_aggregation!r}. Pass one of these."
            )
        if self.conflict_source != "advantage":
            raise ValueError(
                "`conflict_source` must be 'advantage' for APEXGRPOTrainer, which has no gradient probe. "
                f"Found {self.conflict_source!r}. Remove it from the configuration."
            )

    def aggregator_options(self) -> dict[str, Any]:
        """The options of the aggregator, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(ApexOptions)}

    @classmethod
    def from_grpo_config(cls, config: GRPOConfig) -> "APEXGRPOConfig":
        """A plain `trl.GRPOConfig` with the aggregator's defaults beside it; every value of TRL's is kept as it is.

        `multi_objective_aggregation` is the exception: TRL's default, "sum_then_normalize", becomes "apex".

        Args:
            config (`trl.GRPOConfig`): or a subclass of it.
        """
        # Copied rather than constructed anew: TRL's __post_init__ fills fields that it refuses to be given together.
        upgraded = object.__new__(cls)
        own = {f.name for f in dataclasses.fields(ApexOptions)} - set(SHARED_FIELDS)
        upgraded.__dict__.update({f.name: f.default for f in dataclasses.fields(cls) if f.name in own})
        upgraded.__dict__.update(config.__dict__)
        if config.multi_objective_aggregation == "sum_then_normalize":
            upgraded.multi_objective_aggregation = "apex"
        upgraded._check_aggregation()
        return upgraded
