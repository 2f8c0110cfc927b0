"""What papers claim, judged by what was measured: rows of a table whose sentences wrap."""

from __future__ import annotations

from collections.abc import Iterable

from paraboloid.report.section import Table

Claim = tuple[str, bool | None, str]  # what is claimed, whether it was seen (None: not run), what was measured
WORDS = {True: "seen", False: "not seen here", None: "not run"}


def claims_table(caption: str, claims: Iterable[Claim], name: str = "finding") -> Table:
    """A row for each claim, under the `name` of what it is."""
    rows = [[claim, WORDS[seen], measured] for claim, seen, measured in claims]
    return Table(caption, [name, "", "measured"], rows, sentences=True)
