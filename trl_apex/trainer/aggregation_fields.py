"""How the trainers' configurations carry the options of the aggregator: eight fields, and one for all others."""

import argparse
import dataclasses
import json
import typing
import warnings
from dataclasses import dataclass, field
from typing import Any

from ..aggregation.options import AGGREGATION_OPTIONS, ApexOptions

FLAT = (
    "need_coef",
    "need_mode",
    "reward_targets",
    "need_scale",
    "warmup_iterations",
    "ramp_iterations",
    "priority_floor",
    "normalize_objectives",
)
OF_TRL = ("scale_rewards",)  # a field of trl.GRPOConfig, with its meaning and default
NEW = ("gd2po_agreement",)  # never were fields
# Fields of 0.1.0, hidden from `--help`: accepted with a warning for one release.
OLD = tuple(name for name in AGGREGATION_OPTIONS if name not in (*FLAT, *OF_TRL, *NEW))


def _flat(name: str) -> Any:
    default, text = AGGREGATION_OPTIONS[name]
    return field(default=default, metadata={"help": text})


_TYPES = typing.get_type_hints(ApexOptions)
_OldFields: Any = dataclasses.make_dataclass(
    "_OldFields",
    [(n, _TYPES[n], field(default=AGGREGATION_OPTIONS[n][0], metadata={"help": argparse.SUPPRESS})) for n in OLD],
    kw_only=True,
)


@dataclass(kw_only=True)
class AggregationFields(_OldFields):
    """Fields of a trainer's configuration for its [`MultiObjectiveRewardAggregator`].

    A value in `aggregation_options` counts where the field of the same name is left at its default.
    """

    need_coef: float = _flat("need_coef")
    need_mode: str = _flat("need_mode")
    reward_targets: list[float] | None = _flat("reward_targets")
    need_scale: str = _flat("need_scale")
    warmup_iterations: int = _flat("warmup_iterations")
    ramp_iterations: int = _flat("ramp_iterations")
    priority_floor: float = _flat("priority_floor")
    normalize_objectives: bool = _flat("normalize_objectives")
    aggregation_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "All other options of the aggregator: a dictionary of fields of ApexOptions, or an ApexOptions. On the "
            "command line as JSON, e.g. '{\"scale_blend\": 0.5}'."
        },
    )

    def _plain_aggregation_options(self) -> None:
        """Make `aggregation_options` a plain dictionary, whatever it was given as.

        Raises:
            ValueError: if it is text that is not JSON.
        """
        given: Any = self.aggregation_options
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"`aggregation_options` must be JSON. Found {given!r} ({error}). "
                    "Pass e.g. '{\"scale_blend\": 0.5}'."
                ) from error
        self.aggregation_options = given.changed() if isinstance(given, ApexOptions) else given

    def _checked_aggregation_options(self) -> ApexOptions:
        """The options as one object; warns about fields of 0.1.0.

        Raises:
            ValueError: for an unknown option, a value out of its range, or two values for one option.
        """
        ApexOptions.read(typing.cast(dict, self.aggregation_options))
        options = self.apex_options()
        old = [name for name in OLD if getattr(self, name) != AGGREGATION_OPTIONS[name][0]]
        if old:
            values = ", ".join(f"{name!r}: {getattr(self, name)!r}" for name in old)
            warnings.warn(
                f"Options of the aggregator that are set seldom stand in `aggregation_options`. Found the fields "
                f"{', '.join(old)}, which the next release will refuse. Pass aggregation_options={{{values}}}.",
                FutureWarning,
                stacklevel=4,
            )
        return options

    def apex_options(self) -> ApexOptions:
        """The options of the aggregator, as one object."""
        options = self._given()
        for name in (*FLAT, *OF_TRL, *OLD):
            value, default = getattr(self, name), AGGREGATION_OPTIONS[name][0]
            if name not in options:
                options[name] = value
            elif value != default and value != options[name]:
                raise ValueError(
                    f"`{name}` must have one value. Found {value!r}, and {options[name]!r} in `aggregation_options`. "
                    "Leave out one of the two."
                )
        return ApexOptions(**options)

    def _given(self) -> dict[str, Any]:
        return dict(typing.cast(dict, self.aggregation_options) or {})

    def aggregator_options(self) -> dict[str, Any]:
        """The options of the aggregator, by name."""
        return dataclasses.asdict(self.apex_options())

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values; fields of 0.1.0 are under `aggregation_options`."""
        values = super().to_dict()  # type: ignore[misc]
        rest = {name: value for name, value in self.apex_options().changed().items() if name in (*OLD, *NEW)}
        return {
            **{name: value for name, value in values.items() if name not in OLD},
            "aggregation_options": {**self._given(), **rest} or None,
        }
