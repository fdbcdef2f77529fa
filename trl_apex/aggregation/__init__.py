"""Aggregation: from several rewards per sample to one advantage per sample. Needs torch alone."""

from .aggregator import MultiObjectiveRewardAggregator
from .options import AGGREGATION_OPTIONS, GRADIENT_RULES, RULES, ApexOptions
from .population import PopulationConflict

__all__ = [
    "AGGREGATION_OPTIONS",
    "GRADIENT_RULES",
    "RULES",
    "ApexOptions",
    "MultiObjectiveRewardAggregator",
    "PopulationConflict",
]
