"""The findings of the paper and the goals of this package, seen or not."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from paraboloid.jobs.studies.claims import Claim
from paraboloid.jobs.studies.comparing.summary import Summary, best, fastest, judged, summaries
from paraboloid.report.numbers import fixed, number, short

ALIKE = 0.03  # of the loss
FIRST_ORDER, QUASI_NEWTON = ("SGD-m", "Adam", "AdamW"), ("K-BFGS", "K-BFGS(L)")
GOAL = 0.4  # of Adam's seconds
# the authors' training losses on MNIST after so many epochs, and how near is near
AUTHORS = {"K-BFGS": {1: 169.0, 5: 68.0, 10: 59.8, 20: 56.3}, "KFAC": {1: 183.2, 5: 74.0, 10: 61.6, 20: 56.7}}
NEAR = 0.1
PLAIN = {kind: (kind, f"{kind}, clipped", f"{kind}, grafted") for kind in ("KFAC", "EKFAC")}


def claims(problem: dict[str, Any]) -> list[Claim]:
    """Every finding of the paper, and every goal, that can be looked at on a problem."""
    found = summaries(problem)
    ours = [name for name, s in found.items() if s.family == "ours"]
    first, quasi, peers = (best(found, names) for names in (FIRST_ORDER, QUASI_NEWTON, ("SOAP", "Muon", "Shampoo")))
    own, kfac, adam = best(found, ours), found.get("KFAC"), found.get("Adam")
    rows = [
        _lower("K-BFGS ends below the first-order methods after the same epochs", quasi, first),
        _sooner("K-BFGS is at Adam's last loss in fewer seconds than Adam", quasi),
        _alike("K-BFGS is as good as KFAC by epochs", quasi, kfac),
        _cheaper("An epoch of K-BFGS takes fewer seconds than one of KFAC", found.get("K-BFGS"), kfac),
        _alike("K-BFGS(L) is as good as K-BFGS", found.get("K-BFGS(L)"), found.get("K-BFGS")),
        _lower("Grafting to Adam lowers KFAC's loss", found.get("KFAC, grafted"), kfac),
        _lower("Clipping lowers KFAC's loss", found.get("KFAC, clipped"), kfac),
        _lower("KL factors lower KFAC's loss", found.get("KFAC, KL factors"), best(found, PLAIN["KFAC"])),
        _lower("KL factors lower EKFAC's loss", found.get("EKFAC, KL factors"), best(found, PLAIN["EKFAC"])),
        _lower("Steps of Adam's length lower K-BFGS's loss", found.get("K-BFGS, Adam's length"), found.get("K-BFGS")),
        _lower("Steps of Adam's length lower K-BFGS(L)'s loss", found.get("K-BFGS(L), Adam's length"),
               found.get("K-BFGS(L)")),
        _lower("A diagonal with steps of Adam's length ends below Adam", found.get("Diagonal, Adam's length"), adam),
        _lower("Polar factors with Adam's length end below Muon", found.get("Polar"), found.get("Muon")),
        _alike("Layer by layer, Gauss-Newton steps are as good as whole ones", found.get("Gauss-Newton by layer"),
               found.get("Gauss-Newton")),
        _lower("The best of this package ends below SOAP, Muon and Shampoo", own, peers),
        _goal(fastest(found, "ours"), adam),
        *(_as_authors(problem.get("name", ""), found.get(name), figures) for name, figures in AUTHORS.items()),
    ]  # fmt: skip
    return [row for row in rows if row is not None]


def _as_authors(problem: str, s: Summary | None, figures: dict[int, float]) -> Claim | None:
    """Whether a training curve is near the published one, which is of MNIST."""
    if s is None:
        return None
    at = {epoch: _after(s, epoch) for epoch in figures if epoch <= (s.curve[-1]["epoch"] or 0.0)}
    claim = f"{s.name}'s training loss is within {NEAR:.0%} of the authors' after {', '.join(map(str, at))} epochs"
    if problem != "mnist-autoencoder" or not at:
        return f"{s.name}'s training loss is that of the authors' run", None, "it is of MNIST, see --data"
    seen = all(v is not None and abs(v - figures[epoch]) <= NEAR * figures[epoch] for epoch, v in at.items())
    return claim, seen, ", ".join(f"{fixed(v, None)} ({fixed(figures[epoch], None)})" for epoch, v in at.items())


def _after(s: Summary, epoch: float) -> float | None:
    """The training loss after so many epochs, between the points at which it was measured."""
    points = [(p["epoch"], p["train"]) for p in s.curve]
    for (a, before), (b, after) in pairwise(points):
        if a is not None and b is not None and a <= epoch <= b:
            return None if before is None or after is None else before + (after - before) * (epoch - a) / (b - a)
    return None


def _said(*each: Summary) -> str:
    return ", ".join(f"{s.name} {fixed(s.final, s.error)}" for s in each)


def _lower(claim: str, one: Summary | None, other: Summary | None) -> Claim | None:
    if one is None or other is None:
        return None
    if one.final is None or other.final is None:
        return claim, None, "a run failed"
    return claim, one.final < other.final, _said(one, other)


def _alike(claim: str, one: Summary | None, other: Summary | None) -> Claim | None:
    """Not worse by more than 3 percent."""
    if (lower := _lower(claim, one, other)) is None or one is None or other is None or lower[1] is None:
        return lower
    assert one.final is not None and other.final is not None
    return claim, one.final < (1 + ALIKE) * other.final, _said(one, other)


def _sooner(claim: str, s: Summary | None) -> Claim | None:
    if s is None:
        return None
    return claim, s.to_adam is not None and s.to_adam < 1, f"{s.name}: {_share(s)}"


def _cheaper(claim: str, one: Summary | None, other: Summary | None) -> Claim | None:
    if one is None or other is None:
        return None
    return claim, one.seconds < other.seconds, f"{number(other.seconds / one.seconds)} times as many of its epochs"


def _goal(s: Summary | None, adam: Summary | None) -> Claim | None:
    if adam is None:
        return None
    claim = f"The fastest of this package is at Adam's last loss in at most {GOAL} of Adam's seconds"
    return claim, s is not None and (s.to_adam or 0.0) <= GOAL, "never" if s is None else f"{s.name}: {_share(s)}"


def _share(s: Summary) -> str:
    return "never there" if s.to_adam is None else f"{number(s.to_adam, 2)} of Adam's seconds, {short(s.epochs)} epochs"


def findings(results: dict[str, Any]) -> list[str]:
    """The claims as sentences, those that were not seen here as plainly as the others."""
    share, sentences = judged(results, claims)
    return [f"{share} findings and goals were seen here.", *sentences, *results["left_out"]]
