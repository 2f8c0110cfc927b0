"""Numbers as people read them: significant digits, powers of ten, uncertainties, and a dash for undefined."""

from __future__ import annotations

import math

UNDEFINED = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits: 1.74, 0.0123, 3,818, 3.2×10⁻⁵; a dash where undefined."""
    if value is None or not math.isfinite(value):
        return UNDEFINED
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if -3 <= exponent < 5:
        decimals = max(0, digits - 1 - exponent)
        return minus(f"{round(value, digits - 1 - exponent):,.{decimals}f}")
    mantissa = f"{value / 10.0**exponent:.{digits - 1}f}"
    return minus(f"{mantissa}×{power_of_ten(exponent)}")


def short(value: float | None) -> str:
    """A setting such as an epoch or a learning rate, as one would type it: 60, 0.001, 0.4348."""
    if value is None or not math.isfinite(value):
        return UNDEFINED
    return minus(f"{value:.4g}") if value == 0 or 1e-4 <= abs(value) < 1e5 else number(value, 2)


def count(value: int | None) -> str:
    """A whole number with thousands separated: 3,818."""
    return UNDEFINED if value is None else f"{value:,}"


def power_of_ten(exponent: int) -> str:
    """10⁻³ for -3."""
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def with_error(value: float | None, error: float | None, digits: int = 3) -> str:
    """`value ± error`, the error with two significant digits and the value with as many decimals as the error.

    Without an error (None) it is `number(value, digits)`; the decimals never go below those of `digits` significant
    digits of the value's own size when the error is tiny.
    """
    if value is None or not math.isfinite(value) or error is None or not math.isfinite(error) or error <= 0:
        return number(value, digits)
    scale = math.floor(math.log10(max(abs(value), error)))
    if not -3 <= scale < 5:
        factor = 10.0**scale
        decimals = min(digits - 1, max(0, 1 - math.floor(math.log10(error / factor))))
        return minus(f"({value / factor:.{decimals}f} ± {error / factor:.{decimals}f})×{power_of_ten(scale)}")
    decimals = max(0, min(digits - 1 - scale, 1 - math.floor(math.log10(error))))
    if float(f"{error:.{decimals}f}") == 0:
        return number(value, digits)
    return minus(f"{value:,.{decimals}f} ± {error:,.{decimals}f}")


def fixed(value: float | None, error: float | None, decimals: int = 2) -> str:
    """`value ± error` with so many decimals in both, for columns that are compared down the page."""
    if value is None or not math.isfinite(value):
        return UNDEFINED
    text = f"{value:,.{decimals}f}"
    return minus(text if error is None else f"{text} ± {error:,.{decimals}f}")


def percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction as a percentage: 72%, 98.6% with three digits, <0.1% for what would read as zero."""
    if fraction is None or not math.isfinite(fraction):
        return UNDEFINED
    value = 100 * fraction
    if 0 < abs(value) < 0.1:
        return "<0.1%"
    if value == 0:
        return "0%"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return minus(f"{value:.{min(decimals, 2)}f}%")


def seconds(value: float | None) -> str:
    """A duration: 4.2 s, or 2 min 05 s."""
    if value is None:
        return UNDEFINED
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"


def minus(text: str) -> str:
    """The typographic minus sign in place of the hyphen."""
    return text.replace("-", "−")
