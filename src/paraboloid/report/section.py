"""The pieces a page is made of, as plain data; the template turns them into HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """Rows of ready-made cells (strings; Markup where there is HTML), the first column being the rows' names.

    Cells keep to one line each, and a table that is too wide is scrolled; those of `sentences` wrap.
    """

    caption: str | Markup
    columns: Sequence[str | Markup]
    rows: Sequence[Sequence[str | Markup]]
    note: str | Markup = ""
    folded: bool = False
    sentences: bool = False


@dataclass(frozen=True)
class Panel:
    """A figure with its caption and the tables that stand beside it (below it where the panel is wide), or tables alone
    where the figure is empty."""

    figure: Markup
    caption: str | Markup
    tables: Sequence[Table] = ()
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """One heading of the page: what the numbers say in words, then panels."""

    id: str
    title: str
    reading: Sequence[str] = ()
    panels: Sequence[Panel] = field(default_factory=tuple)
