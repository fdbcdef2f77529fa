"""Values of a configuration against the types that its fields are annotated with."""

import dataclasses
import math
import types
import typing
from numbers import Integral, Real
from typing import Any


def check_types(config: Any, names: set[str], finite: set[str]) -> None:
    """Raise where a field holds something of another type than its annotation says, or NaN.

    Args:
        config (dataclass instance): annotated with bool, int, float, str, lists of these, None and unions.
        names (`set[str]`): the fields to look at.
        finite (`set[str]`): those that must not be infinite either.

    Raises:
        ValueError: names the field, the type and what was found.

    Example:
        ```python
        >>> @dataclasses.dataclass
        ... class Options:
        ...     steps: int | None = 3
        >>> check_types(Options(steps="many"), {"steps"}, set())
        Traceback (most recent call last):
        ValueError: `steps` must be of type int | None. Found 'many' (str). Correct or remove it.

        ```
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if field.name not in names:
            continue
        value, hint = getattr(config, field.name), hints[field.name]
        if not _fits(value, hint):
            raise ValueError(
                f"`{field.name}` must be of type {_name(hint)}. Found {_short(value)} ({type(value).__name__}). "
                "Correct or remove it."
            )
        numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, float)]
        if field.name in finite and any(not math.isfinite(number) for number in numbers):
            raise ValueError(f"`{field.name}` must be finite. Found {_short(value)}. Correct or remove it.")


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in arguments)
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _name(hint: Any) -> str:
    return (
        hint.__name__
        if isinstance(hint, type) and not typing.get_args(hint)
        else str(hint).replace("NoneType", "None")
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
