"""Measures of a multi-objective run."""

from .measures import (
    compare,
    domination_rates,
    hacking_signs,
    hypervolume,
    joint_hypervolume,
    paired_gain,
    seesaw_rate,
)

__all__ = [
    "compare",
    "domination_rates",
    "hacking_signs",
    "hypervolume",
    "joint_hypervolume",
    "paired_gain",
    "seesaw_rate",
]
