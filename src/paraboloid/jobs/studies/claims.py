"""What papers claim, judged by what was measured: rows of a table whose sentences wrap."""

from __future__ import annotations

from collections.abc import Iterable

from paraboloid.report.section import Table

Claim = tuple[str, bool | None, str]  # what is claimed, whether it was seen (None: not run), what was measured
NAMES = ("K-BFGS", "KFAC", "KFLR", "KFRA", "Kronecker", "Monte Carlo", "Adam", "SGD", "Gauss-Newton")
WORDS = {True: "seen", False: "not seen here", None: "not run"}


def claims_table(caption: str, claims: Iterable[Claim], name: str = "finding") -> Table:
    """A row for each claim, under the `name` of what it is."""
    rows = [[claim, WORDS[seen], measured] for claim, seen, measured in claims]
    return Table(caption, [name, "", "measured"], rows, sentences=True)


def inside(claim: str) -> str:
    """A claim in the middle of a sentence: its first word small, where it is no name."""
    return claim if claim.startswith(NAMES) or claim[:2].isupper() else claim[:1].lower() + claim[1:]
