"""Measures of a multi-objective run."""

from .comparison import compare, joint_hypervolume
from .measures import domination_rates, hypervolume, paired_gain, seesaw_rate
from .reward_hacking import hacking_signs

__all__ = [
    "compare",
    "domination_rates",
    "hacking_signs",
    "hypervolume",
    "joint_hypervolume",
    "paired_gain",
    "seesaw_rate",
]
