"""Aggregation: from several rewards per sample to one advantage per sample. Needs torch alone."""

from .aggregator import MultiObjectiveRewardAggregator
from .conflict import PopulationConflict
from .options import AGGREGATION_OPTIONS, ApexOptions
from .rules import GRADIENT_RULES, RULES

__all__ = [
    "AGGREGATION_OPTIONS",
    "GRADIENT_RULES",
    "RULES",
    "ApexOptions",
    "MultiObjectiveRewardAggregator",
    "PopulationConflict",
]
