"""Axes in plain numbers, and measurements with their errors on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from paraboloid.report.numbers import minus, number, power_of_ten


def log_axis(axis: Axis, values: Sequence[float | None]) -> None:
    """A logarithmic axis labelled in plain numbers, between the powers of ten too where it spans few of them."""
    positive = [v for v in values if v is not None and v > 0]
    if not positive:
        return
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})  # pyright: ignore
    span = max(positive) / min(positive)
    subs = (1.0, 2.0, 5.0) if span < 50 else (1.0, 3.0) if span < 1000 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _log_label(value)))


def _log_label(value: float) -> str:
    if value <= 0:
        return ""
    if 1e-3 <= value < 1e5:
        return f"{value:,.10g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    power = power_of_ten(int(exponent))
    return power if mantissa == "1" else f"{mantissa}×{power}"


def plain_axis(axis: Axis) -> None:
    """Labels of a linear axis in plain numbers: no offset text, a typographic minus."""
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: minus(f"{value:.6g}") if abs(value) < 1e5 else number(value))
    )


def whole_axis(axis: Axis) -> None:
    """Ticks at whole numbers only, for epochs and indices."""
    axis.set_major_locator(MaxNLocator(integer=True))
    plain_axis(axis)


def fixed_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Ticks at exactly `values`, labelled with them."""
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def measured(
    axes: Axes, x: Sequence[float], values: Sequence[float | None], errors: Sequence[float | None], **style: Any
) -> None:
    """Values with their standard errors as bars; what is undefined is left out."""
    axes.errorbar(x, gaps(values), yerr=[error or 0.0 for error in errors], **{"elinewidth": 1.2, **style})


def batch_sizes(axes: Axes, sizes: Sequence[float], label: str = "batch size") -> None:
    """A logarithmic axis of batch sizes, with a tick at each."""
    axes.set_xscale("log", base=2)
    fixed_ticks(axes.xaxis, sizes)
    axes.set_xlabel(label)


def gaps(values: Sequence[float | None]) -> list[float]:
    """None as NaN, which Matplotlib leaves out."""
    return [float("nan") if value is None else value for value in values]
