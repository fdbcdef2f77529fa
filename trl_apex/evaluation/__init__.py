"""Measures of a multi-objective run."""

from .measures import domination_rates, hypervolume, paired_gain, seesaw_rate

__all__ = ["domination_rates", "hypervolume", "paired_gain", "seesaw_rate"]
