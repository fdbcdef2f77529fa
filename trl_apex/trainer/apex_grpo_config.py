"""Arguments of APEXGRPOTrainer."""

import dataclasses
from dataclasses import dataclass, field

from trl import GRPOConfig

from ..aggregation.options import RULES, ApexOptions
from .aggregation_fields import AggregationFields


@dataclass
class APEXGRPOConfig(AggregationFields, GRPOConfig):
    """`trl.GRPOConfig` plus the options of the aggregator: eight as fields, all of [`ApexOptions`] in one.

    Nothing of TRL's is changed or forbidden; only `multi_objective_aggregation` is "apex" by default and may name any
    rule of [`MultiObjectiveRewardAggregator`]. `scale_rewards` is TRL's option and reaches the rules that know it.

    Raises:
        ValueError: for an unknown rule, an option out of its range, or a conflict source that needs the gradient probe,
            which the language trainer does not have.

    Example:
        >>> config = APEXGRPOConfig("run", use_cpu=True, bf16=False, warmup_iterations=5)
        >>> config.multi_objective_aggregation, config.warmup_iterations, config.epsilon
        ('apex', 5, 0.2)
    """

    multi_objective_aggregation: str = field(
        default="apex", metadata={"help": f"How rewards become one advantage: one of {', '.join(RULES)}."}
    )

    def __post_init__(self) -> None:
        self._plain_aggregation_options()
        self._check_aggregation(self._checked_aggregation_options())
        GRPOConfig.__post_init__(self)

    def _check_aggregation(self, options: ApexOptions) -> None:
        if self.multi_objective_aggregation not in RULES:
            raise ValueError(
                f"`multi_objective_aggregation` must be one of {', '.join(RULES)}. "
                f"Found {self.multi_objective_aggregation!r}. Pass one of these."
            )
        if options.conflict_source != "advantage":
            raise ValueError(
                "`conflict_source` must be 'advantage' for APEXGRPOTrainer, which has no gradient probe. "
                f"Found {options.conflict_source!r}. Remove it from the configuration."
            )

    @classmethod
    def from_grpo_config(cls, config: GRPOConfig) -> "APEXGRPOConfig":
        """A plain `trl.GRPOConfig` with the aggregator's defaults beside it; every value of TRL's is kept as it is.

        `multi_objective_aggregation` is the exception: TRL's default, "sum_then_normalize", becomes "apex".

        Args:
            config (`trl.GRPOConfig`): or a subclass of it.
        """
        # Copied rather than constructed anew: TRL's __post_init__ fills fields that it refuses to be given together.
        upgraded = object.__new__(cls)
        upgraded.__dict__.update({f.name: f.default for f in dataclasses.fields(AggregationFields)})
        upgraded.__dict__.update(config.__dict__)
        if config.multi_objective_aggregation == "sum_then_normalize":
            upgraded.multi_objective_aggregation = "apex"
        upgraded._check_aggregation(upgraded._checked_aggregation_options())
        return upgraded
