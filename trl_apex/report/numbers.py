"""How numbers are written."""

import math

MINUS = "\N{MINUS SIGN}"


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number for people: `digits` significant digits, no needless exponent, thousands set apart.

    Args:
        value (`float`, *optional*): None and NaN give a dash.
        digits (`int`): significant digits.
        sign (`bool`): write a plus sign as well.

    Example:
        >>> [number(v) for v in (0.51234, 21.718, 1234567.0, 2e-5, 0.0, None)]
        ['0.512', '21.7', '1,234,567', '2e-05', '0', '\N{EM DASH}']
        >>> number(0.1, sign=True)
        '+0.1'
    """
    if value is None or not math.isfinite(value):
        return "\N{EM DASH}"
    size = abs(value)
    text = f"{size:,.0f}" if size >= 10**digits else f"{size:.{digits}g}"
    return (MINUS if value < 0 else "+" if sign and value else "") + text


def decimals_for(spread: float, digits: int = 2) -> int:
    """Decimals that show a difference of size `spread` with `digits` significant digits, from 0 to 6.

    Example:
        >>> decimals_for(0.35), decimals_for(12.0), decimals_for(0.0042)
        (2, 0, 4)
    """
    if not (math.isfinite(spread) and spread > 0):
        return 2
    return min(max(digits - 1 - math.floor(math.log10(spread)), 0), 6)


def fixed(value: float | None, decimals: int, sign: bool = False) -> str:
    """A number with a fixed count of decimals, so that a column lines up.

    Example:
        >>> fixed(1234.5, 1), fixed(-0.126, 2), fixed(0.5, 2, sign=True)
        ('1,234.5', '\N{MINUS SIGN}0.13', '+0.50')
    """
    if value is None or not math.isfinite(value):
        return "\N{EM DASH}"
    text = f"{abs(value):,.{decimals}f}"
    zero = not any(c in "123456789" for c in text)
    return (MINUS if value < 0 and not zero else "+" if sign and not zero else "") + text


def duration(seconds: float) -> str:
    """A duration in the two units that matter.

    Example:
        >>> duration(0.42), duration(75), duration(7320)
        ('0.4 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
