"""The findings of the paper, seen or not."""

from __future__ import annotations

from typing import Any

from paraboloid.jobs.studies.backpack.methods import DIAGONAL, EXACT, KRONECKER, MONTE_CARLO
from paraboloid.jobs.studies.claims import Claim
from paraboloid.jobs.studies.comparing.summary import Summary, best, judged, summaries
from paraboloid.report.numbers import fixed, number, percent

FIRST_ORDER, EARLY = ("SGD-m", "Adam"), 0.3  # of the epochs
CHEAP, CLOSE = 3.0, 0.02  # gradients; of the test accuracy


def claims(problem: dict[str, Any]) -> list[Claim]:
    """Every finding of the paper that can be looked at on a problem."""
    found, costs = summaries(problem), {row["quantity"]: row["gradients"] for row in problem["costs"]}
    first = [name for name in ("square_norms", "second_moment", "variance", "sample_grads") if name in costs]
    rows = [_cost(f"First-order quantities cost at most {CHEAP:g} gradients", costs, first, CHEAP),
            _cost(f"Monte Carlo curvature costs at most {CHEAP:g} gradients", costs, MONTE_CARLO, CHEAP),
            ("Exact curvature costs more than Monte Carlo, a pass for each class",
             all(costs[e] > costs[m] for e, m in zip(EXACT, MONTE_CARLO, strict=True)),
             _said(costs, EXACT))]  # fmt: skip
    plain, kron = (best(found, names) for names in (FIRST_ORDER, KRONECKER))
    first = {names: _fastest(found, names) for names in (FIRST_ORDER, KRONECKER, DIAGONAL)}
    rows += [
        _early("Kronecker factors make faster progress at first than SGD-m and Adam, by epochs", first[KRONECKER],
               first[FIRST_ORDER]),
        _early("They make faster progress at first than diagonals", first[KRONECKER], first[DIAGONAL]),
        _close("They end at a test accuracy as good as SGD-m's and Adam's", kron, plain),
        _close("Monte Carlo is as good as exact curvature: KFAC against KFLR", found.get("KFAC"), found.get("KFLR")),
        _close("Monte Carlo is as good as the exact curvature, for the diagonal", found.get("DiagGGN, Monte Carlo"),
               found.get("DiagGGN")),
    ]  # fmt: skip
    return [row for row in rows if row is not None]


def _said(costs: dict[str, float], names: Any) -> str:
    return ", ".join(f"{name} {number(costs[name], 2)}" for name in names)


def _cost(claim: str, costs: dict[str, float], names: Any, most: float) -> Claim:
    return claim, max(costs[name] for name in names) <= most, _said(costs, names)


def early(s: Summary) -> float | None:
    """The training loss after the first 30 percent of the epochs, at the nearest point."""
    end = s.curve[-1]["epoch"] or 0.0
    return min(s.curve, key=lambda p: abs((p["epoch"] or 0.0) - EARLY * end))["train"]


def _fastest(found: dict[str, Summary], names: Any) -> Summary | None:
    """The one that is furthest then."""
    known = [found[name] for name in names if name in found and early(found[name]) is not None]
    return min(known, key=lambda s: early(s) or 0.0) if known else None


def _early(claim: str, one: Summary | None, other: Summary | None) -> Claim | None:
    if one is None or other is None:
        return None
    a, b = early(one), early(other)
    if a is None or b is None:
        return claim, None, "a run failed"
    return claim, a < b, f"training loss {one.name} {fixed(a, None, 3)}, {other.name} {fixed(b, None, 3)}"


def _close(claim: str, one: Summary | None, other: Summary | None) -> Claim | None:
    if one is None or other is None:
        return None
    if one.accuracy is None or other.accuracy is None:
        return claim, None, "a run failed"
    words = f"{one.name} {percent(one.accuracy, 3)}, {other.name} {percent(other.accuracy, 3)}"
    return claim, one.accuracy > other.accuracy - CLOSE, words


def findings(results: dict[str, Any]) -> list[str]:
    """The claims as sentences, those that were not seen here as plainly as the others."""
    share, sentences = judged(results, claims)
    return [f"{share} findings of the paper were seen here.", *sentences]
