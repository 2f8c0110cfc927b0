"""What the study says, in words: each claim of the works with what was measured here."""

from __future__ import annotations

from statistics import mean
from typing import Any

from paraboloid.jobs.studies.claims import Claim, inside
from paraboloid.jobs.studies.linearised_laplace import em, growth
from paraboloid.report.numbers import fixed, number

EXACT = ("full", "functional")
INVARIANT = 1e-5


def average(rows: list[dict[str, Any]], key: str, **where: Any) -> float | None:
    """Mean over the rows with these values; None where there are none."""
    found = [row[key] for row in rows if all(row[k] == v for k, v in where.items())]
    return mean(found) if found else None


def claims(results: dict[str, Any]) -> list[Claim]:
    """Every claim that can be looked at here; over all networks, moments, seeds and structures unless it says."""
    rows = results["evidence"]
    posteriors = [row for row in rows if row["structure"] != "network"]
    own = _by_place(rows, "network", "")
    found: list[Claim] = []

    def compare(claim: str, key: str, way: str, other: str | None, above: bool) -> None:
        pairs = []
        for row in posteriors:
            if row["way"] == way:
                base = own[_place(row)] if other is None else _same(posteriors, row, other)
                pairs.append((row[key], base[key]))
        seen = sum((a > b) == above and a != b for a, b in pairs)
        a, b = mean(p[0] for p in pairs), mean(p[1] for p in pairs)
        what = f"{fixed(a, None, 3)} against {fixed(b, None, 3)}, in {seen} of {len(pairs)} posteriors"
        found.append((claim, seen > len(pairs) / 2 and (a > b) == above, what))

    for key, label in (("nll", "the negative log-likelihood"), ("ece", "the calibration error")):
        compare(f"Evidence at the trained weights makes {label} worse than the network's", key, "evidence", None, True)
    compare("At the optimum of the linearised model it spreads the predictions less: a better likelihood", "nll",
            "adapted", "evidence", False)  # fmt: skip
    compare("The adapted evidence makes the likelihood better than the network's own", "nll", "adapted", None, False)
    compare("It tells noise from digits better than the network", "auroc", "adapted", None, True)
    compare("One exponent for all probabilities mends the likelihood", "nll", "adapted, exponent", "adapted", False)
    compare("and costs some of what the posterior knew about noise", "auroc", "adapted, exponent", "adapted", False)
    compare("Matched by unweighted variances it tells noise better than by its own", "auroc", "adapted, matched",
            "adapted, exponent", True)  # fmt: skip
    matched = [row for row in posteriors if row["way"] == "adapted, matched"]
    kept = [row["nll"] <= 1.02 * own[_place(row)]["nll"] for row in matched]
    found.append(("and is as likely as the network, within 2%", all(kept), f"in {sum(kept)} of {len(kept)} posteriors"))
    found += _early(posteriors, rows)
    found += _structures(posteriors)
    found += _invariance(results["rescaling"])
    found += em.claims(results["em"]) + growth.claims(results["growth"])
    return found


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["hidden"], row["epochs"], row["run"]


def _by_place(rows: list[dict[str, Any]], structure: str, way: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    return {_place(row): row for row in rows if (row["structure"], row["way"]) == (structure, way)}


def _same(rows: list[dict[str, Any]], row: dict[str, Any], way: str) -> dict[str, Any]:
    """The row of the same posterior with another way to choose its prior."""
    like = (*_place(row), row["structure"], way)
    return next(r for r in rows if (*_place(r), r["structure"], r["way"]) == like)


def _early(posteriors: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[Claim]:
    """Whether the unadapted evidence does more harm to a network that was stopped early."""
    moments = sorted({row["epochs"] for row in rows})
    if len(moments) < 2:
        return []
    harm = []
    for epochs in (moments[0], moments[-1]):
        bad, good = average(posteriors, "nll", way="evidence", epochs=epochs), average(
            posteriors, "nll", way="adapted", epochs=epochs)  # fmt: skip
        assert bad is not None and good is not None
        harm.append(bad - good)
    first, last = (fixed(value, None, 3) for value in harm)
    what = f"likelihood lost: {first} after {moments[0]} epochs, {last} after {moments[-1]}"
    return [("Not adapting costs more where the training was stopped early", harm[0] > harm[1], what)]


def _structures(posteriors: list[dict[str, Any]]) -> list[Claim]:
    """Exact against approximate curvature, by the precision that the evidence chooses and by noise."""
    exact = [row for row in posteriors if row["structure"] in EXACT]
    others = [s for s in dict.fromkeys(row["structure"] for row in posteriors) if s not in EXACT]
    found: list[Claim] = []
    for structure in others:
        a = average(posteriors, "auroc", structure=structure, way="adapted")
        b = average(exact, "auroc", way="adapted")
        if a is not None and b is not None:
            found.append((f"{structure} tells noise less well than the exact curvature", a < b,
                          f"AUROC {fixed(a, None, 3)} against {fixed(b, None, 3)}"))  # fmt: skip
    return found


def _invariance(rows: list[dict[str, Any]]) -> list[Claim]:
    change = {way: max(row["change"] for row in rows if row["way"] == way) for way in {row["way"] for row in rows}}
    if not change:
        return []
    return [
        ("With one precision for all weights, predictions change when normalised weights are rescaled",
         change["one precision"] > INVARIANT, f"by up to {number(change['one precision'])}"),
        ("With one precision for each layer they do not", change["by layer"] <= INVARIANT,
         f"by up to {number(change['by layer'])}"),
        ("and neither do matched predictions", change["matched"] <= INVARIANT, f"by up to {number(change['matched'])}"),
    ]  # fmt: skip


def findings(results: dict[str, Any]) -> list[str]:
    """Sentences, the most important first."""
    words = {True: "Seen", False: "Not seen", None: "Not run"}
    found = claims(results)
    seen = sum(bool(s) for _, s, _ in found)
    return [f"{seen} of {len(found)} claims about linearised Laplace are seen on small networks and digits.",
            *(f"{words[s]}: {inside(claim)} ({what})." for claim, s, what in found)]  # fmt: skip
