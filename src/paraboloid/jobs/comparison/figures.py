"""A's and B's curves over each other, in the same two colours on the whole page."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.figure import Figure

from paraboloid.report.axes import gaps, log_axis, plain_axis, whole_axis
from paraboloid.report.theme import SERIES, inline_svg

COLORS, NAMED = SERIES[:2], ("A", "B")
Line = tuple[Sequence[float], Sequence[float | None]]


def curves(name: str, what: str, titled: Sequence[tuple[str, Sequence[Line]]], xlabel: str) -> Markup:
    """One axis for each title with A's and B's line, values on a logarithmic scale where they are positive."""

    def draw(figure: Figure) -> None:
        for axes, (title, lines) in zip(figure.subplots(1, len(titled), squeeze=False)[0], titled, strict=True):
            for (x, y), color, who in zip(lines, COLORS, NAMED, strict=True):
                axes.plot(x, gaps(y), color=color, label=who, marker="o", markersize=3)
            values = [v for _, y in lines for v in y if v is not None]
            if values and min(values) > 0:
                log_axis(axes.yaxis, values)
            axes.set(title=title, xlabel=xlabel)
            (plain_axis if xlabel == "seconds" else whole_axis)(axes.xaxis)
            axes.legend()

    return inline_svg(name, what, (7.4 if len(titled) > 1 else 5.6, 3.1), draw)
