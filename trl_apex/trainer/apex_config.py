"""Arguments of APEXTrainer."""

from dataclasses import dataclass, field

from ..aggregation.rules import GRADIENT_RULES, RULES
from .aggregation_fields import AggregationFields
from .diffusion_grpo_config import DiffusionGRPOConfig, _help


@dataclass
class APEXConfig(AggregationFields, DiffusionGRPOConfig):
    """[`DiffusionGRPOConfig`] plus the options of the aggregator: eight as fields, all of [`ApexOptions`] in one.

    `multi_objective_aggregation` is "apex" by default and may name any rule of
    [`MultiObjectiveRewardAggregator`], so that baselines run in the same trainer.
    """

    multi_objective_aggregation: str = field(
        default="apex", metadata=_help(f"How rewards become one advantage: one of {', '.join(RULES)}.")
    )

    gradient_probe: bool | None = field(
        default=None,
        metadata=_help(
            "Measure the objectives' gradients during training. None: where the rule or `conflict_source` needs them."
        ),
    )
    probe_every: int = field(default=10, metadata=_help("Optimizer steps between two probes; 1 with 'population'."))
    probe_layers: list[str] | None = field(
        default=None,
        metadata=_help(
            "Regular expressions of the linear layers to probe. None: every trainable one (right for LoRA)."
        ),
    )

    def __post_init__(self) -> None:
        self._plain_aggregation_options()
        DiffusionGRPOConfig.__post_init__(self)
        options = self._checked_aggregation_options()
        needed = options.conflict_source != "advantage" or self.multi_objective_aggregation in GRADIENT_RULES
        self._check(
            not (needed and self.gradient_probe is False),
            "`gradient_probe` must not be False where gradients are asked for",
            f"gradient_probe=False with conflict_source={options.conflict_source!r} and the rule "
            f"{self.multi_objective_aggregation!r}",
            "Leave it out.",
        )
        if self.gradient_probe is None:
            self.gradient_probe = needed
        self._check(self.probe_every >= 1, "`probe_every` must be at least 1", self.probe_every, "Use e.g. 10.")
        self._check(
            not (self.gradient_probe and self.compile_denoiser),
            "The gradient probe listens to layers that compiled code does not call",
            "gradient_probe and compile_denoiser",
            "Turn off one of the two.",
        )

    @classmethod
    def allowed_rules(cls) -> tuple[str, ...]:
        return RULES
