"""Figures as inline SVG that follow the page's light or dark theme.

Matplotlib draws with sentinel colours, one per token; the SVG's text then has each of them replaced by the CSS variable
of that token, so one drawing serves both themes. Text stays text and takes the page's font. Ids are prefixed with the
figure's name, so that clip paths and markers of several figures on one page do not meet.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

# Sentinels are colours nobody would draw with; each becomes var(--name). c1..c8 are the series colours.
TOKENS = ("ink", "muted", "rule", "paper", "c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")
_SENTINELS = {name: f"#0b{i:02x}0d" for i, name in enumerate(TOKENS)}
INK, MUTED, RULE, PAPER = (_SENTINELS[name] for name in TOKENS[:4])
SERIES = tuple(_SENTINELS[name] for name in TOKENS[4:])

# What one colour means on the whole page.
SAME, OTHER, FULL = SERIES[1], SERIES[0], INK
TRAIN, TEST = SERIES[0], SERIES[1]

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "paraboloid",
    "font.size": 10.0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.labelpad": 5.0,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3.5,
    "ytick.major.size": 0.0,
    "xtick.major.width": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "errorbar.capsize": 2.5,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.6,
    "legend.borderaxespad": 0.2,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.constrained_layout.h_pad": 0.06,
}


def inline_svg(name: str, title: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> Markup:
    """The figure that `draw` fills, `size` in inches, as an `<svg>` element; `title` says what it shows."""
    with rc_context(_STYLE):  # pyright: ignore[reportArgumentType] - a str is a name of a setting
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        # The fixed date (none) and hash salt make the same record give the same page, byte for byte.
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return Markup(_for_page(buffer.getvalue(), name, title))


def _for_page(svg: str, name: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for token, sentinel in _SENTINELS.items():
        svg = svg.replace(sentinel, f"var(--{token})")
    svg = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', _two_decimals, svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    head = (
        f'<svg class="figure" role="img" aria-labelledby="{name}-title" viewBox="0 0 {width} {height}" '
        f'style="--width: {width}"><title id="{name}-title">{escape(title)}</title>'
    )
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1)


def _two_decimals(attribute: re.Match[str]) -> str:
    return re.sub(r"(\d\.\d\d)\d+", r"\1", attribute[0])
